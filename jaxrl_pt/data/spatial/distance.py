"""Task `distance`: what lies nearest or farthest, and how far apart two things are.

The nearest (farthest) thing is nearer (farther) than every other by a margin in units. A distance
in numbers is graded by mean relative accuracy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
import functools
import math
from typing import Literal

import numpy as np

from jaxrl_pt.data.spatial import base, canvas, things
from jaxrl_pt.data.spatial.things import Thing

SIZE = 7
PER_WIDTH = 100  # Distances are told in hundredths of the picture's width.
_GAP = 1
_MIN_CHANGE = 6  # units by which the twin of a distance differs at least


@dataclass(frozen=True)
class Level:
  """Things beside the one asked about, a margin in units, and the longest distance in units."""

  num_others: int
  margin: int
  longest: int


LEVELS = (Level(3, 7, 26), Level(4, 5, 34), Level(5, 4, 42), Level(6, 3, 50), Level(6, 2, 54))
_SHORTEST = 12


@dataclass(frozen=True)
class Scene:
  """What is nearest to or farthest from things[origin], or how far is things[subject]?

  Things have different colours and are in the order of places. Only `number` reads `subject`.
  """

  look: base.Look
  level: int
  kind: Literal['nearest', 'farthest', 'number']
  things: tuple[Thing, ...]
  origin: int
  subject: int


def _scene(look: base.Look, level: int, kind: Literal['nearest', 'farthest', 'number'],
           placed: Sequence[Thing]) -> Scene:
  """The scene of things of which the first is the origin and the second the subject."""
  ordered = tuple(sorted(placed))
  subject = ordered.index(placed[1]) if kind == 'number' else -1
  return Scene(look, level, kind, ordered, ordered.index(placed[0]), subject)


def draw(rng: np.random.Generator, level: int, look: base.Look, is_unseen: bool) -> Scene:
  """Draws things until one of them is nearest or farthest by the margin."""
  base.no_composition('distance', is_unseen)
  numbers = LEVELS[level - 1]
  kinds: tuple[Literal['nearest', 'farthest', 'number'], ...] = ('nearest', 'farthest', 'number')
  kind = kinds[rng.integers(3)]
  while True:
    colours = [look.colours[k][0] for k in rng.permutation(len(look.colours)).tolist()]
    shapes = rng.choice(look.shapes, 1 + numbers.num_others).tolist()
    placed = _pair(rng, numbers, colours, shapes) if kind == 'number' else []
    for colour, shape in list(zip(colours, shapes, strict=False))[len(placed):]:
      place = things.pick(rng, things.places(SIZE, placed, _GAP))
      assert place is not None, 'a picture has room for seven things'
      placed.append(Thing(*place, colour, shape, SIZE))
    if kind == 'number' or _margin(kind, placed[0], placed[1:]) >= numbers.margin:
      return _scene(look, level, kind, placed)


def _pair(rng: np.random.Generator, numbers: Level, colours: Sequence[str],
          shapes: Sequence[str]) -> list[Thing]:
  """Two things whose distance is drawn evenly from the level's range."""
  room = canvas.UNITS - SIZE
  while True:
    length, angle = rng.uniform(_SHORTEST, numbers.longest), rng.uniform(0, 2 * math.pi)
    rows, columns = round(length * math.sin(angle)), round(length * math.cos(angle))
    if max(abs(rows), abs(columns)) <= room:
      break
  low = SIZE // 2
  row = int(rng.integers(low + max(-rows, 0), low + room + 1 - max(rows, 0)))
  column = int(rng.integers(low + max(-columns, 0), low + room + 1 - max(columns, 0)))
  return [Thing(row, column, colours[0], shapes[0], SIZE),
          Thing(row + rows, column + columns, colours[1], shapes[1], SIZE)]


def _length(one: Thing, other: Thing) -> float:
  return math.hypot(one.row - other.row, one.column - other.column)


def _margin(kind: str, origin: Thing, others: Sequence[Thing]) -> float:
  """By how much the nearest or farthest thing differs from the next."""
  lengths = sorted((_length(origin, other) for other in others), reverse=kind == 'farthest')
  return abs(lengths[1] - lengths[0])


