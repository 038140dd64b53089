"""Low-rank adapters against training every weight: reinforcement, fine-tuning, bytes and seconds.

    python experiments/lora/run.py [--workdir runs/lora]

The policy of gin/run/warmstart_arithmetic_tiny.gin is reinforced (gin/run/opo_tiny.gin,
opo_lora_tiny.gin) and fine-tuned (sft_tiny.gin without and with gin/method/lora.gin), each arm at
every learning rate of RATES and in three seeds. Every run is the job that `jaxrl-pt train` of the
same files would open, and the steps of both arms alternate. The seeds of an arm share its compiled
programs: seed k takes batches 1000·k, 1000·k + 1, … and the noise of those steps, and draws the
adapters' A from k.

What is finished is a row of runs.jsonl in the work directory, so the command may be interrupted and
repeated. Results go to results/lora.json and lora.png; README.md reads them.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt import params as P
from jaxrl_pt.jobs.open import kind
from jaxrl_pt.models import transformer
from jaxrl_pt.run.policy import load_policy
from jaxrl_pt.scaling.runs import train as train_gin
from jaxrl_pt.scaling.seeds import append_row, finished_rows, interval
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states

HERE = Path(__file__).parent
WARM = 'gin/run/warmstart_arithmetic_tiny.gin'
FILES = {
    ('OPO', 'full'): ('gin/run/opo_tiny.gin',),
    ('OPO', 'LoRA'): ('gin/run/opo_lora_tiny.gin',),
    ('SFT', 'full'): ('gin/run/sft_tiny.gin',),
    ('SFT', 'LoRA'): ('gin/run/sft_tiny.gin', 'gin/method/lora.gin')}
# The first pair has the rates of the shipped files, with ten times the rate for adapters.
RATES = {'OPO': ({'full': 1e-4, 'LoRA': 1e-3},),
         'SFT': ({'full': 2e-3, 'LoRA': 2e-2}, {'full': 1e-3, 'LoRA': 1e-2})}
# The type that holds start_from, the setting of the learning rate, the steps of a run, and after
# how many it is evaluated.
SHAPE = {'OPO': ('RL', 'ConstantRate.learning_rate', 30, 30),
         'SFT': ('SFT', 'Cosine.peak_rate', 40, 20)}
SMALLER = {'OPO': ('cfg.RL.eval_problems = 96',),
           'SFT': ('cfg.Train.batch_size = 16', 'cfg.Train.eval_batches = 8')}
SEEDS = (0, 1, 2)
COLOURS = {'full': '#0072B2', 'LoRA': '#D55E00'}


def settings(task: str, arm: str, rate: float, start: Path) -> tuple[cfg.Run, str]:
  """The run of an arm, and its resolved text."""
  objective, rate_name, steps, every = SHAPE[task]
  return gin_bindings.load(FILES[task, arm], [
      f'cfg.{objective}.start_from = {str(start)!r}', f'cfg.{rate_name} = {rate!r}',
      f'cfg.Train.num_steps = {steps}', f'cfg.Train.eval_every = {every}', *SMALLER[task]])


def begun(job: Any, start: Path, seed: int) -> Any:
  """The job's state before the first step of a seed, with the job at that seed's batches."""
  run = job.session.run
  model = job.session.model(run.model)
  optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), model.specs)
  new = functools.partial(kind(run.objective).new_method, run, job.session.mesh)
  state = states.state_of(model, load_policy(start).params, optimizer, job.abstract, new, seed)
  first = 1000 * seed
  _, position = job.saved(state, 0)
  job.resume(state, {**position, 'step': first, 'batches': first})
  return dataclasses.replace(state, step=jnp.int32(first))


def train(jobs: dict[str, Any], before: dict[str, Any], start: Path, seed: int
          ) -> dict[str, dict[str, Any]]:
  """One seed of both arms, which take their steps in turn so that their seconds compare.

  Args:
    jobs: of both arms.
    before: what each measures on held-out examples before its first step.
    start: the work directory of the policy that they start from.
    seed: as in the docstring of this file.

  Returns:
    Of each arm the reward or the loss of each step, its seconds, and what was held out.
  """
  state = {arm: begun(job, start, seed) for arm, job in jobs.items()}
  found: dict[str, dict[str, Any]] = {
      arm: {'steps': [], 'seconds': [], 'held_out': [{'step': 0, **before[arm]}]} for arm in jobs}
  train = jobs['full'].session.run.train
  for step in range(train.num_steps):
    for arm, job in jobs.items():
      began = time.perf_counter()
      done = job.step(state[arm], 1000 * seed + step)
      state[arm] = jax.block_until_ready(done.state)
      found[arm]['seconds'].append(round(time.perf_counter() - began, 4))
      metric = done.metrics['reward' if 'reward' in done.metrics else 'loss']
      found[arm]['steps'].append(float(metric.mean()))
      if (step + 1) % train.eval_every == 0:
        found[arm]['held_out'].append({'step': step + 1, **job.evaluate(state[arm], step + 1)})
  return found


class Experiment:
  """The runs of all arms under one work directory; finished ones are kept."""

  def __init__(self, root: Path) -> None:
    self.start, self._root = root / 'warmstart', root
    self._file = root / 'runs.jsonl'
    self._rows = {row['run']: row['result'] for row in finished_rows(self._file)}
    train_gin(WARM, self.start)

  def seeds(self, task: str, rates: dict[str, float]) -> list[dict[str, dict[str, Any]]]:
    """The results of both arms at one rate each, one for each seed."""
    name = lambda seed: f'{task} {json.dumps(rates)} {seed}'
    wanted = [seed for seed in SEEDS if name(seed) not in self._rows]
    with contextlib.ExitStack() as opened:
      jobs: dict[str, Any] = {}
      for arm, rate in rates.items() if wanted else ():
        run, text = settings(task, arm, rate, self.start)
        workdir = self._root / f'{task}-{arm}-{rate:g}'
        jobs[arm] = opened.enter_context(kind(run.objective).open(run, workdir, text, frozenset()))
      # The same for all seeds, since the adapters' B begin at zero.
      before = {arm: job.evaluate(begun(job, self.start, 0), 0) for arm, job in jobs.items()}
      for seed in wanted:
        began = time.perf_counter()
        self._rows[name(seed)] = result = train(jobs, before, self.start, seed)
        append_row(self._file, {'run': name(seed), 'result': result})
        print(f'{name(seed)}: {time.perf_counter() - began:.0f} s', flush=True)
    return [self._rows[name(seed)] for seed in SEEDS]


def seconds(runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
  """Medians of a step, and quartiles of neighbours' ratio, without the first two of each run."""
  taken = {arm: np.concatenate([run[arm]['seconds'][2:] for run in runs]) for arm in COLOURS}
  return {**{arm: round(float(np.median(values)), 4) for arm, values in taken.items()},
          'full / LoRA, quartiles': np.quantile(
              taken['full'] / taken['LoRA'], (0.25, 0.5, 0.75)).round(3).tolist()}


