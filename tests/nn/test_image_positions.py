"""Positions of images: offsets, rows and columns, and texts with images against a plain loop."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.nn import embed
from jaxrl_pt.nn import image_positions as positions

KINDS = get_args(cfg.TextPositions)
PLAIN = cfg.PlainRope()


# --- Patches of one image -------------------------------------------------------------


def test_angles_are_those_of_the_formula():
  row, column = positions.places(3, 5)
  assert list(zip(row.tolist(), column.tolist(), strict=True)) == [
      (r, c) for r in range(3) for c in range(5)]
  cos, sin = positions.rope_2d(row, column, 16)
  assert cos.shape == (1, 15, 1, 8)
  for n, (r, c) in enumerate(zip(row, column, strict=True)):
    angles = [place * 10_000.0 ** (-4 * i / 16) for place in (r, c) for i in range(4)]
    np.testing.assert_allclose(cos[0, n, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, n, 0], np.sin(angles), atol=1e-6)


def _logits(rows: int, columns: int, head_dim: int) -> np.ndarray:
  """[N, N]: what one query at each patch says of one key at each patch."""
  q, k = np.random.default_rng(0).normal(size=(2, head_dim))
  cos, sin = positions.rope_2d(*positions.places(rows, columns), head_dim)
  everywhere = lambda x: jnp.asarray(np.tile(x, (1, rows * columns, 1, 1)), jnp.float32)
  q, k = (embed.rotate(everywhere(x), cos, sin)[0, :, 0] for x in (q, k))
  return np.asarray(q @ k.T)


def test_equal_offsets_give_equal_logits_and_other_offsets_others():
  rows, columns = 4, 6
  logits = _logits(rows, columns, 8)
  by_offset: dict[tuple[int, int], list[float]] = {}
  for m in range(rows * columns):
    for n in range(rows * columns):
      offset = m // columns - n // columns, m % columns - n % columns
      by_offset.setdefault(offset, []).append(logits[m, n])
  assert len(by_offset) == 7 * 11
  assert max(max(same) - min(same) for same in by_offset.values()) < 1e-5
  values = sorted(np.mean(same) for same in by_offset.values())
  assert np.diff(values).min() > 1e-5 and by_offset[0, 1][0] != pytest.approx(by_offset[1, 0][0])


def test_transposing_swaps_rows_and_columns():
  row, column = positions.places(3, 4)
  swap = np.r_[2:4, 0:2]  # of the pairs of a head of 8
  for one, other in zip(positions.rope_2d(row, column, 8), positions.rope_2d(column, row, 8),
                        strict=True):
    np.testing.assert_array_equal(one[..., swap], other)
    assert np.abs(one - other).max() > 0.5


# --- Images among text ----------------------------------------------------------------


def _drawn(rng: np.random.Generator, length: int) -> list[tuple[int, int, int] | None]:
  """Words (None) and images (times, rows, columns) that fill `length` tokens; some touch."""
  parts: list[tuple[int, int, int] | None] = []
  while length:
    shape = tuple(map(int, rng.integers(1, 5, 3)))
    fits = rng.random() < 0.3 and np.prod(shape) <= length
    parts.append(shape if fits else None)
    length -= int(np.prod(shape)) if fits else 1
  return parts


def _looped(parts: list[tuple[int, int, int] | None], kind: str) -> list[tuple[int, int, int]]:
  """The definition: what follows a part begins at the largest position so far + 1."""
  found: list[tuple[int, int, int]] = []
  for part in parts:
    start = max((max(place) for place in found), default=-1) + 1
    if part is None:
      found.append((start,) * 3)
    elif kind == '1d':
      found += [(start + n,) * 3 for n in range(int(np.prod(part)))]
    elif kind == 'constant':
      found += [(start,) * 3] * int(np.prod(part))
    else:
      found += [(start + t, start + r, start + c) for t in range(part[0]) for r in range(part[1])
                for c in range(part[2])]
  return found


LENGTH, MOST = 60, 12


def _batch(rows: list[list[tuple[int, int, int] | None]]) -> tuple[jax.Array, jax.Array]:
  is_image = [[part is not None for part in parts for _ in range(int(np.prod(part or 1)))]
              for parts in rows]
  grids = np.zeros((len(rows), MOST, 3), np.int32)
  for b, parts in enumerate(rows):
    shapes = [part for part in parts if part]
    grids[b, :len(shapes)] = shapes or np.zeros((0, 3))
  return jnp.array(is_image), jnp.array(grids)


@pytest.mark.parametrize('kind', KINDS)
def test_positions_are_those_of_a_loop(kind):
  rng = np.random.default_rng(1)
  rows = [_drawn(rng, LENGTH) for _ in range(40)] + [
      [(1, 3, 4), (1, 4, 3), *[None] * 36], [*[None] * 30, (5, 2, 3)], [None] * LENGTH]
  assert any(one and other for parts in rows for one, other in zip(parts, parts[1:], strict=False))
  found = positions.token_positions(*_batch(rows), kind)
  assert found.dtype == jnp.int32
  expected = np.array([_looped(parts, kind) for parts in rows])
  np.testing.assert_array_equal(found, np.moveaxis(expected, -1, 0))


@pytest.mark.parametrize('kind', KINDS)
def test_text_alone_has_exactly_ordinary_rope(kind):
  ordinary = jnp.tile(jnp.arange(300), (2, 1))
  for grids in (jnp.zeros((2, 0, 3), int), jnp.zeros((2, 3, 3), int)):
    found = positions.token_positions(jnp.zeros((2, 300), bool), grids, kind)
    np.testing.assert_array_equal(found, jnp.stack([ordinary] * 3))
  for head_dim, scaling in ((8, PLAIN), (128, PLAIN), (64, cfg.Llama3Rope(original_length=64))):
    ours = positions.rope(found, head_dim, 5e5, scaling, kind)
    for one, other in zip(ours, embed.rope(ordinary, head_dim, 5e5, scaling), strict=True):
      np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('kind, head_dim, sections', [
    ('mrope', 128, (16, 24, 24)), ('mrope', 64, (8, 12, 12)), ('mrope', 16, (2, 3, 3)),
    ('mrope', 8, (2, 1, 1)), ('interleaved', 128, (24, 20, 20)), ('interleaved', 64, (12, 10, 10)),
    ('interleaved', 8, (2, 1, 1)), ('1d', 6, (3, 0, 0)), ('constant', 4, (2, 0, 0))])
def test_sections_of_frequencies(kind, head_dim, sections):
  axes = positions.frequency_axes(head_dim, kind).tolist()
  assert tuple(axes.count(axis) for axis in range(3)) == sections
  if kind == 'mrope':
    assert axes == sorted(axes)
  if kind == 'interleaved':
    most = 3 * sections[1]
    assert axes == [0, 1, 2] * (most // 3) + [0] * (len(axes) - most)


@pytest.mark.parametrize('kind', ['mrope', 'interleaved'])
def test_each_frequency_turns_by_its_axis(kind):
  places = jnp.asarray(np.random.default_rng(2).integers(0, 50, (3, 1, 7)))
  cos, sin = positions.rope(places, 32, 100.0, PLAIN, kind)
  assert cos.shape == (1, 7, 1, 16)
  for j, axis in enumerate(positions.frequency_axes(32, kind)):
    angle = np.asarray(places[axis, 0]) * 100.0 ** (-2 * j / 32)
    np.testing.assert_allclose(cos[0, :, 0, j], np.cos(angle), atol=1e-5)
    np.testing.assert_allclose(sin[0, :, 0, j], np.sin(angle), atol=1e-5)


@pytest.mark.parametrize('head_dim', [4, 9])
def test_a_head_without_room_for_rows_and_columns_is_refused(head_dim):
  with pytest.raises(UserError, match=f'Model.head_dim = {head_dim} has too few pairs'):
    positions.frequency_axes(head_dim, 'mrope')
