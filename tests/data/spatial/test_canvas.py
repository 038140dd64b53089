"""Drawing: shapes fill their boxes, edges scale together, letters and shapes can be told apart."""

import numpy as np
import pytest

from jaxrl_pt.data.spatial import base, canvas
from jaxrl_pt.data.spatial.canvas import Box

SHAPES = (*base.TRAINED_LOOK.shapes, *base.OTHER_LOOK.shapes)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def drawn(paint, side=48):
  """What a function paints in white, bool[side, side]."""
  picture = canvas.blank(side, BLACK)
  paint(picture)
  filled = (picture == WHITE).all(-1)
  assert (filled | (picture == BLACK).all(-1)).all()
  return filled


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('size', [5, 6, 7, 9, 14, 31])
def test_a_shape_touches_all_edges_of_its_box_and_is_symmetric(name, size):
  filled = canvas.mask(name, size, size)
  assert filled[0].any() and filled[-1].any() and filled[:, 0].any() and filled[:, -1].any()
  np.testing.assert_array_equal(filled, filled[:, ::-1])  # So mirrors show the same shapes.


@pytest.mark.parametrize('look', [base.TRAINED_LOOK, base.OTHER_LOOK])
@pytest.mark.parametrize('size, least', [(5, 4), (7, 8)])
def test_shapes_of_a_look_can_be_told_apart(look, size, least):
  masks = [canvas.mask(name, size, size) for name in look.shapes]
  assert min((one ^ other).sum() for k, one in enumerate(masks) for other in masks[:k]) >= least


def test_a_shape_without_a_name_is_none():
  with pytest.raises(ValueError, match="'blob'"):
    canvas.mask('blob', 5, 5)


@pytest.mark.parametrize('side', [48, 49, 61, 64, 96, 131])
def test_edges_scale_together(side):
  left, right = Box(3, 5, 20, 17), Box(3, 17, 20, 31)
  one, other = (drawn(lambda p, box=box: canvas.rectangle(p, box, WHITE), side)
                for box in (left, right))
  assert not (one & other).any() and (np.roll(one, 1, 1) & other).any()
  both = drawn(lambda p: canvas.rectangle(p, Box(3, 5, 20, 31), WHITE), side)
  np.testing.assert_array_equal(one | other, both)
  widths = {canvas.pixel(k + 1, side) - canvas.pixel(k, side) for k in range(canvas.UNITS)}
  assert widths <= {side // 48, side // 48 + 1} and min(widths) >= 1


def test_a_line_has_both_ends_and_no_holes():
  for start, end in (((3, 4), (40, 9)), ((40, 9), (3, 4)), ((5, 5), (5, 5)), ((0, 0), (9, 47))):
    filled = drawn(lambda p, ends=(start, end): canvas.line(p, *ends, WHITE))
    assert filled[start] and filled[end]
    assert filled.sum() == max(abs(end[0] - start[0]), abs(end[1] - start[1])) + 1


def test_arrows_point_where_they_should():
  box = Box(10, 10, 21, 21)
  up, right, down, left = (drawn(lambda p, k=k: canvas.arrow(p, box, k, WHITE))[10:21, 10:21]
                           for k in range(4))
  assert up[0].sum() < up[-1].sum() < up[5].sum()  # The tip, the shaft and the head.
  np.testing.assert_array_equal(down, up[::-1])
  np.testing.assert_array_equal(right[:, ::-1], left)
  assert right[:, -1].sum() < right[:, 0].sum() < right[:, 5].sum()


def test_grids_and_outlines_surround_cells():
  box = Box(0, 0, 48, 48)
  grid = drawn(lambda p: canvas.grid(p, box, 3, 4, WHITE))
  assert grid.all(1).sum() == 4 and grid.all(0).sum() == 5
  outline = drawn(lambda p: canvas.outline(p, Box(5, 6, 12, 20), WHITE))
  assert outline.sum() == 2 * (7 + 14) - 4 and not outline[6:11, 7:19].any()
  cells = [canvas.cell(box, 5, 5, r, c) for r in range(5) for c in range(5)]
  covered = sum(drawn(lambda p, one=one: canvas.rectangle(p, one, WHITE)).astype(int)
                for one in cells)
  assert (covered == 1).all()


def test_letters_differ_and_fit_their_size():
  found = {}
  for text in 'ABCDEFGHLNRSUW0123456789':
    filled = drawn(lambda p, text=text: canvas.letter(p, text, 2, 3, WHITE, 2))
    assert filled.sum() == filled[2:12, 3:9].sum() > 0
    found[text] = filled.tobytes()
  assert len(set(found.values())) == len(found)
