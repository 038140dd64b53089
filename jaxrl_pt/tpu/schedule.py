"""Reads the TPU compiler's final schedule: how many cycles a program takes to issue.

libtpu writes one VLIW bundle a line (`*-final_bundles.txt`) and, beside it, how many slots
of each unit every bundle fills (`*-final_hlo-static-per-bundle-utilization.txt`). A bundle
issues in one cycle, so

    issue cycles = Σ over bundles of the number of times that bundle runs,

with loop trips read from the compiler's own `loop exit test`. Branches are taken to run both
sides, waiting for memory is not counted, and a loop whose bound is known only at run time
takes the trips that the caller names, or counts once: this is a static prediction, never
a time.
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
# A taken branch leaves after this many further bundles.
DELAY_SLOTS = 4


@dataclass(frozen=True)
class Loop:
  """A loop of the schedule: its bundles and how often it runs each time it is entered."""

  first: int
  last: int
  trips: int
  dynamic: bool  # the bound is known only at run time


@dataclass(frozen=True)
class Schedule:
  """One computation's final schedule.

  slots: share of each unit's issue slots that is filled, over all issue cycles.
  """

  name: str
  num_bundles: int
  issue_cycles: int
  dynamic_loops: int
  slots: dict[str, float]


def read(name: str, bundles: str, utilization: str,
         dynamic_trips: Sequence[int] = ()) -> Schedule:
  """The schedule in the compiler's two texts.

  Args:
    name: of the computation.
    bundles: text of `*-final_bundles.txt`.
    utilization: text of `*-final_hlo-static-per-bundle-utilization.txt`.
    dynamic_trips: of the loops whose bound is known only at run time, in the order in which
      they end; those beyond its length count once.

  Raises:
    ValueError: the two do not have the same number of bundles.
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
  """Every computation of a dump, without the start and end that each program has."""
  schedules = []
  for path in sorted(directory.glob('*-final_bundles.txt')):
    found = re.fullmatch(r'(\d+-(.+))-\d+-final_bundles\.txt', path.name)
    if not found or 'schedule-analysis' in path.name:
      continue
    stem, name = found.groups()
    if name == 'TLP' or name.startswith('<late-'):
      continue
    rows = [p for p in directory.iterdir() if re.fullmatch(
        re.escape(stem) + r'-\d+-final_hlo-static-per-bundle-utilization\.txt', p.name)]
    schedules.append(read(name, path.read_text(), rows[0].read_text(),
                          dynamic_trips))
  return schedules


def _bundles(text: str) -> Iterator[str]:
  """One string a bundle; comments may run over several lines."""
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
  """The loops: a branch back to a region that began earlier closes one."""
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

  A pipelined grid runs its loop once more for each stage that fills or drains it. The body
  is then skipped by one branch: that part runs once per grid step only.
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
  """Stages beyond the first: the loop's head names each, up to its first branch."""
  head = itertools.takewhile(lambda line: not _BRANCH.search(line),
                             lines[loop.first:loop.last + 1])
  return max((int(s) for line in head for s in _STAGE.findall(line)), default=0)


def _longest_skip(lines: list[str], loop: Loop) -> tuple[int, int]:
  """[first, last) of the largest part of the loop that a forward branch passes over."""
  places = {region: index for index in range(loop.first, loop.last + 1)
            for region in _REGION.findall(lines[index])}
  skips = [(index + DELAY_SLOTS + 1, places[target])
           for index in range(loop.first, loop.last + 1)
           for _, target in _BRANCH.findall(lines[index]) if places.get(target, 0) > index]
  return max(skips, key=lambda s: s[1] - s[0], default=(0, 0))


def _utilization(text: str) -> tuple[list[str], list[int], list[list[int]]]:
  """Names of the units, their slots in a bundle, and the slots that each bundle fills."""
  lines = [line for line in text.splitlines() if line.strip()]
  units = [name.strip() for name in lines[1].split(',')]
  capacity = [int(n) for n in lines[2].split()]
  rows = [[int(n) for n in line.split()] for line in lines[4:]]
  return units, capacity, rows


def total(schedules: list[Schedule]) -> tuple[int, int]:
  """Issue cycles and run-time loops of computations that run one after another."""
  return sum(s.issue_cycles for s in schedules), sum(s.dynamic_loops for s in schedules)


def floor(issue: float, mxu: float, hbm: float) -> tuple[int, str]:
  """The static floor in cycles, and which of the three sets it."""
  bounds = {'issue': issue, 'mxu': mxu, 'hbm': hbm}
  bound = max(bounds, key=lambda name: bounds[name])
  return math.ceil(bounds[bound]), bound
