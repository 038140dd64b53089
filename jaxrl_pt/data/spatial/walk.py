"""Walk: a walk told step by step from inside; on which side of its end lies a place on the way?

Tile t of the picture shows how the walker turned before step t (an arrow: straight on, right,
left or around) and the floor of the cell that he reached; the first tile is the start, without an
arrow. He comes back to cells, whose floor is then the same. No map is shown: the answer follows
from replaying all steps, and lies at least 15 degrees away from the border of the next one.
"""

import dataclasses

import numpy as np

from jaxrl_pt.data.spatial import base, canvas, frames

PLAIN = 'plain'  # The floor of a cell without a colour of its own.
_ARROWS = {'straight': 0, 'right': 1, 'around': 2, 'left': 3}  # quarter turns from up, clockwise
_SHARES = (0.4, 0.22, 0.22, 0.16)  # of frames.TURNS


@dataclasses.dataclass(frozen=True)
class Level:
  """What grows: steps, cells with colours, steps to cells where the walker has been before."""

  num_steps: int
  num_coloured: int
  num_revisits: int


LEVELS = (Level(4, 3, 0), Level(8, 3, 1), Level(12, 4, 3), Level(20, 5, 5), Level(32, 6, 8))


@dataclasses.dataclass(frozen=True)
class Scene:
  """A walk."""

  look: base.Look
  turns: tuple[str, ...]  # frames.TURNS before each of T steps
  floors: tuple[str, ...]  # colour or PLAIN of the start and of the T cells reached
  target: str  # the colour that is asked for


def replay(turns: tuple[str, ...]) -> tuple[list[frames.Vector], frames.Vector]:
  """The cells (down, right) of the start and after each step, and the last heading."""
  cells, heading = [(0, 0)], (-1, 0)
  for turn in turns:
    heading = frames.turned(heading, turn)
    cells.append((cells[-1][0] + heading[0], cells[-1][1] + heading[1]))
  return cells, heading


def is_consistent(scene: Scene) -> bool:
  """Whether a map exists on which the walk sees these floors, each colour in one cell."""
  floor_of: dict[frames.Vector, str] = {}
  cell_of: dict[str, frames.Vector] = {}
  for cell, floor in zip(replay(scene.turns)[0], scene.floors, strict=True):
    if floor_of.setdefault(cell, floor) != floor:
      return False
    if floor != PLAIN and cell_of.setdefault(floor, cell) != cell:
      return False
  return True


def side(scene: Scene) -> str | None:
  """The side of the walker on which the target is at the end, or None where it is not clear."""
  cells, heading = replay(scene.turns)
  return _side(cells, heading, cells[scene.floors.index(scene.target)])


def _side(cells: list[frames.Vector], heading: frames.Vector, target: frames.Vector
          ) -> str | None:
  end = cells[-1]
  return frames.side(heading, (target[0] - end[0], target[1] - end[1]))


# --- Scenes ------------------------------------------------------------------------


def draw(rng: np.random.Generator, level: int, look: base.Look, is_unseen: bool) -> Scene:
  """Draws the side, then walks until the target is there."""
  base.no_composition('walk', is_unseen)
  wanted = frames.SIDES[int(rng.integers(4))]
  grows = LEVELS[level - 1]
  while True:
    turns = tuple(frames.TURNS[k]
                  for k in rng.choice(4, size=grows.num_steps, p=_SHARES).tolist())
    cells, heading = replay(turns)
    distinct = list(dict.fromkeys(cells))
    there = [cell for cell in distinct if _side(cells, heading, cell) == wanted]
    if (not there or len(cells) - len(distinct) < grows.num_revisits
        or len(distinct) < grows.num_coloured):
      continue
    target = there[int(rng.integers(len(there)))]
    rest = [cell for cell in distinct if cell != target]
    chosen = [rest[k] for k in rng.permutation(len(rest))[:grows.num_coloured - 1].tolist()]
    colours = rng.permutation([name for name, _ in look.colours])[:grows.num_coloured].tolist()
    floor_of = dict(zip([target, *chosen], colours, strict=True))
    scene = Scene(look, turns, tuple(floor_of.get(cell, PLAIN) for cell in cells), colours[0])
    if any(_is_twin(scene, other) for other in _changed(scene)):
      return scene


def _changed(scene: Scene) -> list[Scene]:
  """The scenes with one other turn and the same floors."""
  return [dataclasses.replace(scene, turns=(*scene.turns[:step], turn, *scene.turns[step + 1:]))
          for step in range(len(scene.turns)) for turn in frames.TURNS]


def _is_twin(scene: Scene, other: Scene) -> bool:
  """Whether there is such a map, on which the target is on another side that is clear."""
  return is_consistent(other) and side(other) not in (None, side(scene))


def twin(rng: np.random.Generator, scene: Scene) -> Scene:
  """Changes one turn; the floors stay as they are."""
  changed = _changed(scene)
  return next(changed[k] for k in rng.permutation(len(changed)).tolist()
              if _is_twin(scene, changed[k]))


# --- What is shown and asked --------------------------------------------------------


def pictures(scene: Scene, side: int) -> np.ndarray:
  """The tiles row by row in the smallest square that holds them, u8[1, side, side, 3]."""
  ground = scene.look.background
  picture = canvas.blank(side, ground)
  across = next(k for k in range(1, len(scene.floors) + 1) if k * k >= len(scene.floors))
  size = canvas.UNITS // across
  for k, floor in enumerate(scene.floors):
    top, left = size * (k // across), size * (k % across)
    colour = canvas.ink(ground) if floor == PLAIN else scene.look.rgb(floor)
    tile = canvas.Box(top, left, top + size - 1, left + size - 1)
    canvas.rectangle(picture, tile, colour)
    if k > 0:
      inner = canvas.Box(top + 1, left + 1, top + size - 2, left + size - 2)
      _paint_arrow(picture, inner, _ARROWS[scene.turns[k - 1]], ground)
  return picture[None]


def _paint_arrow(picture: np.ndarray, box: canvas.Box, quarter_turns: int,
                 colour: canvas.Colour) -> None:
  """Paints an arrow without a shaft, which can be told from others in five pixels."""
  rows, columns = canvas.pixels(box, len(picture))
  height, width = rows.stop - rows.start, columns.stop - columns.start
  upright = canvas.mask('triangle', *((height, width)[::-1 if quarter_turns % 2 else 1]))
  picture[rows, columns][np.rot90(upright, -quarter_turns)] = colour


def question(scene: Scene) -> str:
  """Says how to read the tiles and asks for the side."""
  return ('A walk, in rows from left to right: an arrow is the turn before a step, its colour the '
          f'floor reached. At the end, on which side is the {scene.target} floor?')


def answer(scene: Scene) -> str:
  """By replaying the walk."""
  found = side(scene)
  assert found is not None
  return found


def options(scene: Scene) -> tuple[str, ...]:
  """The four sides."""
  del scene
  return frames.SIDES


def describe(scene: Scene) -> str:
  """The steps in words."""
  steps = [f'{turn} to {floor}' for turn, floor in zip(scene.turns, scene.floors[1:], strict=True)]
  return f'Start on {scene.floors[0]}; {"; ".join(steps)}.'


TASK = base.choosing('walk', 'memory', 'spatial_manipulation', len(LEVELS), 1, draw, twin, pictures,
                     question, answer, options, describe)
