"""Task `order`: the k-th thing from one side, and what is in line with another thing.

Middles differ by a margin in units along the axis asked about, but for the two that are in line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from jaxrl_pt.data.spatial import base, canvas, things
from jaxrl_pt.data.spatial.things import Thing

SIZE = 5
SIDES = ('left', 'right', 'top', 'bottom')
_ORDINALS = ('first', 'second', 'third', 'fourth', 'fifth', 'sixth', 'seventh')
_GAP = 1


@dataclass(frozen=True)
class Level:
  """How many things there are, and the margin in units between them along the axis."""

  num_things: int
  margin: int


LEVELS = (Level(3, 8), Level(4, 6), Level(5, 5), Level(6, 4), Level(7, 3))


@dataclass(frozen=True)
class Scene:
  """The k-th (from 0) from a side, or what is in line with things[origin] along the axis.

  Things have different colours and are in the order of places. For things in line, `side` is
  'left' where they share a row and 'top' where they share a column. Only `rank` reads `k`, only
  `line` reads `origin`.
  """

  look: base.Look
  level: int
  kind: Literal['rank', 'line']
  side: str
  k: int
  origin: int
  things: tuple[Thing, ...]


def _is_sideways(side: str) -> bool:
  return side in ('left', 'right')


def _apart(rng: np.random.Generator, count: int, margin: int) -> list[int]:
  """Places along an axis whose differences are at least the margin, in an order that is drawn."""
  slack = canvas.UNITS - SIZE - (count - 1) * margin
  gaps = np.sort(rng.integers(0, slack + 1, count))
  return [int(p) for p in rng.permutation(SIZE // 2 + gaps + margin * np.arange(count))]


def _freely(rng: np.random.Generator, count: int) -> list[int]:
  low = SIZE // 2
  return [int(place) for place in rng.integers(low, canvas.UNITS - low, count)]


def _things(rng: np.random.Generator, look: base.Look, rows: Sequence[int],
            columns: Sequence[int]) -> list[Thing]:
  colours = rng.permutation(len(look.colours)).tolist()
  shapes = rng.choice(look.shapes, len(rows)).tolist()
  return [Thing(row, column, look.colours[colour][0], shape, SIZE)
          for row, column, colour, shape in zip(rows, columns, colours, shapes, strict=False)]


def _do_overlap(placed: Sequence[Thing]) -> bool:
  return any(not things.is_apart(one, other, _GAP)
             for k, one in enumerate(placed) for other in placed[:k])


def draw(rng: np.random.Generator, level: int, look: base.Look, is_unseen: bool) -> Scene:
  """Draws places along the axis with a margin, and across it freely."""
  base.no_composition('order', is_unseen)
  numbers = LEVELS[level - 1]
  count = numbers.num_things
  if rng.integers(2):
    return _draw_line(rng, level, look)
  side = SIDES[rng.integers(4)]
  k = int(rng.integers(count))
  while True:
    along, across = _apart(rng, count, numbers.margin), _freely(rng, count)
    rows, columns = (across, along) if _is_sideways(side) else (along, across)
    placed = _things(rng, look, rows, columns)
    if not _do_overlap(placed):
      return Scene(look, level, 'rank', side, k, -1, tuple(sorted(placed)))


def _draw_line(rng: np.random.Generator, level: int, look: base.Look) -> Scene:
  """Draws things in rows of their own, but for the first two; or in columns of their own."""
  numbers = LEVELS[level - 1]
  side = ('left', 'top')[rng.integers(2)]
  while True:
    heights = _apart(rng, numbers.num_things - 1, numbers.margin)
    heights, across = [heights[0], *heights], _freely(rng, numbers.num_things)
    rows, columns = (heights, across) if _is_sideways(side) else (across, heights)
    placed = _things(rng, look, rows, columns)
    if not _do_overlap(placed):
      ordered = tuple(sorted(placed))
      return Scene(look, level, 'line', side, -1, ordered.index(placed[0]), ordered)


def twin(rng: np.random.Generator, scene: Scene) -> Scene | None:
  """Moves one thing along the axis so that another is k-th, or the origin in line with another."""
  low, room = SIZE // 2, canvas.UNITS - SIZE + 1
  movable = [scene.origin] if scene.kind == 'line' else range(len(scene.things))
  axis = _axis(scene)
  for pair in rng.permutation(len(movable) * room).tolist():
    thing = scene.things[movable[pair // room]]
    moved = replace(thing, **{axis: low + pair % room})
    rest = [t for t in scene.things if t is not thing]
    if not all(things.is_apart(moved, t, _GAP) for t in rest):
      continue
    ordered = tuple(sorted([moved, *rest]))
    origin = ordered.index(moved) if scene.kind == 'line' else -1
    changed = replace(scene, things=ordered, origin=origin)
    if _is_clear(changed) and answer(changed) != answer(scene):
      return changed
  return None


def _axis(scene: Scene) -> Literal['row', 'column']:
  """What a twin changes: the axis along which things are sorted, or share a place."""
  return 'column' if _is_sideways(scene.side) == (scene.kind == 'rank') else 'row'


def _is_clear(scene: Scene) -> bool:
  """Whether all places along the axis keep the margin, but for one pair in line."""
  ordered = sorted(t.column if _axis(scene) == 'column' else t.row for t in scene.things)
  steps = [after - before for before, after in zip(ordered, ordered[1:], strict=False)]
  margin = LEVELS[scene.level - 1].margin
  if scene.kind == 'rank':
    return min(steps) >= margin
  return steps.count(0) == 1 and all(step == 0 or step >= margin for step in steps)


def pictures(scene: Scene, side: int) -> np.ndarray:
  """The things on a plain ground, u8[1, side, side, 3]."""
  picture = canvas.blank(side, scene.look.background)
  things.paint(picture, scene.look, scene.things)
  return picture[None]


def question(scene: Scene) -> str:
  """Asks for a colour."""
  if scene.kind == 'line':
    axis = 'level' if _is_sideways(scene.side) else 'in one column'
    return (f'Which other thing is exactly {axis} with the '
            f'{scene.things[scene.origin].colour} thing? Answer with its colour.')
  return f'Which thing is {_ORDINALS[scene.k]} from the {scene.side}? Answer with its colour.'


def answer(scene: Scene) -> str:
  """The k-th by sorting, or the one whose row or column is that of the origin."""
  if scene.kind == 'rank':
    ordered = sorted(scene.things,
                     key=lambda t: t.column if _is_sideways(scene.side) else t.row)
    if scene.side in ('right', 'bottom'):
      ordered.reverse()
    return ordered[scene.k].colour
  origin = scene.things[scene.origin]
  for t in scene.things:
    shared = t.row == origin.row if _is_sideways(scene.side) else t.column == origin.column
    if t is not origin and shared:
      return t.colour
  raise AssertionError('something is in line with the thing asked about')


def options(scene: Scene) -> tuple[str, ...]:
  """Every colour of the look, but that of a thing asked about."""
  asked = scene.things[scene.origin].colour if scene.kind == 'line' else ''
  return tuple(name for name, _ in scene.look.colours if name != asked)


def describe(scene: Scene) -> str:
  """The things and their places."""
  return f'Rows count downwards, columns to the right. {things.listed(scene.things)}.'


TASK = base.choosing('order', 'relation', 'spatial_relation', len(LEVELS), 1, draw, twin, pictures,
                     question, answer, options, describe)
