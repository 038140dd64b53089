"""Judges that reason, judges that do not, and what tournaments make of their verdicts.

    python experiments/rrm/run.py [--workdir runs/rrm] [--workers 2] [--only judge/reasoning]

Each part is one process without others beside it, so that parts can be spread over many cores; what
is finished is a row of runs.jsonl in the work directory, and the command may be repeated.

    simulated/ACCURACY         a judge of known accuracy chooses the best of 8 (base rate 0.3)
    judge/ARM/STEPS/SEED       a judge of sums of STEPS steps modulo 10, by `jaxrl-pt train` of the
                               shipped tiny files: fine-tuned from random parameters, reinforced.
                               Arms: reasoning; direct, which states its verdict at once; biased, a
                               reasoning one that in training always sees the better result first

A judge is measured on held-out sums in both orders, before and after reinforcement: accuracy, swap
consistency, how often the first place wins, tokens of a response. A reasoning judge then chooses
among 8 results of each sum, of which 30 % are right, by knockout and round robin with 1 and 5
votes; a simulated judge of the same accuracy, whose votes are independent, stands beside it. A
reward model learns from the same pairs. Writes results/rrm.json and rrm.png.
"""

import argparse
from collections.abc import Sequence
import json
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import numpy as np

from jaxrl_pt.scaling.seeds import append_row, finished_rows, interval

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SEEDS = (0, 1, 2)
ACCURACIES = (0.6, 0.7, 0.8, 0.9)
ARMS = {'reasoning': (1, 2, 3, 4), 'direct': (1, 2, 3, 4), 'biased': (3,)}
# Share of queries whose chosen candidate is right, for n = 8 and base rate 0.3: accuracy → knockout
# and round robin with one vote, the same with five.
EXPECTED = {0.6: (0.45, 0.47, 0.54, 0.64), 0.7: (0.58, 0.66, 0.79, 0.87),
            0.8: (0.73, 0.81, 0.88, 0.91), 0.9: (0.84, 0.90, 0.95, 0.95)}
WAYS = [(method, votes) for votes in (1, 5) for method in ('knockout', 'round_robin')]
NUM_CANDIDATES, BASE_RATE, NUM_QUERIES = 8, 0.3, 100


def parts() -> list[str]:
  """The names of all parts."""
  return [*(f'simulated/{p:g}' for p in ACCURACIES),
          *(f'judge/{arm}/{k}/{seed}' for seed in SEEDS for arm, steps in ARMS.items()
            for k in steps)]


# --- Simulated judges ---------------------------------------------------------------


def chosen_right(right_QN: np.ndarray, accuracy: float, seed: int) -> dict[str, list[float]]:
  """Whether the chosen candidate is right, for each way to choose, by a simulated judge."""
  from jaxrl_pt.verifiers import tournament
  rng = np.random.default_rng([seed, 7])
  found = {}
  for method, votes in WAYS:
    def judge(games: np.ndarray, votes: int = votes) -> np.ndarray:
      first, second = (right_QN[games[:, 0], games[:, i]] for i in (1, 2))
      chance = np.where(first == second, 0.5, np.where(first, accuracy, 1 - accuracy))
      return (rng.random((len(games), votes)) >= chance[:, None]).astype(np.int8)

    run = getattr(tournament, method)
    ended = run([right_QN.shape[1]] * len(right_QN), judge)
    found[f'{method} {votes}'] = [float(right_QN[q, end.winner]) for q, end in enumerate(ended)]
  return found


def simulated(accuracy: float) -> dict[str, Any]:
  """The table of EXPECTED at one accuracy, with standard errors."""
  num = 1000
  right = np.random.default_rng(11).random((num, NUM_CANDIDATES)) < BASE_RATE
  found = chosen_right(right, accuracy, 0)
  rows = {}
  for (name, values), expected in zip(found.items(), EXPECTED[accuracy], strict=True):
    mean, error = float(np.mean(values)), (expected * (1 - expected) / num) ** 0.5
    rows[name] = {'mean': mean, 'expected': expected, 'standard_errors': (mean - expected) / error}
  return {'of_an_oracle': float(right.any(1).mean()), **rows}


# --- Trained judges -----------------------------------------------------------------


