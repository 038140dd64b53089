"""Judges that reason, judges that do not, and what tournaments make of their verdicts.

    python experiments/rrm/run.py [--workdir runs/rrm] [--workers 2] [--only judge/reasoning]

Each part is one process without others beside it, so that parts can be spread over many cores; what
is finished is a row of runs.jsonl in the work directory, and the command may be repeated.

    simulated/ACCURACY         a judge of known accuracy chooses the best of 8 (base rate 0.3)
    judge/ARM/STEPS/SEED       a judge of sums of STEPS steps modulo 10, by `jaxrl-pt train` of the
                               shipped tiny files: fine-tuned from random parameters, reinforced

Arms: `reasoning`; `direct`, which states its verdict at once; `biased`, which starts from the
fine-tuned reasoning judge and in reinforcement always sees the better result first.

A judge is measured (measure.py) before and after reinforcement. At one step there are 100 sums in
all, and a judge cannot know the table entry of one that it has never seen, so that sums of training
are asked too, as `seen`. A reward model learns from the same pairs as the reasoning judge. Writes
results/rrm.json and rrm.png; `--report` runs nothing and does only that.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import jax
import measure
from report import plot, summary

from jaxrl_pt import config as cfg
from jaxrl_pt.environments.judging import EngineJudge, Judged
from jaxrl_pt.jobs import open as jobs
from jaxrl_pt.scaling import runs
from jaxrl_pt.scaling.seeds import append_row, finished_rows
from jaxrl_pt.serving.comparing import Shown

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
NUM_PAIRS = 180
# Sums of one step are too few to choose among their results.
SELECTING = (3,)
ARMS = {'reasoning': (3, 1), 'direct': (3, 1), 'biased': (3,)}


def parts() -> list[str]:
  """The names of all parts; a biased judge starts from what a reasoning one leaves."""
  return [*(f'simulated/{accuracy:g}' for accuracy in measure.EXPECTED),
          *(f'judge/{arm}/{k}/{seed}' for seed in SEEDS for arm, steps in ARMS.items()
            for k in steps)]


# --- One part -----------------------------------------------------------------------


def train(name: str, workdir: Path, bindings: Sequence[str]) -> None:
  """Runs gin/run/<name>.gin; a finished run is left as it is."""
  runs.train(f'gin/run/{name}.gin', workdir, [f'cfg.{binding}' for binding in bindings])


def judge(root: Path, arm: str, num_steps: int, seed: int, short: int) -> dict[str, Any]:
  """Trains one judge and measures it."""
  direct = '_direct' if arm == 'direct' else ''
  own = [f'RedundantChecks.min_steps = {num_steps}', f'RedundantChecks.max_steps = {num_steps}',
         f'Run.seed = {seed}']
  if short:
    own.append(f'Train.num_steps = {short}')
  fine_tuned = 'reasoning' if arm == 'biased' else arm
  start = root / f'{fine_tuned}-{num_steps}-{seed}' / 'start'
  final = root / f'{arm}-{num_steps}-{seed}' / 'judge'
  train(f'warmstart_judge{direct}_tiny', start, own)
  before = measure.opened(start, num_steps)
  found = {'before': asked(before, num_steps)[0]}
  lengths = [] if direct else [f'Rollouts.response_tokens = {4 * num_steps + 3}']
  train(f'rrm{direct}_tiny', final, [
      *own, f"RL.start_from = '{start}'", f'Rollouts.prompt_len = {num_steps + 13}', *lengths,
      *(["JudgePairs.order = 'better_first'"] if arm == 'biased' else [])])
  after = measure.opened(final, num_steps)
  found['after'], shown, judged = asked(after, num_steps)
  if arm == 'reasoning' and num_steps in SELECTING:
    found['caps'] = {most: measure.capped(after, shown, judged, most)
                     for most in range(0, 4 * num_steps + 1, 2)}
    found['selection'] = measure.selected(after, num_steps, found['after']['accuracy'])
    model = root / f'{arm}-{num_steps}-{seed}' / 'reward_model'
    train('reward_model_judge_tiny', model, [*own, f"RewardModel.start_from = '{start}'"])
    found['reward_model'] = float(jobs.evaluate_workdir(model)['accuracy'])
  return found


def asked(judge: EngineJudge, num_steps: int) -> tuple[dict[str, Any], list[Shown], Judged]:
  """The measures of a judge on held-out sums, and what it has said.

  Within are those at the paper's temperature as `cool`, and those of sums of training as `seen`.
  """
  pairs = measure.pairs(num_steps, NUM_PAIRS)
  found, shown, judged = measure.measured(judge, pairs)
  cool = EngineJudge(judge.engine, dataclasses.replace(judge.speaker, sampler=cfg.Sampler(0.6)))
  seen = measure.pairs(num_steps, NUM_PAIRS, held_out=False)
  return {**found, 'cool': measure.measured(cool, pairs)[0],
          'seen': measure.measured(judge, seen)[0]}, shown, judged


# --- All parts ----------------------------------------------------------------------


def run_part(name: str, root: Path, short: int) -> None:
  """Runs one part in this process and keeps its row."""
  began = time.perf_counter()
  match name.split('/'):
    case ['simulated', accuracy]:
      result = measure.simulated(float(accuracy))
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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=Path, default=Path('runs/rrm'))
  parser.add_argument('--workers', type=int, default=2)
  parser.add_argument('--only', default='', help='beginnings of names of parts, with commas')
  parser.add_argument('--steps', type=int, default=0, help='shorter training, to try the script')
  parser.add_argument('--part', help='run one part in this process')
  parser.add_argument('--report', action='store_true', help='of what is there')
  args = parser.parse_args()
  root = args.workdir.resolve()
  root.mkdir(parents=True, exist_ok=True)
  # Seeds run the programs of the first one, and processes those of one another.
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(root / 'compiled')
  jax.config.update('jax_compilation_cache_dir', str(root / 'compiled'))
  if args.part:
    run_part(args.part, root, args.steps)
    return
  done = lambda: {row['part']: row['result'] for row in finished_rows(root / 'runs.jsonl')
                  if row['steps'] == args.steps}
  begins = tuple(args.only.split(','))
  kept = done()
  if not args.report:
    run_all([name for name in parts() if name.startswith(begins) and name not in kept], root,
            args.workers, args.steps)
  result = summary(done())
  if not args.steps and not args.only:
    (HERE / 'results' / 'rrm.json').write_text(json.dumps(result, indent=1) + '\n')
    plot(result, HERE / 'results' / 'rrm.png')
  print(json.dumps(result, indent=1))


if __name__ == '__main__':
  main()