def num_bytes(start: Path) -> dict[str, dict[str, int]]:
  """Bytes of each arm's parameters and optimiser state, which are the same for both objectives."""
  found = {}
  for arm in COLOURS:
    run, _ = settings('OPO', arm, RATES['OPO'][0][arm], start)
    specs = transformer.build(run.model).specs
    optimizer = optim.make_optimizer(run.optimizer, 1, specs)
    moments = jax.eval_shape(lambda optimizer=optimizer, specs=specs: optimizer.init(
        P.trained(specs, P.init(specs, jax.random.key(0)))))
    found[arm] = {
        'trained parameters': P.num_bytes(P.trained(specs, specs)),
        'frozen parameters': P.num_bytes(P.frozen(specs, specs)),
        'optimizer state': sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moments))}
  return found


def measured(runs: list[dict[str, Any]], task: str) -> dict[str, Any]:
  """What one arm did at one rate, with intervals over seeds."""
  steps = np.array([run['steps'] for run in runs])
  first, last = steps[:, :10].mean(1), steps[:, -10:].mean(1)
  held_out = lambda name, place: np.array([run['held_out'][place][name] for run in runs])
  found = {'first ten steps': interval(first), 'last ten steps': interval(last),
           'last minus first ten': interval(last - first)}
  for name in (('validation/accuracy', 'validation/accuracy_argmax') if task == 'OPO' else
               ('validation/loss', 'validation/accuracy')):
    found[name] = {'before': interval(held_out(name, 0)), 'after': interval(held_out(name, -1)),
                   'change': interval(held_out(name, -1) - held_out(name, 0))}
  return found