def train(name: str, workdir: Path, bindings: Sequence[str]) -> None:
  """Runs `jaxrl-pt train` on gin/run/<name>.gin; a finished run is left as it is."""
  flags = [word for b in bindings for word in ('--gin_bindings', f'cfg.{b}')]
  command = [sys.executable, '-m', 'jaxrl_pt.main', 'train', '--gin_file',
             str(ROOT / 'gin' / 'run' / f'{name}.gin'), '--workdir', str(workdir), *flags]
  workdir.parent.mkdir(parents=True, exist_ok=True)
  with open(workdir.with_suffix('.log'), 'a') as log:
    subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def judge(root: Path, arm: str, num_steps: int, seed: int, short: int) -> dict[str, Any]:
  """Trains one judge and measures it."""
  direct = '_direct' if arm == 'direct' else ''
  own = [f'RedundantChecks.min_steps = {num_steps}', f'RedundantChecks.max_steps = {num_steps}',
         f'Run.seed = {seed}', 'Train.tensorboard = False']
  if arm == 'biased':
    own.append("JudgePairs.order = 'better_first'")
  if short:
    own.append(f'Train.num_steps = {short}')
  start, final = (root / f'{arm}-{num_steps}-{seed}' / name for name in ('start', 'judge'))
  train(f'warmstart_judge{direct}_tiny', start, own)
  lengths = [] if direct else [f'Rollouts.response_tokens = {4 * num_steps + 3}']
  train(f'rrm{direct}_tiny', final, [
      *own, f"RL.start_from = '{start}'", f'Rollouts.prompt_len = {num_steps + 13}', *lengths])
  found = {'before': measured(start, final, num_steps), 'after': measured(final, final, num_steps)}
  if arm == 'reasoning':
    found['selection'] = selected(final, num_steps)
    model = root / f'{arm}-{num_steps}-{seed}' / 'reward_model'
    train('reward_model_judge_tiny', model, [*own, f"RewardModel.start_from = '{start}'"])
    found['reward_model'] = reward_model(model)
  return found


def opened(workdir: Path, shown_as: Path, num_slots: int = 64) -> Any:
  """The judge in a work directory, asked as the run `shown_as` asks."""
  from jaxrl_pt import config as cfg
  from jaxrl_pt.environments import judging
  from jaxrl_pt.run.policy import load_policy, open_run
  source = open_run(shown_as, None, cfg.Mesh()).run.objective.problems.source
  policy = load_policy(workdir)
  speaker = judging.of_policy(policy, source.prompt, cfg.Sampler(), 32, is_direct=False)
  return judging.make(policy, speaker, judging.engine_config(speaker, 48, num_slots), 5)


def queries(num_steps: int, num: int) -> list[tuple[str, int]]:
  """Held-out sums and their results."""
  from jaxrl_pt import config as cfg
  from jaxrl_pt.data import generated, pack
  source = cfg.RedundantChecks(20000, num_steps, num_steps, 0)
  sums: dict[str, int] = {}
  for number in range(source.size):
    problem = generated.problem(source, number)
    if pack.hold_out(problem.prompt) < 0.2:
      sums[problem.prompt] = int(problem.answer)
  return list(sums.items())[:num]


def measured(workdir: Path, shown_as: Path, num_steps: int) -> dict[str, Any]:
  """Accuracy, swap consistency and lengths on held-out pairs, one vote in each order."""
  from jaxrl_pt.evaluation.judging import Asking, Row, judge_pairs
  rng = np.random.default_rng(1)
  rows = [Row('', query, (str(answer), str((answer + int(rng.integers(1, 10))) % 10)), {})
          for query, answer in queries(num_steps, 4 * NUM_QUERIES)]
  found, _ = judge_pairs(opened(workdir, shown_as), rows, Asking(1, both_orders=True), 0)
  return {name: value['mean'] if isinstance(value, dict) else value
          for name, value in found['all'].items()}


def selected(workdir: Path, num_steps: int) -> dict[str, Any]:
  """The best of 8 results by the judge, and by simulated ones of its accuracy."""
  from jaxrl_pt.verifiers import tournament
  rng = np.random.default_rng(3)
  asked = queries(num_steps, NUM_QUERIES)
  right = rng.random((len(asked), NUM_CANDIDATES)) < BASE_RATE
  texts = [[str(answer if is_right else (answer + int(rng.integers(1, 10))) % 10)
            for is_right in row] for (_, answer), row in zip(asked, right, strict=True)]
  judge = opened(workdir, workdir)
  found: dict[str, Any] = {'base_rate': float(right.mean()),
                           'of_an_oracle': float(right.any(1).mean())}
  for method, votes in WAYS:
    asks = judge.of_candidates([query for query, _ in asked], texts, votes)
    ended = getattr(tournament, method)([NUM_CANDIDATES] * len(asked), asks)
    found[f'{method} {votes}'] = {
        'accuracy': float(np.mean([right[q, end.winner] for q, end in enumerate(ended)])),
        'comparisons': float(np.mean([end.num_comparisons for end in ended]))}
  pair = measured(workdir, workdir, num_steps)['accuracy']
  independent = chosen_right(np.repeat(right, 10, 0), pair, 1)
  found['simulated'] = {name: float(np.mean(values)) for name, values in independent.items()}
  return found


def reward_model(workdir: Path) -> float:
  """The accuracy of a reward model on its held-out pairs."""
  from jaxrl_pt.jobs import open as jobs
  return float(jobs.evaluate_workdir(workdir)['accuracy'])


# --- All parts ----------------------------------------------------------------------


def run_part(name: str, root: Path, short: int) -> None:
  """Runs one part in this process and keeps its row."""
  began = time.perf_counter()
  match name.split('/'):
    case ['simulated', accuracy]:
      result = simulated(float(accuracy))
    case [_, arm, num_steps, seed]:
      result = judge(root, arm, int(num_steps), int(seed), short)
    case _:
      raise SystemExit(f'no part {name!r}')
  append_row(root / 'runs.jsonl', {'part': name, 'steps': short, 'result': result,
                                   'seconds': round(time.perf_counter() - began, 1)})


