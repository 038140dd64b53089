"""Drawing in integer pixels: filled shapes, lines, grids, arrows and small letters.

Scenes are measured in units, of which a picture has 48 each way, rows downwards. Every edge is
scaled by itself (`pixel`), so that at any side of 48 pixels or more things that share an edge
still do, things in line stay in line, and a gap of a unit is at least a pixel. Pictures are
painted in place; nothing is anti-aliased, so that a pixel has exactly one colour of the scene.
"""

import functools
from typing import NamedTuple

import numpy as np

UNITS = 48
Colour = tuple[int, int, int]
# Letters and digits of three by five pixels, rows from the top, bits from the left.
_GLYPHS = {
    'A': (2, 5, 7, 5, 5), 'B': (6, 5, 6, 5, 6), 'C': (3, 4, 4, 4, 3), 'D': (6, 5, 5, 5, 6),
    'E': (7, 4, 6, 4, 7), 'F': (7, 4, 6, 4, 4), 'G': (3, 4, 5, 5, 3), 'H': (5, 5, 7, 5, 5),
    'L': (4, 4, 4, 4, 7), 'N': (6, 5, 5, 5, 5), 'R': (6, 5, 6, 5, 5), 'S': (3, 4, 2, 1, 6),
    'U': (5, 5, 5, 5, 7), 'W': (5, 5, 7, 7, 5), '0': (7, 5, 5, 5, 7), '1': (2, 6, 2, 2, 7),
    '2': (6, 1, 2, 4, 7), '3': (6, 1, 2, 1, 6), '4': (5, 5, 7, 1, 1), '5': (7, 4, 6, 1, 6),
    '6': (3, 4, 7, 5, 7), '7': (7, 1, 2, 2, 2), '8': (7, 5, 7, 5, 7), '9': (7, 5, 7, 1, 6),
}


class Box(NamedTuple):
  """A rectangle in units; bottom and right are outside of it."""

  top: int
  left: int
  bottom: int
  right: int


def around(row: int, column: int, size: int) -> Box:
  """The square of an odd number of units whose middle unit is (row, column)."""
  half = size // 2
  return Box(row - half, column - half, row + half + 1, column + half + 1)


def blank(side: int, background: Colour) -> np.ndarray:
  """A picture of one colour, u8[side, side, 3]."""
  picture = np.empty((side, side, 3), np.uint8)
  picture[:] = background
  return picture


def pixel(units: int, side: int) -> int:
  """The first pixel of a row or column of units."""
  return units * side // UNITS


def pixels(box: Box, side: int) -> tuple[slice, slice]:
  """The rows and columns of pixels that a box covers."""
  top, left, bottom, right = (pixel(edge, side) for edge in box)
  return slice(top, bottom), slice(left, right)


@functools.lru_cache(maxsize=4096)
def mask(name: str, height: int, width: int) -> np.ndarray:
  """Which pixels of a box a shape fills, bool[height, width].

  Raises:
    ValueError: no shape has this name.
  """
  r = ((2 * np.arange(height) + 1 - height) / height)[:, None]  # Middles of pixels, -1 to 1.
  c = ((2 * np.arange(width) + 1 - width) / width)[None, :]
  filled: np.ndarray
  match name:
    case 'square':
      filled = (abs(r) <= 1) & (abs(c) <= 1)
    case 'disc':
      filled = r**2 + c**2 <= 1
    case 'triangle':
      filled = abs(c) <= (r + 1) / 2 + 0.1
    case 'plus':
      filled = (abs(r) < 0.26) | (abs(c) < 0.26)
    case 'diamond':
      filled = abs(r) + abs(c) <= 1.01
    case 'ring':
      filled = (r**2 + c**2 <= 1) & (r**2 + c**2 >= 0.3)
    case 'frame':
      filled = np.maximum(abs(r), abs(c)) > 0.5
    case 'hourglass':
      filled = abs(c) <= abs(r) + 0.17
    case 'cross':
      filled = abs(abs(r) - abs(c)) < 0.35
    case 'chevron':
      above = (r + 1 - abs(c)) / 2  # Of the height, measured from the upper edge.
      filled = (above >= -0.01) & (above <= 0.51)
    case _:
      raise ValueError(f'No shape is called {name!r}.')
  filled.setflags(write=False)
  return filled


