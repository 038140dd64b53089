"""Do the steps of BitNet b1.58 2B4T's recipe (2504.12285) show in a small model?

    python experiments/bitnet_2b4t/run.py --data ../shared/data

Ternary models are trained on WikiText-2 with and without the step of the learning rate and that of
weight decay (two_stages.py), beside a twin in full precision; each kind at its own best rate. Then
a policy goes through SFT, with summed and mean loss, and DPO on PandaLM's pairs (stages.py). What
is finished is a row of runs.jsonl in the work directory, so the command may be interrupted and
repeated. Results go to results/{two_stages,stages}.{json,png}; README.md reads them.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import stages
import two_stages as arms

from jaxrl_pt.data import loader
from jaxrl_pt.scaling.seeds import append_row, finished_rows, interval

HERE = Path(__file__).parent
RESULTS = HERE / 'results'
# The first two rates that are tried; the best one tried has a worse neighbour on either side.
FIRST_RATES = {'ternary': (4e-3, 8e-3), 'full': (4e-3, 8e-3)}
KINDS = {'ternary': arms.TERNARY, 'full': arms.FULL}


class Kept:
  """Results of named runs: read if they are there, else made and appended."""

  def __init__(self, path: Path) -> None:
    self._path = path
    self._rows = {row['run']: row['result'] for row in finished_rows(path)}

  def result(self, run: str, make: Callable[[], Any]) -> Any:
    if run not in self._rows:
      self._rows[run] = made = make()
      append_row(self._path, {'run': run, 'result': made})
      print(run, json.dumps(made)[:200], flush=True)
    return self._rows[run]


def tune(kept: Kept, kind: str, num_steps: int, text: loader.Prepared) -> dict[float, float]:
  """Nats per token by rate, on the end of the validation text."""
  tried: dict[float, float] = {}
  wanted = list(FIRST_RATES[kind])
  while wanted:
    for rate in wanted:
      tried[rate] = kept.result(f'tuning {kind} {rate:g} {num_steps}', lambda rate=rate: (
          arms.tuning_loss(KINDS[kind], rate, num_steps, text)))
    best = min(tried, key=tried.__getitem__)
    wanted = [rate for rate in (best / 2, best * 2) if rate not in tried]
  return dict(sorted(tried.items()))


def summary(rows: list[dict], full: np.ndarray) -> dict[str, Any]:
  """Ends of the arms, their paired differences, the drop at the step, and codes that change."""
  end = {name: np.array([row['curve'][name][-1][1] for row in rows]) for name in arms.ARMS}
  both, none = end['both steps'], end['no step']

  def fall(name: str, place: int) -> np.ndarray:
    """How far the loss has fallen since the switch, at a marked step after it."""
    return np.array([row['at_switch'] - row['curve'][name][place][1] for row in rows])

  marked = [step for step, _ in rows[0]['curve']['no step']]
  return {
      'nats per token': {name: interval(values) for name, values in end.items()},
      'minus no step': {name: interval(values - none) for name, values in end.items()
                        if name != 'no step'},
      'effect of the rate step': interval(
          (both + end['rate step'] - end['decay step'] - none) / 2),
      'effect of the decay step': interval(
          (both + end['decay step'] - end['rate step'] - none) / 2),
      'both steps minus the better single one of each seed': interval(
          both - np.minimum(end['rate step'], end['decay step'])),
      'full precision': interval(full),
      'both steps minus full precision': interval(both - full),
      'fall since the switch, rate step minus no step': {
          step: interval(fall('rate step', i) - fall('no step', i))
          for i, step in enumerate(marked)},
      'share of codes that the last tenth changes': {
          name: interval([row['flipped'][name] for row in rows], 5) for name in arms.ARMS}}


def plot(rows: list[dict], full: np.ndarray, num_steps: int) -> None:
  """The loss after the switch minus that without steps, and the ends."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(10, 4), layout='constrained')
  left, right = figure.subplots(1, 2)
  steps = [num_steps // 2] + [step for step, _ in rows[0]['curve']['no step']]
  for index, name in enumerate(arms.ARMS):
    of = lambda row, name=name: np.array([0.0] + [
        a[1] - b[1] for a, b in zip(row['curve'][name], row['curve']['no step'], strict=True)])
    for row in rows:
      left.plot(steps, of(row), color=f'C{index}', alpha=0.35, linewidth=0.8)
    left.plot(steps, np.mean([of(row) for row in rows], 0), '.-', color=f'C{index}', label=name)
    values = [row['curve'][name][-1][1] for row in rows]
    right.plot([index] * len(values), values, 'o', color=f'C{index}', alpha=0.6)
    right.plot([index], [np.mean(values)], '_', color=f'C{index}', markersize=24)
  right.plot([len(arms.ARMS)] * len(full), full, 'o', color='0.3', alpha=0.6)
  right.plot([len(arms.ARMS)], [full.mean()], '_', color='0.3', markersize=24)
  right.set_xticks(range(len(arms.ARMS) + 1), [*arms.ARMS, 'full\nprecision'], fontsize=8)
  left.set(xlabel='step', ylabel='nats per token minus "no step"',
           title='After the switch: mean (bold) and seeds')
  right.set(ylabel='nats per token', title='End of training: seeds and means')
  left.legend(fontsize=8)
  for axes in (left, right):
    axes.grid(alpha=0.3)
  figure.savefig(RESULTS / 'two_stages.png', dpi=130)


def pretraining(kept: Kept, args: argparse.Namespace) -> None:
  """Runs the arms of two_stages.py and reports them."""
  text, apart = arms.open_text(args.data / 'text-wikitext2', args.work / 'data')
  steps = args.steps
  rates, best = {}, {}
  for kind in KINDS:
    rates[kind] = tune(kept, kind, steps, text)
    best[kind] = min(rates[kind], key=rates[kind].__getitem__)
  rows = [kept.result(f'arms {best["ternary"]:g} {steps} seed {seed}', lambda seed=seed: (
      arms.four_arms(best['ternary'], steps, seed, text))) for seed in args.seeds]
  full = np.array([kept.result(f'full {best["full"]:g} {steps} seed {seed}', lambda seed=seed: (
      arms.full_precision(best['full'], steps, seed, text))) for seed in args.seeds])
  report = {
      'command': _command(args), 'held out': apart,
      'tokens of a run': steps * arms.BATCH * arms.LENGTH,
      'nats per token by peak rate, tuning seed and text': rates,
      'summary': summary(rows, full), 'runs': rows, 'full precision runs': full.tolist()}
  (RESULTS / 'two_stages.json').write_text(json.dumps(report, indent=1) + '\n')
  plot(rows, full, steps)
  print(json.dumps(report['summary'], indent=1))


def supervised(kept: Kept, args: argparse.Namespace) -> None:
  """Runs the stages of stages.py and reports them."""
  counts = stages.write_data(args.data, args.work)
  start = kept.result(f'start {args.steps}',
                      lambda: stages.pretrain(args.data, args.work, args.steps))
  sft = {arm: [kept.result(f'sft {arm} seed {seed}',
                           lambda arm=arm, seed=seed: stages.fine_tune(args.work, arm, seed))
               for seed in args.seeds] for arm in stages.SFTS}
  dpo = [kept.result(f'dpo seed {seed}', lambda seed=seed: stages.prefer(args.work, seed))
         for seed in args.seeds]
  end = {arm: np.array([run[-1]['loss'] for run in runs]) for arm, runs in sft.items()}
  report = {
      'command': _command(args), 'data': counts, 'start': start[-1],
      'SFT, held-out nats per learned token': {
          'before': sft['mean'][0][0]['loss'],
          **{arm: interval(values) for arm, values in end.items()},
          **{f'{arm} minus mean': interval(values - end['mean'], 5)
             for arm, values in end.items() if arm != 'mean'}},
      'DPO, held-out pairs': {name: interval([run[-1][name] for run in dpo])
                              for name in ('margin', 'accuracy', 'loss', 'chosen_reward',
                                           'rejected_reward')},
      'SFT runs': sft, 'DPO runs': dpo}
  (RESULTS / 'stages.json').write_text(json.dumps(report, indent=1) + '\n')
  plot_stages(sft, dpo)
  print(json.dumps({k: v for k, v in report.items() if not k.endswith('runs')}, indent=1))


def plot_stages(sft: dict[str, list], dpo: list) -> None:
  """Held-out loss of SFT by arm, and DPO's held-out margin and accuracy, each seed."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(10, 3.6), layout='constrained')
  left, middle, right = figure.subplots(1, 3)
  for index, (arm, runs) in enumerate(sft.items()):
    for run in runs:
      left.plot([row['step'] for row in run], [row['loss'] for row in run], '.-',
                color=f'C{index}', alpha=0.7, label=arm if run is runs[0] else None)
  for run in dpo:
    steps = [row['step'] for row in run]
    middle.plot(steps, [row['margin'] for row in run], '.-', color='C0', alpha=0.7)
    # Before the first step all rewards are 0, and no pair is ordered.
    right.plot(steps[1:], [row['accuracy'] for row in run[1:]], '.-', color='C0', alpha=0.7)
  middle.axhline(0, color='0.6', linewidth=1)
  right.axhline(0.5, color='0.6', linewidth=1)
  left.set(xlabel='step', ylabel='nats per learned token', title='SFT, held-out answers')
  middle.set(xlabel='step', ylabel='margin of rewards', title='DPO, held-out pairs')
  right.set(xlabel='step', ylabel='accuracy', title='DPO, held-out pairs',
            xlim=middle.get_xlim())
  left.legend(fontsize=8)
  for axes in (left, middle, right):
    axes.grid(alpha=0.3)
  figure.savefig(RESULTS / 'stages.png', dpi=130)


def _command(args: argparse.Namespace) -> str:
  return (f'python experiments/bitnet_2b4t/run.py --data DIR --steps {args.steps} --seeds '
          + ' '.join(map(str, args.seeds)))


PARTS = {'pretraining': pretraining, 'supervised': supervised}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', type=Path, required=True,
                      help='folder of text-wikitext2 and pref-pandalm')
  parser.add_argument('--work', type=Path, default=Path('runs/bitnet_2b4t'))
  parser.add_argument('--steps', type=int, default=160)
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--part', choices=PARTS, nargs='+', default=list(PARTS))
  args = parser.parse_args()
  args.work.mkdir(parents=True, exist_ok=True)
  RESULTS.mkdir(exist_ok=True)
  jax.config.update('jax_compilation_cache_dir', str((args.work / 'compiled').absolute()))
  kept = Kept(args.work / 'runs.jsonl')
  for part in args.part:
    PARTS[part](kept, args)


if __name__ == '__main__':
  main()