def run_all(names: Sequence[str], root: Path, workers: int, short: int) -> None:
  """Runs parts in processes of their own, `workers` at a time."""
  running: dict[str, subprocess.Popen[bytes]] = {}
  waiting = list(names)
  while waiting or running:
    while waiting and len(running) < workers:
      name = waiting.pop(0)
      running[name] = subprocess.Popen([
          sys.executable, __file__, '--workdir', str(root), '--part', name, '--steps', str(short)])
    for name, process in list(running.items()):
      if process.poll() is not None:
        del running[name]
        print(f'{name}: {"done" if process.returncode == 0 else "FAILED"}', flush=True)
    time.sleep(0.2)


def summary(rows: dict[str, Any]) -> dict[str, Any]:
  """Intervals over seeds."""
  found: dict[str, Any] = {name.split('/')[1]: row for name, row in rows.items()
                           if name.startswith('simulated/')}
  result: dict[str, Any] = {'simulated': found, 'judges': {}}
  for arm, steps in ARMS.items():
    for k in steps:
      seeds = [rows[f'judge/{arm}/{k}/{s}'] for s in SEEDS if f'judge/{arm}/{k}/{s}' in rows]
      if not seeds:
        continue
      of = lambda get, seeds=seeds: interval([get(row) for row in seeds])
      entry = {f'{name} {when}': of(lambda row, name=name, when=when: row[when][name])
               for when in ('before', 'after')
               for name in ('accuracy', 'swap_consistency', 'first_rate', 'tokens', 'no_verdict')}
      if arm == 'reasoning':
        entry['reward_model accuracy'] = of(lambda row: row['reward_model'])
        for way in (f'{m} {v}' for m, v in WAYS):
          entry[f'best of 8, {way}'] = of(lambda row, way=way: row['selection'][way]['accuracy'])
          entry[f'best of 8, {way}, simulated'] = of(
              lambda row, way=way: row['selection']['simulated'][way])
      result['judges'][f'{arm} k={k}'] = entry
  return result


def plot(result: dict[str, Any], path: Path) -> None:
  """Accuracy and length by number of steps, and choices beside those of independent votes."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(11, 3.6), dpi=130, layout='constrained', facecolor='white')
  accuracy, tokens, best = figure.subplots(1, 3)
  for arm, colour in (('reasoning', '#0072B2'), ('direct', '#D55E00')):
    shown = [(k, result['judges'][f'{arm} k={k}']) for k in ARMS[arm]
             if f'{arm} k={k}' in result['judges']]
    for axes, name in ((accuracy, 'accuracy after'), (tokens, 'tokens after')):
      axes.errorbar([k for k, _ in shown], [row[name]['mean'] for _, row in shown],
                    [row[name]['half_width_95'] for _, row in shown], color=colour, marker='o',
                    capsize=3, label=arm)
  accuracy.axhline(0.5, color='grey', linewidth=0.8, linestyle=':')
  accuracy.set(xlabel='steps of the sum', ylabel='accuracy of verdicts', title='held-out pairs')
  tokens.set(xlabel='steps of the sum', ylabel='tokens of a response', title='thinking')
  for k, row in ((k, result['judges'].get(f'reasoning k={k}')) for k in ARMS['reasoning']):
    if row:
      means = lambda end, row=row: [row[f'best of 8, {m} {v}{end}']['mean'] for m, v in WAYS]
      best.plot(means(', simulated'), means(''), 'o', label=f'k = {k}')
  best.plot([0.2, 1], [0.2, 1], color='grey', linewidth=0.8)
  best.set(xlabel='independent votes of equal accuracy', ylabel='the judge', title='best of 8')
  for axes in (accuracy, tokens, best):
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
  figure.savefig(path)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=Path, default=Path('runs/rrm'))
  parser.add_argument('--workers', type=int, default=2)
  parser.add_argument('--only', default='', help='beginnings of names of parts, with commas')
  parser.add_argument('--steps', type=int, default=0, help='shorter training, to try the script')
  parser.add_argument('--part', help='run one part in this process')
  args = parser.parse_args()
  root = args.workdir.resolve()
  root.mkdir(parents=True, exist_ok=True)
  if args.part:
    run_part(args.part, root, args.steps)
    return
  done = lambda: {row['part']: row['result'] for row in finished_rows(root / 'runs.jsonl')
                  if row['steps'] == args.steps}
  begins = tuple(args.only.split(','))
  kept = done()
  run_all([name for name in parts() if name.startswith(begins) and name not in kept], root,
          args.workers, args.steps)
  result = summary(done())
  if not args.steps and not args.only:
    (HERE / 'results').mkdir(exist_ok=True)
    (HERE / 'results' / 'rrm.json').write_text(json.dumps(result, indent=1) + '\n')
    plot(result, HERE / 'results' / 'rrm.png')
  print(json.dumps(result, indent=1))


if __name__ == '__main__':
  main()
