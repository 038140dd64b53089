"""Reads the TPU compiler's final schedule: how many cycles a program takes to issue.

libtpu writes a file with one VLIW bundle in each line (`*-final_bundles.txt`) and a file that says
how many slots of each unit every bundle fills (`*-final_hlo-static-per-bundle-utilization.txt`). A
bundle issues in one cycle, so

    issue cycles = Σ over bundles of the number of times that the bundle runs,

where the trips of a loop are read from the compiler's `loop exit test`. Both sides of a branch
count, waiting for memory does not, and a loop whose bound is known only at run time has the trips
that the caller names, or one. This is a static prediction and not a measured time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
import itertools
import math
from pathlib import Path
import re

_BUNDLE = re.compile(r'^ *(?:0x[0-9a-f]+|0) *(?:LB|LH|LE|PB|PF|CT)?: ')
_REGION = re.compile(r'Start(?:/End empty)? region (\d+)')
_BRANCH = re.compile(r'sbr\.rel(?: \(!?%(\w+)\))? target = \$region(\d+)')
_EXIT = re.compile(r'%(p\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%\w+\), )?%\w+, (\d+) '
                   r'/\* loop exit test \*/')
_STAGE = re.compile(r'iteration index, stage = (\d+)')
# This many bundles after a taken branch still run.
DELAY_SLOTS = 4


@dataclass(frozen=True)
class Loop:
  """A loop of the schedule."""

  first: int  # number of its first bundle
  last: int  # number of its last bundle
  trips: int  # how often it runs each time it is entered
  dynamic: bool  # whether its bound is known only at run time


@dataclass(frozen=True)
class Schedule:
  """The final schedule of a computation.

  dynamic_loops: the number of loops whose bound is known only at run time.
  slots: the share of each unit's issue slots that is filled, over all issue cycles.
  """

  name: str
  num_bundles: int
  issue_cycles: int
  dynamic_loops: int
  slots: dict[str, float]


def read(name: str, bundles: str, utilization: str,
         dynamic_trips: Sequence[int] = ()) -> Schedule:
  """The schedule that the compiler's two texts describe.

  Args:
    name: the computation's name.
    bundles: the text of `*-final_bundles.txt`.
    utilization: the text of `*-final_hlo-static-per-bundle-utilization.txt`.
    dynamic_trips: the trips of the loops whose bound is known only at run time, in the order in
      which these end; further loops count once.

  Raises:
    ValueError: the two texts do not have the same number of bundles.
  """
  lines = list(_bundles(bundles))
  loops = _loops(lines, dynamic_trips)
  runs = _runs(lines, loops)
  units, capacity, used = _utilization(utilization)
  if len(used) != len(lines):
    raise ValueError(f'{name}: {len(lines)} bundles but {len(used)} rows of utilization')
  issue_cycles = sum(runs)
  slots = {
      unit: sum(n * row[i] for n, row in zip(runs, used, strict=True)) / (issue_cycles * room)
      for i, (unit, room) in enumerate(zip(units, capacity, strict=True))}
  return Schedule(name, len(lines), round(issue_cycles),
                  sum(loop.dynamic for loop in loops), slots)


def read_dump(directory: Path, dynamic_trips: Sequence[int] = ()) -> list[Schedule]:
  """The schedules of all computations in a dump, except the start and end of every program."""
  schedules = []
  for path in sorted(directory.glob('*-final_bundles.txt')):
    match = re.fullmatch(r'(\d+-(.+))-\d+-final_bundles\.txt', path.name)
    if not match or 'schedule-analysis' in path.name:
      continue
    stem, name = match.groups()
    if name == 'TLP' or name.startswith('<late-'):
      continue
    rows = [p for p in directory.iterdir() if re.fullmatch(
        re.escape(stem) + r'-\d+-final_hlo-static-per-bundle-utilization\.txt', p.name)]
    schedules.append(read(name, path.read_text(), rows[0].read_text(),
                          dynamic_trips))
  return schedules


def _bundles(text: str) -> Iterator[str]:
  """Yields the text of each bundle, whose comments may run over several lines."""
  current: list[str] = []
  for line in text.splitlines():
    if _BUNDLE.match(line):
      if current:
        yield '\n'.join(current)
      current = [line]
    elif current:
      current.append(line)
  if current:
    yield '\n'.join(current)


def _loops(lines: list[str], dynamic_trips: Sequence[int]) -> list[Loop]:
  """The loops, each of which ends with a branch back to a region that began earlier."""
  starts: dict[str, int] = {}
  tests: dict[str, int] = {}
  loops = []
  named = iter(dynamic_trips)
  for index, line in enumerate(lines):
    for region in _REGION.findall(line):
      starts.setdefault(region, index)
    for predicate, bound in _EXIT.findall(line):
      tests[predicate] = int(bound)
    for predicate, target in _BRANCH.findall(line):
      if starts.get(target, index + 1) <= index:
        last = min(index + DELAY_SLOTS, len(lines) - 1)
        known = predicate in tests
        trips = tests[predicate] if known else next(named, 1)
        loops.append(Loop(starts[target], last, trips, not known))
  return loops


def _runs(lines: list[str], loops: list[Loop]) -> list[float]:
  """How often each bundle runs.

  A pipelined grid runs its loop once more for each stage that fills or drains the pipeline. In
  these runs a branch skips the body, which therefore runs once for each grid step.
  """
  runs = [1.0] * len(lines)
  for loop in loops:
    trips = loop.trips
    for index in range(loop.first, loop.last + 1):
      runs[index] *= trips
    stages = _stages(lines, loop)
    if 0 < stages < trips:
      first, last = _longest_skip(lines, loop)
      for index in range(first, last):
        runs[index] *= (trips - stages) / trips
  return runs


def _stages(lines: list[str], loop: Loop) -> int:
  """The number of stages beyond the first, which the loop names before its first branch."""
  head = itertools.takewhile(lambda line: not _BRANCH.search(line),
                             lines[loop.first:loop.last + 1])
  return max((int(s) for line in head for s in _STAGE.findall(line)), default=0)


def _longest_skip(lines: list[str], loop: Loop) -> tuple[int, int]:
  """The bundles [first, last) of the largest part of the loop that a forward branch skips."""
  places = {region: index for index in range(loop.first, loop.last + 1)
            for region in _REGION.findall(lines[index])}
  skips = [(index + DELAY_SLOTS + 1, places[target])
           for index in range(loop.first, loop.last + 1)
           for _, target in _BRANCH.findall(lines[index]) if places.get(target, 0) > index]
  return max(skips, key=lambda s: s[1] - s[0], default=(0, 0))


def _utilization(text: str) -> tuple[list[str], list[int], list[list[int]]]:
  """The names of the units, their slots in a bundle, and the slots that each bundle fills."""
  lines = [line for line in text.splitlines() if line.strip()]
  units = [name.strip() for name in lines[1].split(',')]
  capacity = [int(n) for n in lines[2].split()]
  rows = [[int(n) for n in line.split()] for line in lines[4:]]
  return units, capacity, rows


def total(schedules: list[Schedule]) -> tuple[int, int]:
  """The issue cycles and dynamic loops of computations that run one after another."""
  return sum(s.issue_cycles for s in schedules), sum(s.dynamic_loops for s in schedules)


def floor(issue: float, mxu: float, hbm: float) -> tuple[int, str]:
  """The static floor in cycles, and the name of the bound that sets it."""
  bounds = {'issue': issue, 'mxu': mxu, 'hbm': hbm}
  bound = max(bounds, key=lambda name: bounds[name])
  return math.ceil(bounds[bound]), bound
