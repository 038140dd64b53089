"""Views: two pictures of parts of one map, the second turned; how do things in each of them lie?

The first picture is a window of the map, and the second a window of the same size elsewhere, turned
by quarter turns. At least two things lie in both, so that exactly one place and one turn of the
second picture fit. The question is about a thing that only the first picture shows and one that
only the second shows. The answer follows from their places on the map.
"""

import dataclasses
import math

import numpy as np

from jaxrl_pt.data.spatial import base, canvas, things
from jaxrl_pt.data.spatial.direction import DIRECTIONS
from jaxrl_pt.data.spatial.things import Thing

SIZE = 7
MARGIN = 8.0  # Degrees from the border of two directions at least.
_NUM_CELLS, _PITCH = 6, 8  # Cells of a window each way, and units of a cell.
_MOST = 4  # cells by which windows are apart at most, each way
_MIN_DISTANCE = 2 * _PITCH


@dataclasses.dataclass(frozen=True)
class Level:
  """What grows: things in both windows (fewer), others in one of them (more), quarter turns."""

  num_shared: int
  num_others: int  # in each window, beside the thing that the question names
  turns: tuple[int, ...]


LEVELS = (Level(3, 0, (0,)), Level(3, 1, (0, 1, 2, 3)), Level(2, 1, (0, 1, 2, 3)),
          Level(2, 3, (0, 1, 2, 3)), Level(2, 5, (0, 1, 2, 3)))


@dataclasses.dataclass(frozen=True)
class Scene:
  """Where is the thing `subject`, in the second window alone, from `origin`, in the first alone?"""

  look: base.Look
  things: tuple[Thing, ...]  # in the order of places on the map; the first window begins at (0, 0)
  window: tuple[int, int]  # the units (row, column) of the map at which the second window begins
  turns: int  # quarter turns clockwise by which the second picture is turned
  subject: int
  origin: int


def _is_in(row: int, column: int, window: tuple[int, int]) -> bool:
  return (0 <= row - window[0] < canvas.UNITS) and (0 <= column - window[1] < canvas.UNITS)


def shown(scene: Scene) -> tuple[list[Thing], list[Thing]]:
  """What each picture shows, with places in the picture."""
  first = [thing for thing in scene.things if _is_in(thing.row, thing.column, (0, 0))]
  second = []
  for thing in scene.things:
    if _is_in(thing.row, thing.column, scene.window):
      row, column = thing.row - scene.window[0], thing.column - scene.window[1]
      for _ in range(scene.turns):
        row, column = column, canvas.UNITS - row
      second.append(dataclasses.replace(thing, row=row, column=column))
  return first, sorted(second)


def _direction(rows: int, columns: int) -> str | None:
  """The direction of an offset, or None where it is near the border of two, or too short."""
  eighths = math.atan2(-rows, columns) / (math.pi / 4)
  off = abs(eighths - round(eighths)) * 45  # degrees from the axis of the direction
  is_clear = off <= 22.5 - MARGIN and math.hypot(rows, columns) >= _MIN_DISTANCE
  return DIRECTIONS[round(eighths) % 8] if is_clear else None


# --- Scenes ------------------------------------------------------------------------


def draw(rng: np.random.Generator, level: int, look: base.Look, is_unseen: bool) -> Scene:
  """Draws the direction, then windows and places until there is such a scene."""
  base.no_composition('views', is_unseen)
  wanted = DIRECTIONS[int(rng.integers(8))]
  grows = LEVELS[level - 1]
  named = things.names(rng, look, 2 + grows.num_shared + 2 * grows.num_others)
  turns = int(rng.choice(grows.turns))
  while True:
    window = tuple((_PITCH * rng.integers(-_MOST, _MOST + 1, size=2)).tolist())
    places = _places(rng, window, grows)
    if places is not None:
      placed = [Thing(*place, *name, SIZE) for place, name in zip(places, named, strict=True)]
      scene = _scene(look, placed, window, turns)
      if direction(scene) == wanted and _others(scene):
        return scene


