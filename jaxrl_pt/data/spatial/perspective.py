"""Perspective: stand at one thing, face another, turn; on which side is a third?

Things lie in the cells of a grid. The answer is a change of frame by an integer rotation, and lies
at least 15 degrees away from the border of the next one.
"""

import dataclasses

import numpy as np

from jaxrl_pt.data.spatial import base, canvas, frames, things
from jaxrl_pt.data.spatial.things import Thing

SIZE = 7
_NUM_CELLS, _PITCH = 6, 8  # Cells each way, and units of a cell.


@dataclasses.dataclass(frozen=True)
class Level:
  """What grows: other things, turns; and whether one may face along more than rows and columns."""

  num_others: int
  num_turns: int
  is_oblique: bool


LEVELS = (Level(0, 0, False), Level(1, 0, True), Level(2, 1, True), Level(4, 2, True),
          Level(6, 3, True))


@dataclasses.dataclass(frozen=True)
class Scene:
  """Standing at thing `station`, facing thing `ahead`, turning: where is thing `subject`?"""

  look: base.Look
  things: tuple[Thing, ...]  # in the order of places
  station: int
  ahead: int
  subject: int
  turns: tuple[str, ...]


def _scene(look: base.Look, placed: list[Thing], turns: tuple[str, ...]) -> Scene:
  """The scene of things of which the first three are station, ahead and subject."""
  ordered = tuple(sorted(placed))
  station, ahead, subject = (ordered.index(thing) for thing in placed[:3])
  return Scene(look, ordered, station, ahead, subject, turns)


def _middle(cell: int) -> tuple[int, int]:
  row, column = divmod(cell, _NUM_CELLS)
  return _PITCH * row + _PITCH // 2, _PITCH * column + _PITCH // 2


def side(scene: Scene) -> str | None:
  """The side on which the subject is, or None where that is not clear."""
  station, ahead, subject = (scene.things[k]
                             for k in (scene.station, scene.ahead, scene.subject))
  heading = ahead.row - station.row, ahead.column - station.column
  for turn in scene.turns:
    heading = frames.turned(heading, turn)
  return frames.side(heading, (subject.row - station.row, subject.column - station.column))


def draw(rng: np.random.Generator, level: int, look: base.Look, is_unseen: bool) -> Scene:
  """Draws the side, then places until the subject is there."""
  base.no_composition('perspective', is_unseen)
  wanted = frames.SIDES[int(rng.integers(4))]
  grows = LEVELS[level - 1]
  turns = tuple(frames.TURNS[k] for k in rng.integers(1, 4, size=grows.num_turns).tolist())
  named = things.names(rng, look, 3 + grows.num_others)
  while True:
    cells = rng.permutation(_NUM_CELLS**2)[:len(named)].tolist()
    placed = [Thing(*_middle(cell), *name, SIZE) for cell, name in zip(cells, named, strict=True)]
    scene = _scene(look, placed, turns)
    is_straight = placed[0].row == placed[1].row or placed[0].column == placed[1].column
    if (side(scene) == wanted and (is_straight or grows.is_oblique) and _others(scene)):
      return scene


def _others(scene: Scene) -> list[Scene]:
  """The scenes in which the subject alone has moved, to a side that is clear and another."""
  station, ahead, subject = (scene.things[k]
                             for k in (scene.station, scene.ahead, scene.subject))
  rest = [thing for k, thing in enumerate(scene.things)
          if k not in (scene.station, scene.ahead, scene.subject)]
  taken = {(thing.row, thing.column) for thing in scene.things}
  found = []
  for row, column in (_middle(cell) for cell in range(_NUM_CELLS**2)):
    if (row, column) not in taken:
      moved = dataclasses.replace(subject, row=row, column=column)
      found.append(_scene(scene.look, [station, ahead, moved, *rest], scene.turns))
  return [other for other in found if side(other) not in (None, side(scene))]


def twin(rng: np.random.Generator, scene: Scene) -> Scene:
  """Moves the subject to another side."""
  others = _others(scene)
  return others[int(rng.integers(len(others)))]


def pictures(scene: Scene, side: int) -> np.ndarray:
  """The things on a plain ground, u8[1, side, side, 3]."""
  picture = canvas.blank(side, scene.look.background)
  things.paint(picture, scene.look, scene.things)
  return picture[None]


def question(scene: Scene) -> str:
  """Says where to stand and how to turn, and asks for the side."""
  station, ahead, subject = (scene.things[k].name
                             for k in (scene.station, scene.ahead, scene.subject))
  turns = ''.join(f', turn {turn}' for turn in scene.turns)
  return (f'Stand at the {station}, face the {ahead}{turns}. On which side is the '
          f'{subject}?')


def answer(scene: Scene) -> str:
  """By the change of frame."""
  found = side(scene)
  assert found is not None
  return found


def options(scene: Scene) -> tuple[str, ...]:
  """The four sides."""
  del scene
  return frames.SIDES


def describe(scene: Scene) -> str:
  """The things and their places."""
  return f'Rows count downwards, columns to the right. {things.listed(scene.things)}.'


TASK = base.choosing('perspective', 'perspective', 'spatial_manipulation', len(LEVELS), 1, draw,
                     twin, pictures, question, answer, options, describe)
