"""Task `count`: how many things have a colour, and how long a bar is beside another.

Numbers are graded by mean relative accuracy. Things keep a gap of a unit; lengths are whole
multiples of what the bar that is told of counts a unit for, so that the answer is exact.
"""

from dataclasses import dataclass, replace
import functools

import numpy as np

from jaxrl_pt.data.spatial import base, canvas, things
from jaxrl_pt.data.spatial.canvas import Box
from jaxrl_pt.data.spatial.things import Thing

SIZE = 5
TOLD = 12  # The length that the question gives the bar told of.
_GAP = 1
_THICK = 4


@dataclass(frozen=True)
class Level:
  """Fewest and most things of the colour, others, and the lengths in units of the bar told of.

  shortest and longest bound the length of the other bar in units.
  """

  fewest: int
  most: int
  num_others: int
  told: tuple[int, ...]
  shortest: int
  longest: int


LEVELS = (Level(1, 4, 2, (12,), 4, 24), Level(1, 7, 5, (12, 6), 4, 30),
          Level(1, 10, 8, (12, 6, 4), 4, 36), Level(8, 14, 10, (6, 4), 12, 42),
          Level(10, 18, 12, (4, 3), 16, 46))


@dataclass(frozen=True)
class Crowd:
  """How many things have the colour? Things are in the order of places."""

  look: base.Look
  level: int
  colour: str
  things: tuple[Thing, ...]


@dataclass(frozen=True)
class Bar:
  """A bar of so many units from its upper left unit, to the right or downwards."""

  row: int
  column: int
  length: int
  colour: str
  is_upright: bool

  @property
  def box(self) -> Box:
    """The units that it fills."""
    height, width = (self.length, _THICK) if self.is_upright else (_THICK, self.length)
    return Box(self.row, self.column, self.row + height, self.column + width)


@dataclass(frozen=True)
class Bars:
  """How long is `other` if `told` is 12 long?"""

  look: base.Look
  level: int
  told: Bar
  other: Bar


Scene = Crowd | Bars


def draw(rng: np.random.Generator, level: int, look: base.Look, is_unseen: bool) -> Scene:
  """Draws a number, evenly, and then a crowd or two bars that show it."""
  base.no_composition('count', is_unseen)
  return _draw_bars(rng, level, look) if rng.integers(2) else _draw_crowd(rng, level, look)


def _draw_crowd(rng: np.random.Generator, level: int, look: base.Look) -> Crowd:
  numbers = LEVELS[level - 1]
  count = int(rng.integers(numbers.fewest, numbers.most + 1))
  colour, *rest = [look.colours[k][0] for k in rng.permutation(len(look.colours)).tolist()]
  colours = [colour] * count + rng.choice(rest, numbers.num_others).tolist()
  shapes = rng.choice(look.shapes, len(colours)).tolist()
  while True:
    placed: list[Thing] = []
    free = things.places(SIZE, (), _GAP)
    reach = SIZE + _GAP - 1
    for one, shape in zip(colours, shapes, strict=True):
      place = things.pick(rng, free)
      if place is None:
        break
      row, column = place
      free[max(row - reach, 0):row + reach + 1, max(column - reach, 0):column + reach + 1] = False
      placed.append(Thing(row, column, one, shape, SIZE))
    if len(placed) >= count:  # All of the colour have found a place, whoever else has.
      return Crowd(look, level, colour, tuple(sorted(placed)))


def _draw_bars(rng: np.random.Generator, level: int, look: base.Look) -> Bars:
  told_length, length = _lengths(level)[rng.integers(len(_lengths(level)))]
  first, second = rng.permutation(len(look.colours))[:2].tolist()
  while True:
    uprights = rng.integers(2, size=2) == 1 if level > 1 else (False, False)
    told, other = (
        _bar(rng, size, look.colours[k][0], bool(is_upright))
        for size, k, is_upright in zip((told_length, length), (first, second), uprights,
                                       strict=True))
    a, b = told.box, other.box
    if max(b.top - a.bottom, a.top - b.bottom, b.left - a.right, a.left - b.right) >= 2:
      return Bars(look, level, told, other)


def _bar(rng: np.random.Generator, length: int, colour: str, is_upright: bool) -> Bar:
  height, width = (length, _THICK) if is_upright else (_THICK, length)
  row = int(rng.integers(canvas.UNITS - height + 1))
  column = int(rng.integers(canvas.UNITS - width + 1))
  return Bar(row, column, length, colour, is_upright)


