"""Task `localise`: in which cell of a grid a thing lies.

A thing fills the middle of its cell, and the thing asked about is the only one of its colour.
"""

from dataclasses import dataclass, replace

import numpy as np

from jaxrl_pt.data.spatial import base, canvas
from jaxrl_pt.data.spatial.canvas import Box

_WHOLE = Box(0, 0, canvas.UNITS, canvas.UNITS)


@dataclass(frozen=True)
class Level:
  """Cells each way, and how many other things there are."""

  num_cells: int
  num_others: int


LEVELS = (Level(3, 2), Level(4, 4), Level(5, 6), Level(6, 9), Level(8, 14))


@dataclass(frozen=True, order=True)
class Placed:
  """A thing in a cell, counted from 0 at the upper left."""

  row: int
  column: int
  colour: str
  shape: str


@dataclass(frozen=True)
class Scene:
  """In which cell is the thing `asked`? Things are in the order of cells."""

  look: base.Look
  level: int
  things: tuple[Placed, ...]
  asked: int


def draw(rng: np.random.Generator, level: int, look: base.Look, is_unseen: bool) -> Scene:
  """Draws different cells."""
  base.no_composition('localise', is_unseen)
  n = LEVELS[level - 1].num_cells
  count = 1 + LEVELS[level - 1].num_others
  cells = rng.permutation(n * n)[:count].tolist()
  first, *rest = [look.colours[k][0] for k in rng.permutation(len(look.colours)).tolist()]
  colours = [first, *rng.choice(rest, count - 1).tolist()]
  shapes = rng.choice(look.shapes, count).tolist()
  placed = [Placed(cell // n, cell % n, colour, shape)
            for cell, colour, shape in zip(cells, colours, shapes, strict=True)]
  ordered = tuple(sorted(placed))
  return Scene(look, level, ordered, ordered.index(placed[0]))


def twin(rng: np.random.Generator, scene: Scene) -> Scene:
  """Moves the thing asked about into a cell that is empty."""
  n = LEVELS[scene.level - 1].num_cells
  taken = {(t.row, t.column) for t in scene.things}
  empty = [cell for cell in range(n * n) if divmod(cell, n) not in taken]
  row, column = divmod(empty[rng.integers(len(empty))], n)
  asked = scene.things[scene.asked]
  moved = replace(asked, row=row, column=column)
  ordered = tuple(sorted([moved, *(t for t in scene.things if t is not asked)]))
  return replace(scene, things=ordered, asked=ordered.index(moved))


def pictures(scene: Scene, side: int) -> np.ndarray:
  """The grid with a thing in some of its cells, u8[1, side, side, 3]."""
  picture = canvas.blank(side, scene.look.background)
  n = LEVELS[scene.level - 1].num_cells
  canvas.grid(picture, _WHOLE, n, n, canvas.faint(scene.look.background))
  for t in scene.things:
    box = canvas.cell(_WHOLE, n, n, t.row, t.column)
    edge = 2 if n < 6 else 1
    middle = Box(box.top + edge, box.left + edge, box.bottom - edge, box.right - edge)
    canvas.shape(picture, t.shape, middle, scene.look.rgb(t.colour))
  return picture[None]


def question(scene: Scene) -> str:
  """Asks for row and column."""
  return (f'In which cell of the grid is the {scene.things[scene.asked].colour} thing? Answer with '
          'its row, counted from 1 at the top, a blank, and its column, counted from 1 at the '
          'left.')


def answer(scene: Scene) -> str:
  """Row and column, counted from 1."""
  asked = scene.things[scene.asked]
  return f'{asked.row + 1} {asked.column + 1}'


def options(scene: Scene) -> tuple[str, ...]:
  """All cells."""
  n = LEVELS[scene.level - 1].num_cells
  return tuple(f'{row} {column}' for row in range(1, n + 1) for column in range(1, n + 1))


def describe(scene: Scene) -> str:
  """The grid in rows, a dot for an empty cell."""
  n = LEVELS[scene.level - 1].num_cells
  held = {(t.row, t.column): f'{t.colour} {t.shape}' for t in scene.things}
  return 'Rows from the top, cells from the left: ' + ' / '.join(
      ', '.join(held.get((row, column), '.') for column in range(n)) for row in range(n)) + '.'


TASK = base.choosing('localise', 'relation', 'pattern_matching', len(LEVELS), 1, draw, twin,
                     pictures, question, answer, options, describe)
