"""Boards: rows of palette indices as tuples, the operations on them, and how they are painted.

Index 0 is an empty cell; index i > 0 is the i-th colour of a palette. Letters name the boards among
which an answer chooses.
"""

from collections.abc import Sequence

import numpy as np

from jaxrl_pt.data.spatial import canvas

Board = tuple[tuple[int, ...], ...]
Cell = tuple[int, int]  # row and column, from the top left

LETTERS = ('A', 'B', 'C', 'D')


def clockwise(board: Board) -> Board:
  """The board after a quarter turn clockwise."""
  return tuple(zip(*board[::-1], strict=True))


def counterclockwise(board: Board) -> Board:
  """The board after a quarter turn counterclockwise."""
  return tuple(zip(*board, strict=True))[::-1]


def half_turn(board: Board) -> Board:
  """The board after a half turn."""
  return tuple(row[::-1] for row in board[::-1])


def across(board: Board) -> Board:
  """The board with left and right exchanged."""
  return tuple(row[::-1] for row in board)


def over(board: Board) -> Board:
  """The board with top and bottom exchanged."""
  return board[::-1]


def left(board: Board) -> Board:
  """The board with its columns one place further left; the first one becomes the last."""
  return tuple((*row[1:], row[0]) for row in board)


def right(board: Board) -> Board:
  """The board with its columns one place further right; the last one becomes the first."""
  return tuple((row[-1], *row[:-1]) for row in board)


def down(board: Board) -> Board:
  """The board with its rows one place further down; the last one becomes the first."""
  return (board[-1], *board[:-1])


def text(board: Board, names: Sequence[str]) -> str:
  """The rows of a board from the top, with '.' for empty cells and names for the others."""
  return ' / '.join(' '.join(names[cell - 1] if cell else '.' for cell in row) for row in board)


def steps_text(steps: Sequence[str], after: Sequence[Board], names: Sequence[str]) -> str:
  """Steps and the boards after them, a line each."""
  return '\n'.join(f'{step}: {text(board, names)}'
                   for step, board in zip(steps, after, strict=True))


def paint(picture: np.ndarray, board: Board, colours: Sequence[canvas.Colour], top: int, left: int,
          size: int, gap: int = 1) -> None:
  """Paints a board into a picture, in place.

  Args:
    picture: u8[side, side, 3].
    board: its rows.
    colours: the colour of each index of the board, that of empty cells first.
    top, left: the first units of the board.
    size: units of a cell.
    gap: how many of them, at the cell's bottom and right, stay as they were.
  """
  for r, row in enumerate(board):
    for c, index in enumerate(row):
      y, x = top + r * size, left + c * size
      canvas.rectangle(picture, canvas.Box(y, x, y + size - gap, x + size - gap), colours[index])