def _places(rng: np.random.Generator, window: tuple[int, int], level: Level
            ) -> list[tuple[int, int]] | None:
  """Places of subject, origin, shared things, others in the first window, others in the second."""
  middles = range(_PITCH // 2 - _MOST * _PITCH, canvas.UNITS + _MOST * _PITCH, _PITCH)
  everywhere = [(row, column) for row in middles for column in middles]
  first = {place for place in everywhere if _is_in(*place, (0, 0))}
  second = {place for place in everywhere if _is_in(*place, window)}
  taken = []
  for cells, count in ((first & second, level.num_shared), (first - second, 1 + level.num_others),
                       (second - first, 1 + level.num_others)):
    if len(cells) < count:
      return None
    ordered = sorted(cells)
    taken.append([ordered[k] for k in rng.permutation(len(ordered))[:count].tolist()])
  shared, (origin, *in_first), (subject, *in_second) = taken
  return [subject, origin, *shared, *in_first, *in_second]


def _scene(look: base.Look, placed: list[Thing], window: tuple[int, int], turns: int) -> Scene:
  """The scene of things of which the first is the subject and the second the origin."""
  ordered = tuple(sorted(placed))
  return Scene(look, ordered, window, turns, ordered.index(placed[0]), ordered.index(placed[1]))


def direction(scene: Scene) -> str | None:
  """The direction by atan2 of places on the map, or None where it is not clear."""
  subject, origin = scene.things[scene.subject], scene.things[scene.origin]
  return _direction(subject.row - origin.row, subject.column - origin.column)


def _others(scene: Scene) -> list[Scene]:
  """The scenes in which the subject alone has moved, inside the second window alone."""
  subject, origin = scene.things[scene.subject], scene.things[scene.origin]
  rest = [thing for thing in scene.things if thing not in (subject, origin)]
  taken = {(thing.row, thing.column) for thing in scene.things}
  found = []
  for row in range(_PITCH // 2 + scene.window[0], canvas.UNITS + scene.window[0], _PITCH):
    for column in range(_PITCH // 2 + scene.window[1], canvas.UNITS + scene.window[1], _PITCH):
      way = _direction(row - origin.row, column - origin.column)
      if (not _is_in(row, column, (0, 0)) and (row, column) not in taken
          and way not in (None, direction(scene))):
        moved = dataclasses.replace(subject, row=row, column=column)
        found.append(_scene(scene.look, [moved, origin, *rest], scene.window, scene.turns))
  return found


def twin(rng: np.random.Generator, scene: Scene) -> Scene:
  """Moves the subject inside the second window to another direction."""
  others = _others(scene)
  return others[int(rng.integers(len(others)))]


# --- What is shown and asked --------------------------------------------------------


def pictures(scene: Scene, side: int) -> np.ndarray:
  """Both windows, u8[2, side, side, 3]."""
  both = np.stack([canvas.blank(side, scene.look.background)] * 2)
  for picture, placed in zip(both, shown(scene), strict=True):
    things.paint(picture, scene.look, placed)
  return both


def question(scene: Scene) -> str:
  """Says how the pictures belong together and asks for the direction in the first."""
  return ('Both pictures show parts of one map; the second may be turned. Seen as in the first, '
          f'where is the {scene.things[scene.subject].name} from the '
          f'{scene.things[scene.origin].name}?')


def answer(scene: Scene) -> str:
  """By the places on the map."""
  found = direction(scene)
  assert found is not None
  return found


def options(scene: Scene) -> tuple[str, ...]:
  """All eight directions."""
  del scene
  return DIRECTIONS


def describe(scene: Scene) -> str:
  """The things of both pictures and their places there."""
  first, second = (things.listed(placed) for placed in shown(scene))
  return (f'Rows count downwards, columns to the right. First picture: {first}. Second picture: '
          f'{second}.')


TASK = base.choosing('views', 'perspective', 'spatial_relation', len(LEVELS), 2, draw, twin,
                     pictures, question, answer, options, describe)
