"""Makes deliberate mistakes one by one and runs the nearest tests: `python tools/mutate.py`.

Each mistake of `mutations.py` is made in a copy of the tree in a temporary directory, never in
the checkout, and taken back after its tests have run:

    killed     its tests fail, which must pass without it: run `make test` first
    survived   they pass: nothing would notice the mistake
    broken     the text to replace does not stand in the file exactly once, or the tests could
               not be run

Ends with 1 if a mistake is broken or fewer than 95 % are killed. It takes an hour or more on two
cores: `--only NAME …` runs those (or all whose names begin so), `--list` runs none, `--json OUT`
writes the table.
"""

import argparse
from collections import Counter
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutations import MUTATIONS, Mutation  # the directory of this file is no package

ROOT = Path(__file__).resolve().parents[1]
LEAST_KILLED = 0.95
SECONDS = 1200.0  # a mistake that hangs is killed too
_FAILED, _PASSED = 1, 0  # pytest's exit codes


class Result(NamedTuple):
  """What became of one mistake."""

  name: str
  path: str
  tests: str
  outcome: str
  seconds: float
  detail: str


def copy_tree(destination: Path) -> None:
  """Every file that the checkout tracks or would, and the way to the data beside it."""
  listed = subprocess.run(['git', 'ls-files', '-coz', '--exclude-standard'], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout
  for name in filter(None, listed.split('\0')):
    if (ROOT / name).is_file():
      (destination / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, destination / name)
  shared = ROOT.parent / 'shared'
  if shared.exists():
    (destination.parent / 'shared').symlink_to(shared.resolve())


def count(mutation: Mutation, root: Path = ROOT) -> int:
  """How often the text to replace stands in its file."""
  return (root / mutation.path).read_text(encoding='utf-8').count(mutation.find)


def run(mutation: Mutation, tree: Path) -> Result:
  """Makes one mistake in the copy, runs its tests, and takes it back."""
  file, started = tree / mutation.path, time.monotonic()
  right = file.read_text(encoding='utf-8')
  found = count(mutation, tree)
  if found != 1:
    return Result(*mutation[:2], mutation.tests, 'broken', 0.0, f'stands there {found} times')
  file.write_text(right.replace(mutation.find, mutation.replace), encoding='utf-8')
  try:
    outcome, detail = _tested(mutation.tests, tree)
  finally:
    file.write_text(right, encoding='utf-8')
  return Result(mutation.name, mutation.path, mutation.tests, outcome,
                round(time.monotonic() - started, 1), detail)


def _tested(tests: str, tree: Path) -> tuple[str, str]:
  environment = {**os.environ, 'PYTHONPATH': str(tree), 'PYTHONDONTWRITEBYTECODE': '1'}
  command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', *tests.split()]
  try:
    done = subprocess.run(command, cwd=tree, env=environment, timeout=SECONDS, check=False,
                          capture_output=True, text=True)
  except subprocess.TimeoutExpired:
    return 'killed', 'hung'
  if done.returncode == _PASSED:
    return 'survived', ''
  failed = [line for line in done.stdout.splitlines() if line.startswith('FAILED')]
  if done.returncode == _FAILED and failed:
    return 'killed', failed[0].removeprefix('FAILED ').split(' - ')[0]
  return 'broken', (done.stdout + done.stderr).strip()[-300:]


def chosen(*names: str) -> list[Mutation]:
  """The mistakes of these names, or whose names begin so; all without."""
  found: list[Mutation] = []
  for name in names:
    begun = [m for m in MUTATIONS if m.name.startswith(name)]
    if not begun:
      sys.exit(f'No mistake is named {name!r}: see --list.')
    found += [m for m in begun if m.name == name] or begun
  return found or list(MUTATIONS)


def main() -> int:
  """The command; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', metavar='NAME', nargs='+', default=[])
  parser.add_argument('--list', action='store_true')
  parser.add_argument('--json', metavar='OUT', type=Path)
  arguments = parser.parse_args()
  mutations = chosen(*arguments.only)
  if arguments.list:
    for m in mutations:
      print(f'{m.name:36} {m.path:36} {m.tests}')
    return 0
  results: list[Result] = []
  with tempfile.TemporaryDirectory() as directory:
    tree = Path(directory) / 'tree'
    copy_tree(tree)
    for mutation in mutations:
      result = run(mutation, tree)
      results.append(result)
      print(f'{result.outcome:9} {result.seconds:7.1f} s  {result.name:36} {result.detail}',
            flush=True)
      if arguments.json:
        arguments.json.write_text(json.dumps([r._asdict() for r in results], indent=1) + '\n',
                                  encoding='utf-8')
  counts = Counter(result.outcome for result in results)
  share = counts['killed'] / len(results)
  print(f'{len(results)} mistakes: {dict(counts)}, {share:.1%} killed')
  return int(share < LEAST_KILLED or counts['broken'] > 0)


if __name__ == '__main__':
  sys.exit(main())