def better(found: dict[float, dict[str, Any]], task: str) -> float:
  """The rate with the highest reward of the last ten steps, or the lowest held-out loss."""
  if task == 'OPO':
    return max(found, key=lambda rate: found[rate]['last ten steps']['mean'])
  return min(found, key=lambda rate: found[rate]['validation/loss']['after']['mean'])


def curve(runs: list[dict[str, Any]], task: str) -> tuple[np.ndarray, np.ndarray]:
  """(steps, values [K, n]): the mean reward of ten steps, or the held-out loss."""
  if task == 'SFT':
    return (np.array([row['step'] for row in runs[0]['held_out']]),
            np.array([[row['validation/loss'] for row in run['held_out']] for run in runs]))
  values = np.array([run['steps'] for run in runs])
  means = values.reshape(len(runs), -1, 10).mean(2)
  return 10 * np.arange(1, means.shape[1] + 1), means


def plot(runs: dict[str, dict[str, list[dict[str, Any]]]], rates: dict[str, dict[str, float]],
         path: Path) -> None:
  """Each arm at its better rate: thin lines are seeds, bands the 95 % intervals of their means."""
  figure = Figure(figsize=(9.5, 3.8), dpi=130, layout='constrained', facecolor='white')
  labels = {'OPO': 'mean reward of ten steps', 'SFT': 'held-out loss, nats a learned token'}
  for axes, (task, arms) in zip(figure.subplots(1, 2), runs.items(), strict=True):
    for arm, seeds in arms.items():
      steps, values = curve(seeds, task)
      ends = [interval(column) for column in values.T]
      mean = np.array([end['mean'] for end in ends])
      half = np.array([end['half_width_95'] or 0.0 for end in ends])
      colour = COLOURS[arm]
      axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
      axes.plot(steps, values.T, color=colour, alpha=0.35, linewidth=0.8)
      axes.plot(steps, mean, color=colour, linewidth=2, label=f'{arm}, rate {rates[task][arm]:g}')
    axes.set_title({'OPO': 'OPO on sums', 'SFT': 'SFT on sums without slips'}[task], loc='left')
    axes.set(xlabel='step', ylabel=labels[task])
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
  figure.savefig(path)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=Path, default=Path('runs/lora'))
  args = parser.parse_args()
  args.workdir.mkdir(parents=True, exist_ok=True)
  experiment = Experiment(args.workdir.resolve())
  result: dict[str, Any] = {'bytes': num_bytes(experiment.start)}
  kept: dict[str, dict[str, Any]] = {}
  chosen: dict[str, dict[str, float]] = {}
  for task, pairs in RATES.items():
    runs = [experiment.seeds(task, rates) for rates in pairs]
    result[task] = {'seconds a step': seconds([run for seeds in runs for run in seeds])}
    kept[task], chosen[task] = {}, {}
    for arm in COLOURS:
      of_arm = {rates[arm]: [run[arm] for run in seeds]
                for rates, seeds in zip(pairs, runs, strict=True)}
      found = {rate: measured(seeds, task) for rate, seeds in of_arm.items()}
      chosen[task][arm] = rate = better(found, task)
      kept[task][arm] = of_arm[rate]
      result[task][arm] = {'better rate': rate, **{f'{r:g}': m for r, m in found.items()}}
    last = {arm: curve(seeds, task)[1][:, -1] for arm, seeds in kept[task].items()}
    result[task]['LoRA minus full'] = interval(last['LoRA'] - last['full'])
  results = HERE / 'results'
  results.mkdir(exist_ok=True)
  (results / 'lora.json').write_text(json.dumps(result, indent=1) + '\n')
  plot(kept, chosen, results / 'lora.png')
  print(json.dumps(result, indent=1))


if __name__ == '__main__':
  main()
