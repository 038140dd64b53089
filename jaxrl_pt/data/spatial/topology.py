"""Task `topology`: apart, touching, overlapping, inside or around; and whether a thing is between.

Panels are rectangles. What is apart is so by a gap in units, what overlaps or sticks out does so by
as much, and what touches shares an edge of at least 4 units; between means on the straight line
that joins two middles, and what is not between lies off that line by a margin.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
import functools
from typing import Literal

import numpy as np

from jaxrl_pt.data.spatial import base, canvas, things
from jaxrl_pt.data.spatial.canvas import Box
from jaxrl_pt.data.spatial.things import Thing

RELATIONS = ('apart', 'touching', 'overlapping', 'inside', 'around')
_SHARED_EDGE = 4
_SEEN = 2  # Of each edge of the larger panel so many units are seen.
_SIZE = 7
_CLUTTER_SIZE = 5
_CLUTTER_GAP = 2
_ROWS, _COLUMNS = np.arange(canvas.UNITS)[:, None], np.arange(canvas.UNITS)[None, :]


@dataclass(frozen=True)
class Level:
  """How many things stand about, the gap in units, and how far off a line is not between."""

  num_others: int
  gap: int
  off_line: int


LEVELS = (Level(0, 6, 12), Level(2, 4, 10), Level(4, 3, 8), Level(6, 2, 7), Level(8, 1, 6))


@dataclass(frozen=True)
class Panel:
  """A rectangle of one colour."""

  box: Box
  colour: str


@dataclass(frozen=True)
class Panels:
  """How does panel A lie to panel B? The smaller panel is painted over the larger one."""

  look: base.Look
  level: int
  a: Panel
  b: Panel
  others: tuple[Thing, ...]


@dataclass(frozen=True)
class Line:
  """Does the middle thing lie between the two ends? Ends are in the order of places."""

  look: base.Look
  level: int
  middle: Thing
  ends: tuple[Thing, Thing]
  others: tuple[Thing, ...]


Scene = Panels | Line


# --- Panels -----------------------------------------------------------------------


def _allowed(relation: str, gap: int, size: tuple[int, int], b: Box) -> np.ndarray:
  """Where a panel of (height, width) may have its upper left unit, bool[48, 48]."""
  top, left = _ROWS, _COLUMNS
  bottom, right = top + size[0], left + size[1]
  fits = (bottom <= canvas.UNITS) & (right <= canvas.UNITS)
  outside = _most(b.top - top, bottom - b.bottom, b.left - left, right - b.right)
  b_outside = _most(top - b.top, b.bottom - bottom, left - b.left, b.right - right)
  if relation in ('inside', 'around'):
    return fits & ((outside if relation == 'inside' else b_outside) <= -min(gap, 2))
  apart_rows = _most(b.top - bottom, top - b.bottom)  # Below 0: so many shared rows.
  apart_columns = _most(b.left - right, left - b.right)
  apart = _most(apart_rows, apart_columns)
  if relation == 'apart':
    return fits & (apart >= gap)
  if relation == 'touching':
    return fits & (apart == 0) & (np.minimum(apart_rows, apart_columns) <= -_SHARED_EDGE)
  # The smaller panel lies over the larger one and must not hide a whole edge of it.
  sign = 1 if size[0] * size[1] <= (b.bottom - b.top) * (b.right - b.left) else -1
  shows_rows = _most(sign * (top - b.top), sign * (b.bottom - bottom)) >= _SEEN
  shows_columns = _most(sign * (left - b.left), sign * (b.right - right)) >= _SEEN
  return (fits & shows_rows & shows_columns & (apart <= -max(gap, 2)) & (outside >= gap)
          & (b_outside >= gap))


def _most(*numbers: np.ndarray) -> np.ndarray:
  return functools.reduce(np.maximum, numbers)


def _draw_panels(rng: np.random.Generator, level: int, look: base.Look) -> Panels:
  """Draws a relation, panels that have it, and clutter that leaves room for another relation."""
  numbers = LEVELS[level - 1]
  k, other = rng.permutation(len(RELATIONS))[:2].tolist()
  colours = [look.colours[k][0] for k in rng.permutation(len(look.colours)).tolist()]
  while True:
    size, size_b = ((int(h), int(w)) for h, w in rng.integers(7, 20, (2, 2)))
    corner = rng.integers(0, (canvas.UNITS - size_b[0] + 1, canvas.UNITS - size_b[1] + 1))
    b = _placed((int(corner[0]), int(corner[1])), size_b)
    place = things.pick(rng, _allowed(RELATIONS[k], numbers.gap, size, b))
    if place is None:
      continue
    room = things.pick(rng, _allowed(RELATIONS[other], numbers.gap, size, b))
    if room is not None:
      break
    other = int((k + rng.integers(1, len(RELATIONS))) % len(RELATIONS))
  a = _placed(place, size)
  others: list[Thing] = []
  for colour in rng.choice(colours[2:], numbers.num_others).tolist():
    free = things.pick(rng, _clear(others, (a, b, _placed(room, size))))
    if free is not None:
      shape = look.shapes[rng.integers(len(look.shapes))]
      others.append(Thing(*free, colour, shape, _CLUTTER_SIZE))
  return Panels(look, level, Panel(a, colours[0]), Panel(b, colours[1]), tuple(sorted(others)))


def _placed(place: tuple[int, int], size: Sequence[int]) -> Box:
  return Box(place[0], place[1], place[0] + size[0], place[1] + size[1])


def _clear(others: Sequence[Thing], boxes: Sequence[Box]) -> np.ndarray:
  """Where clutter may lie, bool[48, 48]."""
  free = things.places(_CLUTTER_SIZE, others, _CLUTTER_GAP)
  reach = _CLUTTER_SIZE // 2 + _CLUTTER_GAP
  for box in boxes:
    free[max(box.top - reach, 0):box.bottom + reach,
         max(box.left - reach, 0):box.right + reach] = False
  return free


def _twin_of_panels(rng: np.random.Generator, scene: Panels) -> Panels | None:
  """Moves panel A to another relation, clear of whatever stands about."""
  height, width = scene.a.box.bottom - scene.a.box.top, scene.a.box.right - scene.a.box.left
  clear = np.ones((canvas.UNITS, canvas.UNITS), bool)
  for other in scene.others:
    box = other.box
    clear[max(box.top - _CLUTTER_GAP - height + 1, 0):box.bottom + _CLUTTER_GAP,
          max(box.left - _CLUTTER_GAP - width + 1, 0):box.right + _CLUTTER_GAP] = False
  for k in rng.permutation(len(RELATIONS)).tolist():
    if RELATIONS[k] == relation(scene.a.box, scene.b.box):
      continue
    gap = LEVELS[scene.level - 1].gap
    place = things.pick(rng, clear & _allowed(RELATIONS[k], gap, (height, width), scene.b.box))
    if place is not None:
      return replace(scene, a=replace(scene.a, box=_placed(place, (height, width))))
  return None


def relation(a: Box, b: Box) -> str:
  """The relation of A to B, from the sets of units that they cover."""
  filled_a, filled_b = (np.zeros((canvas.UNITS + 2, canvas.UNITS + 2), bool) for _ in range(2))
  for filled, box in ((filled_a, a), (filled_b, b)):
    filled[box.top + 1:box.bottom + 1, box.left + 1:box.right + 1] = True
  if (filled_a <= filled_b).all():
    return 'inside'
  if (filled_b <= filled_a).all():
    return 'around'
  if (filled_a & filled_b).any():
    return 'overlapping'
  beside = np.zeros_like(filled_a)
  for axis in (0, 1):
    for step in (-1, 1):
      beside |= np.roll(filled_a, step, axis)
  return 'touching' if (beside & filled_b).any() else 'apart'


# --- Between ----------------------------------------------------------------------


def _line_places(ends: Sequence[Thing], is_between: bool, off_line: int) -> np.ndarray:
  """Where a thing lies between two others, or clearly does not, bool[48, 48].

  With p the place, a and b the ends and d = b - a, the share of the way is (p - a) · d / |d|² and
  the distance from the line |(p - a) × d| / |d|.
  """
  from_row, from_column = _ROWS - ends[0].row, _COLUMNS - ends[0].column
  d_row, d_column = ends[1].row - ends[0].row, ends[1].column - ends[0].column
  length = float(np.hypot(d_row, d_column))
  share = (from_row * d_row + from_column * d_column) / length**2
  off = abs(from_row * d_column - from_column * d_row) / length
  if is_between:
    return np.asarray((share >= 0.3) & (share <= 0.7) & (off <= 1))
  return np.asarray((off >= off_line) & (share >= 0) & (share <= 1))


def _draw_line(rng: np.random.Generator, level: int, look: base.Look) -> Line:
  """Draws two ends, a place between them and one that is not, and clutter that leaves both free."""
  numbers = LEVELS[level - 1]
  named = things.names(rng, look, 3 + numbers.num_others)
  is_between = bool(rng.integers(2))
  while True:
    places = rng.integers(_SIZE // 2, canvas.UNITS - _SIZE // 2, (2, 2))
    if np.hypot(*(places[0] - places[1])) < 28:
      continue
    ends = [Thing(int(row), int(column), *name, _SIZE)
            for (row, column), name in zip(places, named[:2], strict=True)]
    free = things.places(_SIZE, ends, 1)
    either = [things.pick(rng, free & _line_places(ends, wanted, numbers.off_line))
              for wanted in (is_between, not is_between)]
    middles = [Thing(*place, *named[2], _SIZE) for place in either if place is not None]
    if len(middles) == 2:
      break
  others: list[Thing] = []
  for name in named[3:]:
    place = things.pick(rng, things.places(_CLUTTER_SIZE, [*ends, *middles, *others],
                                           _CLUTTER_GAP))
    if place is not None:
      others.append(Thing(*place, *name, _CLUTTER_SIZE))
  first, second = sorted(ends)
  return Line(look, level, middles[0], (first, second), tuple(sorted(others)))


def _twin_of_line(rng: np.random.Generator, scene: Line) -> Line | None:
  """Moves the middle thing onto the line, or off it."""
  free = things.places(_SIZE, [*scene.ends, *scene.others], 1)
  place = things.pick(rng, free & _line_places(scene.ends, not _is_between(scene),
                                               LEVELS[scene.level - 1].off_line))
  if place is None:
    return None
  return replace(scene, middle=replace(scene.middle, row=place[0], column=place[1]))


def _is_between(scene: Line) -> bool:
  """Whether the way from end to end is hardly longer by way of the middle thing.

  A middle at most 1 unit off the line makes it longer by less than 0.2 units; one that is at least
  6 units off, of at most 60, by more than 1.
  """
  def length(a: Thing, b: Thing) -> float:
    return float(np.hypot(a.row - b.row, a.column - b.column))
  first, second = scene.ends
  return (length(first, scene.middle) + length(scene.middle, second)
          - length(first, second)) < 0.5


# --- The task ---------------------------------------------------------------------


def draw(rng: np.random.Generator, level: int, look: base.Look, is_unseen: bool) -> Scene:
  """Draws two panels or a line of things."""
  base.no_composition('topology', is_unseen)
  kind: Literal[0, 1] = 1 if rng.integers(3) == 0 else 0
  return _draw_line(rng, level, look) if kind else _draw_panels(rng, level, look)


def twin(rng: np.random.Generator, scene: Scene) -> Scene | None:
  """Moves panel A or the middle thing."""
  return _twin_of_line(rng, scene) if isinstance(scene, Line) else _twin_of_panels(rng, scene)


def pictures(scene: Scene, side: int) -> np.ndarray:
  """Panels or things on a plain ground, u8[1, side, side, 3]."""
  picture = canvas.blank(side, scene.look.background)
  if isinstance(scene, Line):
    things.paint(picture, scene.look, [*scene.others, *scene.ends, scene.middle])
    return picture[None]
  things.paint(picture, scene.look, scene.others)
  style = 'square' if 'square' in scene.look.shapes else 'frame'
  for panel in sorted((scene.a, scene.b), key=lambda panel: -_area(panel.box)):
    canvas.shape(picture, style, panel.box, scene.look.rgb(panel.colour))
  return picture[None]


def _area(box: Box) -> int:
  return (box.bottom - box.top) * (box.right - box.left)


def question(scene: Scene) -> str:
  """Asks for the relation, or whether a thing is between."""
  if isinstance(scene, Line):
    first, second = scene.ends
    return (f'Is the {scene.middle.name} on the straight line between the {first.name} and the '
            f'{second.name}? Answer with one of the options.')
  return (f'How does the {scene.a.colour} panel lie to the {scene.b.colour} panel? Answer with one '
          'of the options.')


def answer(scene: Scene) -> str:
  """From sets of units, or from the length of a way."""
  if isinstance(scene, Line):
    return 'yes' if _is_between(scene) else 'no'
  return relation(scene.a.box, scene.b.box)


def options(scene: Scene) -> tuple[str, ...]:
  """Yes and no, or the five relations."""
  return ('yes', 'no') if isinstance(scene, Line) else RELATIONS


def describe(scene: Scene) -> str:
  """Panels by their edges, things by their places."""
  if isinstance(scene, Line):
    return f'{things.listed([scene.middle, *scene.ends, *scene.others])}.'
  panels = '; '.join(
      f'{p.colour} panel over rows {p.box.top} to {p.box.bottom - 1} and columns {p.box.left} to '
      f'{p.box.right - 1}' for p in (scene.a, scene.b))
  return '; '.join(filter(None, (panels, things.listed(scene.others)))) + '.'


TASK = base.choosing('topology', 'relation', 'spatial_relation', len(LEVELS), 1, draw, twin,
                     pictures, question, answer, options, describe)