def shape(picture: np.ndarray, name: str, box: Box, colour: Colour) -> None:
  """Fills a shape that touches the edges of a box."""
  rows, columns = pixels(box, len(picture))
  filled = mask(name, rows.stop - rows.start, columns.stop - columns.start)
  picture[rows, columns][filled] = colour


def rectangle(picture: np.ndarray, box: Box, colour: Colour) -> None:
  """Fills a box."""
  picture[pixels(box, len(picture))] = colour


def outline(picture: np.ndarray, box: Box, colour: Colour, thickness: int = 1) -> None:
  """Draws the border of a box, inside of it, so many units thick."""
  for edge in (box._replace(bottom=box.top + thickness), box._replace(top=box.bottom - thickness),
               box._replace(right=box.left + thickness), box._replace(left=box.right - thickness)):
    rectangle(picture, edge, colour)


def line(picture: np.ndarray, start: tuple[int, int], end: tuple[int, int],
         colour: Colour) -> None:
  """Draws a line one unit thick between two units (row, column), both included."""
  steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
  for step in range(steps + 1):
    row, column = (a + ((b - a) * step * 2 + steps) // (2 * steps) if steps else a
                   for a, b in zip(start, end, strict=True))
    rectangle(picture, Box(row, column, row + 1, column + 1), colour)


def grid(picture: np.ndarray, box: Box, num_rows: int, num_columns: int, colour: Colour) -> None:
  """Draws lines one pixel thick round the cells of a grid that divides a box."""
  rows, columns = pixels(box, len(picture))
  for k in range(num_rows + 1):
    row = rows.start + (rows.stop - rows.start - 1) * k // num_rows
    picture[row, columns] = colour
  for k in range(num_columns + 1):
    column = columns.start + (columns.stop - columns.start - 1) * k // num_columns
    picture[rows, column] = colour


def cell(box: Box, num_rows: int, num_columns: int, row: int, column: int) -> Box:
  """The cell (row, column) of a grid that divides a box, counted from 0."""
  height, width = box.bottom - box.top, box.right - box.left
  return Box(box.top + height * row // num_rows, box.left + width * column // num_columns,
             box.top + height * (row + 1) // num_rows,
             box.left + width * (column + 1) // num_columns)


@functools.lru_cache(maxsize=1024)
def _arrow(height: int, width: int) -> np.ndarray:
  """An arrow that points up: a head over the upper half, a shaft below it."""
  r = ((np.arange(height) + 0.5) / height)[:, None]
  c = abs((2 * np.arange(width) + 1 - width) / width)[None, :]
  return np.where(r < 0.6, c <= r / 0.6, c < 0.3)


def arrow(picture: np.ndarray, box: Box, quarter_turns: int, colour: Colour) -> None:
  """Fills an arrow in a box: 0 points up, 1 right, 2 down, 3 left."""
  rows, columns = pixels(box, len(picture))
  height, width = rows.stop - rows.start, columns.stop - columns.start
  upright = _arrow(*((height, width) if quarter_turns % 2 == 0 else (width, height)))
  picture[rows, columns][np.rot90(upright, -quarter_turns)] = colour


def letter(picture: np.ndarray, text: str, row: int, column: int, colour: Colour,
           scale: int = 1) -> None:
  """Draws a capital or digit of 5 by 3 units, times the scale, below and right of a unit."""
  for i, bits in enumerate(_GLYPHS[text]):
    for j in range(3):
      if bits >> (2 - j) & 1:
        top, left = row + i * scale, column + j * scale
        rectangle(picture, Box(top, left, top + scale, left + scale), colour)


def faint(background: Colour) -> Colour:
  """A colour for grids and marks that is a little off the background and no thing's colour."""
  step = 56 if sum(background) < 384 else -56
  red, green, blue = (channel + step for channel in background)
  return red, green, blue


def ink(background: Colour) -> Colour:
  """A grey that stands out from the background and is no thing's colour."""
  return (150, 150, 154) if sum(background) < 384 else (90, 90, 94)