@functools.cache
def _lengths(level: int) -> tuple[tuple[int, int], ...]:
  """The pairs of lengths (told, other) of a level."""
  numbers = LEVELS[level - 1]
  return tuple((told, length) for told in numbers.told
               for length in range(numbers.shortest, numbers.longest + 1)
               if length != told)


def twin(rng: np.random.Generator, scene: Scene) -> Scene | None:
  """One thing more or less has the colour, or the other bar is longer or shorter."""
  if isinstance(scene, Bars):
    return _twin_of_bars(rng, scene)
  numbers = LEVELS[scene.level - 1]
  count = _number(scene)
  changes = [k for k, t in enumerate(scene.things)
             if (numbers.fewest < count if t.colour == scene.colour else count < numbers.most)]
  if not changes:
    return None
  k = changes[rng.integers(len(changes))]
  rest = [name for name, _ in scene.look.colours if name != scene.colour]
  colour = (rest[rng.integers(len(rest))] if scene.things[k].colour == scene.colour
            else scene.colour)
  changed = list(scene.things)
  changed[k] = replace(changed[k], colour=colour)
  return replace(scene, things=tuple(changed))


def _twin_of_bars(rng: np.random.Generator, scene: Bars) -> Bars | None:
  for told, length in rng.permutation(_lengths(scene.level)).tolist():
    if told != scene.told.length or abs(length - scene.other.length) < 2:
      continue
    other = replace(scene.other, length=length)
    a, b = scene.told.box, other.box
    if (max(b.top - a.bottom, a.top - b.bottom, b.left - a.right, a.left - b.right) >= 2
        and max(b.bottom, b.right) <= canvas.UNITS):
      return replace(scene, other=other)
  return None


def pictures(scene: Scene, side: int) -> np.ndarray:
  """A crowd or two bars on a plain ground, u8[1, side, side, 3]."""
  picture = canvas.blank(side, scene.look.background)
  if isinstance(scene, Crowd):
    things.paint(picture, scene.look, scene.things)
  else:
    for bar in (scene.told, scene.other):
      canvas.rectangle(picture, bar.box, scene.look.rgb(bar.colour))
  return picture[None]


def question(scene: Scene) -> str:
  """Asks for a number."""
  if isinstance(scene, Crowd):
    return f'How many {scene.colour} things are there? Answer with a whole number.'
  return (f'The {scene.told.colour} bar is {TOLD} long. How long is the {scene.other.colour} bar? '
          'Answer with a whole number.')


def _number(scene: Scene) -> int:
  if isinstance(scene, Crowd):
    return sum(t.colour == scene.colour for t in scene.things)
  return _scaled(scene.told.length, scene.other.length)


def _scaled(told: int, length: int) -> int:
  """How long a bar is where the bar told of is 12 long: its length is a divisor of 12."""
  return length * TOLD // told


def answer(scene: Scene) -> str:
  """The number."""
  return str(_number(scene))


def options(scene: Scene) -> tuple[str, ...]:
  """None: the answer is a number."""
  del scene
  return ()


def describe(scene: Scene) -> str:
  """The things and their places, or the bars and their lengths."""
  if isinstance(scene, Crowd):
    return f'{things.listed(scene.things)}.'
  return (f'The {scene.told.colour} bar is {scene.told.length} units long, the '
          f'{scene.other.colour} bar {scene.other.length} units.')


def grade(scene: Scene, text: str) -> base.Grade:
  """A number by mean relative accuracy."""
  return base.grade_number(_number(scene), text)


@functools.cache
def _chances(level: int) -> tuple[float, float]:
  """The best constant answers to a crowd and to bars."""
  numbers = LEVELS[level - 1]
  return (base.best_constant(range(numbers.fewest, numbers.most + 1)),
          base.best_constant([_scaled(told, length) for told, length in _lengths(level)]))


def chance(scene: Scene) -> float:
  """The best constant number; counts and pairs of lengths are equally likely."""
  return _chances(scene.level)[isinstance(scene, Bars)]


TASK = base.Task('count', 'quantity', 'spatial_relation', len(LEVELS), 1, draw, twin, pictures,
                 question, answer, options, describe, grade, chance)