def twin(rng: np.random.Generator, scene: Scene) -> Scene | None:
  """Moves one thing so that another is nearest or farthest, or the subject's distance changes."""
  origin = scene.things[scene.origin]
  others = [t for k, t in enumerate(scene.things) if k != scene.origin]
  movable = rng.permutation(len(others)).tolist()
  if scene.kind == 'number':
    movable = [others.index(scene.things[scene.subject])]
  rows, columns = np.mgrid[:canvas.UNITS, :canvas.UNITS]
  lengths = np.hypot(rows - origin.row, columns - origin.column)
  for k in movable:
    rest = [t for t in others if t is not others[k]]
    allowed = things.places(SIZE, [origin, *rest], _GAP) & _changes(
        scene, lengths, others[k], [_length(origin, t) for t in rest])
    place = things.pick(rng, allowed)
    if place is not None:
      moved = replace(others[k], row=place[0], column=place[1])
      return _scene(scene.look, scene.level, scene.kind, [origin, moved, *rest])
  return None


def _changes(scene: Scene, lengths: np.ndarray, moved: Thing, rest: Sequence[float]) -> np.ndarray:
  """Where a thing changes the answer, bool like `lengths` from the origin to each place."""
  numbers = LEVELS[scene.level - 1]
  if scene.kind == 'number':
    before = _length(moved, scene.things[scene.origin])
    return ((abs(lengths - before) >= _MIN_CHANGE) & (lengths >= _SHORTEST)
            & (lengths <= numbers.longest))
  sign = 1 if scene.kind == 'nearest' else -1
  first, second = sorted(sign * length for length in rest)[:2]
  if moved.colour != answer(scene):
    return np.asarray(sign * lengths <= first - numbers.margin)
  is_clear = second - first >= numbers.margin
  return np.asarray((sign * lengths >= first + numbers.margin) & is_clear)


def pictures(scene: Scene, side: int) -> np.ndarray:
  """The things on a plain ground, u8[1, side, side, 3]."""
  picture = canvas.blank(side, scene.look.background)
  things.paint(picture, scene.look, scene.things)
  return picture[None]


def question(scene: Scene) -> str:
  """Asks for a colour or for a number."""
  origin = scene.things[scene.origin]
  if scene.kind == 'number':
    return (f'How far apart are the middles of the {origin.colour} thing and the '
            f'{scene.things[scene.subject].colour} thing? The picture is {PER_WIDTH} wide. Answer '
            'with a whole number.')
  wanted = 'nearest to' if scene.kind == 'nearest' else 'farthest from'
  return f'Which thing is {wanted} the {origin.colour} thing? Answer with its colour.'


def answer(scene: Scene) -> str:
  """The colour of the first in order of distance, or the distance."""
  origin = scene.things[scene.origin]
  if scene.kind == 'number':
    return str(_number(scene))
  others = [t for k, t in enumerate(scene.things) if k != scene.origin]
  first = min if scene.kind == 'nearest' else max
  return first(others, key=lambda t: (t.row - origin.row)**2 + (t.column - origin.column)**2).colour


def _number(scene: Scene) -> int:
  length = _length(scene.things[scene.origin], scene.things[scene.subject])
  return math.floor(length * PER_WIDTH / canvas.UNITS + 0.5)  # Halves are rounded up.


def options(scene: Scene) -> tuple[str, ...]:
  """Every colour of the look but that of the thing asked about."""
  if scene.kind == 'number':
    return ()
  return tuple(name for name, _ in scene.look.colours if name != scene.things[scene.origin].colour)


def describe(scene: Scene) -> str:
  """The things and their places."""
  return (f'Places in units, of which the picture has {canvas.UNITS} each way. '
          f'{things.listed(scene.things)}.')


def grade(scene: Scene, text: str) -> base.Grade:
  """One of the colours, or a number by mean relative accuracy."""
  if scene.kind == 'number':
    return base.grade_number(_number(scene), text)
  return base.grade_text(answer(scene), options(scene), text)


@functools.cache
def _chance_of_number(level: int) -> float:
  low = _SHORTEST * PER_WIDTH // canvas.UNITS
  high = LEVELS[level - 1].longest * PER_WIDTH // canvas.UNITS
  return base.best_constant(range(low, high + 1))


def chance(scene: Scene) -> float:
  """Colours are equally likely; distances nearly so within the level's range."""
  return _chance_of_number(scene.level) if scene.kind == 'number' else 1 / len(options(scene))


TASK = base.Task('distance', 'relation', 'spatial_relation', len(LEVELS), 1, draw, twin, pictures,
                 question, answer, options, describe, grade, chance)
