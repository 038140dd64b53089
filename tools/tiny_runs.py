"""The numbers of every tiny run, to be compared bit for bit before and after a change of code.

    python tools/tiny_runs.py before.json        # at the commit before
    python tools/tiny_runs.py after.json         # at the commit after, with the same --starts
    python tools/tiny_runs.py --compare before.json after.json

Each gin/run/*_tiny.gin is run for a few steps, the reinforced ones from the policies in --starts,
which are trained where they are missing (some minutes). What is kept is every metric of every
step but the times; two commits that compute the same have the same text. Only numbers of one
machine can be compared: another processor adds up in another order. XLA_FLAGS of
tests/xla_flags.py halve the time, in both commits alike.
"""

import argparse
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time
from typing import Any

from jaxrl_pt import metrics

ROOT = Path(__file__).resolve().parents[1]
STARTS = ('pretrain_tiny', 'warmstart_arithmetic_tiny', 'warmstart_redundant_checks_tiny',
          'warmstart_gym_tiny', 'warmstart_judge_tiny', 'warmstart_judge_direct_tiny')
# Metrics that tell the time.
TIMES = ('seconds', 'per_second', 'goodput', 'mfu')
SHORT = ('Train.eval_every = 3', 'Checkpoint.every = 3', 'Train.log_every = 1',
         'Train.tensorboard = False')
PRETRAINED = ('Train.num_steps = 6', 'WSD.warmup_steps = 1', 'Train.eval_batches = 2')
REINFORCED = ('Train.num_steps = 3',)
MEASURED = ('opo_tiny', 'opo_gym_tiny')


def names() -> list[str]:
  """The tiny runs, those first that the others start from."""
  found = {p.stem for p in (ROOT / 'gin' / 'run').glob('*_tiny.gin')}
  return [*STARTS, *sorted(found - set(STARTS))]


def train(name: str, workdir: Path, bindings: tuple[str, ...], cwd: Path) -> None:
  """Runs `jaxrl-pt train` on gin/run/<name>.gin.

  Raises:
    SystemExit: it failed; what it said stands in <workdir>.log.
  """
  flags = [word for b in bindings for word in ('--gin_bindings', f'cfg.{b}')]
  command = [sys.executable, '-m', 'jaxrl_pt.main', 'train',
             '--gin_file', str(ROOT / 'gin' / 'run' / f'{name}.gin'), *flags,
             '--workdir', str(workdir)]
  log = workdir.with_suffix('.log')
  log.parent.mkdir(parents=True, exist_ok=True)
  with log.open('w') as out:
    code = subprocess.run(command, cwd=cwd, stdout=out, stderr=subprocess.STDOUT,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=False).returncode
  if code:
    sys.exit(f'{name} ended with {code}:\n{log.read_text()[-2000:]}')


def bindings(name: str) -> tuple[str, ...]:
  """What shortens a run. Of those on problems two measure what they hold out: to compile its
  sampler takes longer than the steps do."""
  if name in STARTS:
    return (*SHORT, *PRETRAINED)
  if name.startswith(('rpt', 'rlp')):
    return (*SHORT, *REINFORCED, 'RPT.eval_positions = 64')
  if name in MEASURED:
    return (*SHORT, *REINFORCED, 'RL.eval_problems = 32')
  return (*SHORT, *REINFORCED, 'Problems.held_out = 0.0')


def rows(workdir: Path) -> list[dict[str, float]]:
  """The rows of a run without its times."""
  return [{k: v for k, v in row.items() if not k.endswith(TIMES)}
          for row in metrics.read_rows(workdir / metrics.FILE)]


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
  """What differs, in words."""
  found = [f'{name}: only in one of the two' for name in before.keys() ^ after.keys()]
  for name in sorted(before.keys() & after.keys()):
    for old, new in zip(before[name], after[name], strict=True):
      found += [f'{name}, step {old["step"]:g}: {k} {old.get(k)!r}, now {new.get(k)!r}'
                for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
  return found


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('files', type=Path, nargs='+', help='one to write, or two to compare')
  parser.add_argument('--compare', action='store_true')
  parser.add_argument('--starts', type=Path, default=Path('runs/tiny_runs'))
  parser.add_argument('--only', nargs='*', help='names of runs')
  args = parser.parse_args()
  if args.compare:
    found = compare(*(json.loads(path.read_text()) for path in args.files))
    print('\n'.join(found) or 'every number is the same')
    return bool(found)

  starts, results = args.starts.resolve(), {}
  for name in STARTS:
    if not (starts / 'runs' / name / 'checkpoints').is_dir():
      print(f'training {name} to start from', flush=True)
      train(name, starts / 'runs' / name, ('Train.tensorboard = False',), starts)
  for name in names() if args.only is None else args.only:
    began, workdir = time.monotonic(), starts / 'short' / name
    shutil.rmtree(workdir, ignore_errors=True)
    train(name, workdir, bindings(name), starts)
    results[name] = rows(workdir)
    args.files[0].write_text(json.dumps(results, indent=1) + '\n')
    print(f'{name}: {len(results[name])} rows, {time.monotonic() - began:.0f} s', flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
