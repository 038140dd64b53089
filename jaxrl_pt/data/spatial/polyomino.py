"""Polyomino: are two figures of squares the same but for a turn, or mirror images?

Both figures are made of one chiral polyomino, which no turn takes to its mirror image. The second
is turned by 90, 180 or 270 degrees, and mirrored in half of the items, so that neither its outline
nor its turn tells the answer. The verifier compares canonical forms under the four turns.
"""

import dataclasses

import numpy as np

from jaxrl_pt.data.spatial import base, boards, canvas

SAME, MIRRORED = OPTIONS = ('same', 'mirrored')
_BOX = 5  # cells of the square in which each figure lies
_SIZE, _TOP = 4, 14  # units of a cell, and above the squares
Cells = frozenset[boards.Cell]


@dataclasses.dataclass(frozen=True)
class Level:
  """What grows: the fewest and the most cells of a figure, and the angles in quarter turns."""

  num_cells: tuple[int, int]
  turns: tuple[int, ...]


LEVELS = (Level((4, 5), (2,)), Level((5, 6), (1, 2, 3)), Level((6, 7), (1, 2, 3)),
          Level((8, 8), (1, 2, 3)), Level((9, 9), (1, 2, 3)))


@dataclasses.dataclass(frozen=True)
class Scene:
  """Two figures side by side."""

  look: base.Look
  first: boards.Board  # _BOX rows of 0 and 1
  second: boards.Board
  first_colour: str
  second_colour: str


# --- Figures ----------------------------------------------------------------------


def cells(board: boards.Board) -> Cells:
  """Which cells of a board are filled."""
  return frozenset((r, c) for r, row in enumerate(board) for c, cell in enumerate(row) if cell)


def canonical(figure: Cells) -> tuple[boards.Cell, ...]:
  """The least of the sorted cells of a figure's four turns, each moved to the top left corner."""
  forms = []
  for _ in range(4):
    figure = _turned(figure)
    forms.append(tuple(sorted(_cornered(figure))))
  return min(forms)


def _cornered(figure: Cells) -> Cells:
  top, left = min(r for r, _ in figure), min(c for _, c in figure)
  return frozenset((r - top, c - left) for r, c in figure)


def _turned(figure: Cells) -> Cells:
  return frozenset((c, -r) for r, c in figure)


def _mirror(figure: Cells) -> Cells:
  return frozenset((r, -c) for r, c in figure)


def _extent(figure: Cells) -> tuple[int, int]:
  figure = _cornered(figure)
  return 1 + max(r for r, _ in figure), 1 + max(c for _, c in figure)


def _chiral(rng: np.random.Generator, num_cells: int) -> Cells:
  """Grows figures cell by cell inside the box until one differs from its mirror image."""
  while True:
    figure = {(0, 0)}
    while len(figure) < num_cells:
      rim = sorted({(r + dr, c + dc) for r, c in figure
                    for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0))} - figure)
      figure.add(rim[int(rng.integers(len(rim)))])
    grown = frozenset(figure)
    if max(_extent(grown)) <= _BOX and canonical(grown) != canonical(_mirror(grown)):
      return grown


def _placed(rng: np.random.Generator, figure: Cells) -> boards.Board:
  """A board with a figure at a random place of the box."""
  height, width = _extent(figure)
  top, left = int(rng.integers(_BOX - height + 1)), int(rng.integers(_BOX - width + 1))
  return _board(frozenset((r + top, c + left) for r, c in _cornered(figure)))


def _board(figure: Cells) -> boards.Board:
  return tuple(tuple(int((r, c) in figure) for c in range(_BOX)) for r in range(_BOX))


# --- Scenes ------------------------------------------------------------------------


def draw(rng: np.random.Generator, level: int, look: base.Look, is_unseen: bool) -> Scene:
  """Draws a figure, and the second one turned, and mirrored in half of the scenes."""
  base.no_composition('polyomino', is_unseen)
  low, high = LEVELS[level - 1].num_cells
  figure = _chiral(rng, int(rng.integers(low, high + 1)))
  other = _mirror(figure) if rng.integers(2) else figure
  for _ in range(int(rng.choice(LEVELS[level - 1].turns))):
    other = _turned(other)
  first, second = rng.permutation(len(look.colours))[:2].tolist()
  return Scene(look, _placed(rng, figure), _placed(rng, other), look.colours[first][0],
               look.colours[second][0])


def twin(rng: np.random.Generator, scene: Scene) -> Scene:
  """The second figure becomes its mirror image, inside the same outline."""
  del rng
  figure = cells(scene.second)
  left, right = min(c for _, c in figure), max(c for _, c in figure)
  flipped = frozenset((r, left + right - c) for r, c in figure)
  return dataclasses.replace(scene, second=_board(flipped))


def pictures(scene: Scene, side: int) -> np.ndarray:
  """The two figures, with a line between them, u8[1, side, side, 3]."""
  picture = canvas.blank(side, scene.look.background)
  ground = scene.look.background
  for board, colour, left in ((scene.first, scene.first_colour, 1),
                              (scene.second, scene.second_colour, 27)):
    boards.paint(picture, board, (ground, scene.look.rgb(colour)), _TOP, left, _SIZE)
  canvas.rectangle(picture, canvas.Box(0, 23, 48, 25), canvas.ink(ground))
  return picture[None]


def question(scene: Scene) -> str:
  """Asks for the same or mirrored."""
  del scene
  return ('Is the figure on the right the one on the left after a turn, or its mirror image? '
          'Answer same or mirrored.')


def answer(scene: Scene) -> str:
  """By comparison of the canonical forms."""
  return SAME if canonical(cells(scene.first)) == canonical(cells(scene.second)) else MIRRORED


def options(scene: Scene) -> tuple[str, ...]:
  """Same or mirrored."""
  del scene
  return OPTIONS


def describe(scene: Scene) -> str:
  """Both figures as rows of x and dots."""
  first, second = (boards.text(board, ('x',)) for board in (scene.first, scene.second))
  return f'Left: {first}; right: {second};'


TASK = base.choosing('polyomino', 'transformation', 'spatial_manipulation', len(LEVELS), 1, draw,
                     twin, pictures, question, answer, options, describe)
