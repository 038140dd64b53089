"""Task `direction`: in which of eight directions one thing lies from another.

Angles keep a margin from the borders between two directions, and middles lie at least 14 units
apart, so that a pixel more or less never changes the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
import functools
import math

import numpy as np

from jaxrl_pt.data.spatial import base, canvas, things
from jaxrl_pt.data.spatial.things import Thing

DIRECTIONS = ('right', 'above right', 'above', 'above left', 'left', 'below left', 'below',
              'below right')  # Counterclockwise in steps of 45 degrees.
SIZE = 7
MIN_DISTANCE = 14
_GAP = 1


@dataclass(frozen=True)
class Level:
  """How many other things there are, and degrees from the border of two directions at least."""

  num_others: int
  margin: float


LEVELS = (Level(0, 15.0), Level(2, 11.0), Level(4, 8.0), Level(7, 6.0), Level(10, 5.0))


@dataclass(frozen=True)
class Scene:
  """Where is the thing `subject` from the thing `origin`? Things are in the order of places."""

  look: base.Look
  level: int
  things: tuple[Thing, ...]
  subject: int
  origin: int


@functools.cache
def _offsets(level: int) -> tuple[np.ndarray, ...]:
  """Offsets (rows, columns) that lie well inside each direction, int[O, 2] for each of eight.

  The angle a between an offset and the direction's axis has cos a = offset · axis / |offset|.
  """
  most = canvas.UNITS - SIZE
  rows, columns = (axis.reshape(-1) for axis in np.mgrid[-most:most + 1, -most:most + 1])
  length = np.maximum(np.hypot(rows, columns), 1e-9)
  closest = math.cos(math.radians(22.5 - LEVELS[level - 1].margin))
  found = []
  for k in range(8):
    along = columns * math.cos(k * math.pi / 4) - rows * math.sin(k * math.pi / 4)
    inside = (along / length >= closest) & (length >= MIN_DISTANCE)
    found.append(np.stack([rows[inside], columns[inside]], -1))
  return tuple(found)


def _scene(look: base.Look, level: int, placed: Sequence[Thing]) -> Scene:
  """The scene of things of which the first is the subject and the second the origin."""
  ordered = tuple(sorted(placed))
  return Scene(look, level, ordered, ordered.index(placed[0]), ordered.index(placed[1]))


def draw(rng: np.random.Generator, level: int, look: base.Look, is_unseen: bool) -> Scene:
  """Draws the direction, then a place for it, then other things wherever there is room."""
  base.no_composition('direction', is_unseen)
  offsets = _offsets(level)[rng.integers(8)]
  offset = offsets[rng.integers(len(offsets))]
  low = SIZE // 2 + np.maximum(-offset, 0)
  high = canvas.UNITS - SIZE // 2 - np.maximum(offset, 0)
  origin = rng.integers(low, high)
  named = things.names(rng, look, 2 + LEVELS[level - 1].num_others)
  placed = [Thing(int(row), int(column), *name, SIZE)
            for (row, column), name in zip((origin + offset, origin), named[:2], strict=True)]
  for name in named[2:]:
    place = things.pick(rng, things.places(SIZE, placed, _GAP))
    if place is not None:
      placed.append(Thing(*place, *name, SIZE))
  return _scene(look, level, placed)


def twin(rng: np.random.Generator, scene: Scene) -> Scene | None:
  """Moves the subject to another direction from the origin."""
  origin, subject = scene.things[scene.origin], scene.things[scene.subject]
  others = [t for k, t in enumerate(scene.things) if k != scene.subject]
  free = things.places(SIZE, others, _GAP)
  for k in rng.permutation(8).tolist():
    if DIRECTIONS[k] == answer(scene):
      continue
    offsets = _offsets(scene.level)[k] + (origin.row, origin.column)
    inside = offsets[((offsets >= 0) & (offsets < canvas.UNITS)).all(-1)]
    allowed = np.zeros_like(free)
    allowed[tuple(inside.T)] = True
    place = things.pick(rng, allowed & free)
    if place is not None:
      moved = replace(subject, row=place[0], column=place[1])
      rest = [t for t in others if t is not origin]
      return _scene(scene.look, scene.level, [moved, origin, *rest])
  return None


def pictures(scene: Scene, side: int) -> np.ndarray:
  """The things on a plain ground, u8[1, side, side, 3]."""
  picture = canvas.blank(side, scene.look.background)
  things.paint(picture, scene.look, scene.things)
  return picture[None]


def question(scene: Scene) -> str:
  """Asks for the direction."""
  return (f'Where is the {scene.things[scene.subject].name}, seen from the '
          f'{scene.things[scene.origin].name}? Answer with one of the options.')


def answer(scene: Scene) -> str:
  """The direction by atan2 of the middles, in bins of 45 degrees round the eight directions."""
  subject, origin = scene.things[scene.subject], scene.things[scene.origin]
  angle = math.atan2(origin.row - subject.row, subject.column - origin.column)
  return DIRECTIONS[round(angle / (math.pi / 4)) % 8]


def options(scene: Scene) -> tuple[str, ...]:
  """All eight directions."""
  del scene
  return DIRECTIONS


def describe(scene: Scene) -> str:
  """The things and their places."""
  return f'Rows count downwards, columns to the right. {things.listed(scene.things)}.'


TASK = base.choosing('direction', 'relation', 'spatial_relation', len(LEVELS), 1, draw, twin,
                     pictures, question, answer, options, describe)
