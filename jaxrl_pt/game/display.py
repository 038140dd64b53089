"""The display of the counters: a font of digits, how they are drawn, and what frames are cut into.

The glyphs have 3 × 5 dots, and any two of them differ in three dots at least, so that a digit is
not mistaken for another because of one pixel.
"""

from typing import NamedTuple

from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg

_GLYPHS = ('111/101/101/101/111', '010/110/010/010/111', '111/001/111/100/111',
           '110/001/010/001/110', '101/101/111/001/001', '111/100/111/001/110',
           '011/100/110/101/010', '111/001/001/010/010', '111/101/010/101/111',
           '010/101/011/001/110')
# bool[10, 5, 3]
FONT = np.array([[[dot == '1' for dot in row] for row in glyph.split('/')] for glyph in _GLYPHS])
INK = (255, 255, 255)
PAPER = (24, 24, 40)
NUM_ROWS = 7  # units that the display takes at the top of a frame: glyphs with a margin


class Scale(NamedTuple):
  """A frame in units: a unit is a square of `unit` × `unit` pixels; frames are 32 units wide."""

  unit: int
  rows: int

  @property
  def frame_shape(self) -> tuple[int, int]:
    return self.rows * self.unit, 32 * self.unit


def scale(frame: cfg.FrameSize) -> Scale:
  """The units of a frame of that size."""
  return {'24x32': Scale(1, 24), '64x64': Scale(2, 32), '128x128': Scale(4, 32)}[frame]


def enlarged(pattern: np.ndarray, unit: int) -> np.ndarray:
  """[..., h, w, 3] in units → [..., h · unit, w · unit, 3] in pixels."""
  return pattern.repeat(unit, axis=-3).repeat(unit, axis=-2)


def background(shape: Scale, *bands: tuple[int, tuple[int, int, int]]) -> np.ndarray:
  """A frame with an empty display and, below it, bands of one colour each.

  Args:
    shape: the size.
    bands: (first row in units, colour), in the order of the rows.

  Returns:
    u8[H, W, 3].
  """
  canvas = np.full((shape.rows, 32, 3), PAPER, np.uint8)
  for row, colour in bands:
    canvas[row:] = colour
  return enlarged(canvas, shape.unit)


class Digits(NamedTuple):
  """A row of digits of the display.

  column: of the first digit, in units; its top row is 1.
  num_digits: how many.
  unit: pixels of a unit.
  """

  column: int
  num_digits: int
  unit: int

  @property
  def templates(self) -> np.ndarray:
    """u8[10, 5 · unit, 3 · unit, 3]: what each digit looks like."""
    glyphs = np.where(FONT[..., None], np.array(INK, np.uint8), np.array(PAPER, np.uint8))
    return enlarged(glyphs, self.unit)

  def draw(self, canvas: Array, value: Array) -> Array:
    """The frame u8[H, W, 3] with the digits of i32[] `value`, zeros in front included."""
    tiles = jnp.asarray(self.templates)[self.split(value)]
    for place in range(self.num_digits):
      canvas = canvas.at[self._slices(place)].set(tiles[place])
    return canvas

  def split(self, value: Array) -> Array:
    """i32[..., num_digits]: the digits of i32[...] `value`, the highest one first."""
    return value[..., None] // self._powers % 10

  def join(self, digits: Array) -> Array:
    """i32[...]: the number that these digits i32[..., num_digits] are."""
    return (digits * self._powers).sum(-1)

  def cut(self, frame: Array) -> Array:
    """[num_digits, 5 · unit, 3 · unit, 3]: the tiles of a frame [H, W, 3] that hold the digits."""
    return jnp.stack([frame[self._slices(place)] for place in range(self.num_digits)])

  @property
  def _powers(self) -> np.ndarray:
    return 10 ** np.arange(self.num_digits - 1, -1, -1, dtype=np.int32)

  def _slices(self, place: int) -> tuple[slice, slice]:
    first = (self.column + 4 * place) * self.unit
    return slice(self.unit, 6 * self.unit), slice(first, first + 3 * self.unit)


def cut_grid(frame: Array, top: int, left: int, grid: tuple[int, int], cell: tuple[int, int]
             ) -> Array:
  """[rows, columns, h, w, 3]: the cells of a grid in a frame [H, W, 3].

  Args:
    frame: the frame.
    top, left: the first pixel of the grid.
    grid: rows and columns.
    cell: height and width of a cell in pixels.
  """
  (rows, columns), (height, width) = grid, cell
  part = frame[top:top + rows * height, left:left + columns * width]
  return part.reshape(rows, height, columns, width, 3).transpose(0, 2, 1, 3, 4)


def paste_grid(canvas: Array, tiles: Array, top: int, left: int) -> Array:
  """A frame [H, W, 3] with a grid of tiles [rows, columns, h, w, 3] in it; inverts `cut_grid`."""
  rows, columns, height, width, _ = tiles.shape
  part = tiles.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
  return canvas.at[top:top + rows * height, left:left + columns * width].set(part)
