"""Rotary positions of images: of patches in a vision tower, and of images among text.

A text with images has three positions for each token: time, row and column (M-RoPE, 2409.12191).
Those of a word are all its running index, so that text alone has exactly the positions and
rotations of `embed.rope`, whatever is done about images. RoPE knows differences alone, so packed
documents need no positions of their own.
"""

import jax.numpy as jnp
import numpy as np

from jaxrl_pt.config import PlainRope, Rope, TextPositions
from jaxrl_pt.errors import UserError
from jaxrl_pt.nn import embed
from jaxrl_pt.types import Array

_THETA = 10_000.0  # the base of the frequencies in a tower


def places(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
  """The row and the column of each patch, i32[rows · columns] each, row by row."""
  row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing='ij')
  return row.reshape(-1).astype(np.int32), column.reshape(-1).astype(np.int32)


def rope_2d(row_N: Array | np.ndarray, column_N: Array | np.ndarray,
            head_dim: int) -> tuple[Array, Array]:
  """Cosines and sines of rotary positions with two coordinates, as in Qwen2-VL's tower.

    ω_i = 10000^(−4i/E),  angles = [r ω_0 … r ω_{E/4−1}, c ω_0 … c ω_{E/4−1}]

  Args:
    row_N, column_N: i32[N], r and c of each patch.
    head_dim: E, a multiple of 4.

  Returns:
    f32[1, N, 1, E/2] each, for `embed.rotate`.

  Source: 2409.12191; huggingface/transformers, models/qwen2_vl.
  """
  assert head_dim % 4 == 0, head_dim
  frequency = embed.frequencies(head_dim // 2, _THETA, PlainRope())
  turned = [jnp.asarray(x, jnp.float32)[:, None] * frequency for x in (row_N, column_N)]
  angle = jnp.concatenate(turned, -1)[None, :, None]
  return jnp.cos(angle), jnp.sin(angle)


# --- Images among text ----------------------------------------------------------------


def token_positions(is_image_BT: Array, grids_BM3: Array, kind: TextPositions) -> Array:
  """The time, row and column of each token of texts with images.

    text at index s:      (s, s, s), and the next token begins at s + 1
    an image from s on:   (s + t, s + r, s + c), and what follows at the largest of these + 1
    'constant':           (s, s, s) for all of an image, and what follows at s + 1
    '1d':                 every token counts as text

  Text that is generated after a row goes on at the largest of its positions + 1.

  Args:
    is_image_BT: bool[B, T], whether a token is a part of an image; those of an image stand side by
      side, time by time, row by row. Neighbouring images are told apart by their sizes.
    grids_BM3: i32[B, M, 3], the times, rows and columns of a row's images in order, in tokens;
      zeros where a row has fewer than M, which may be 0.
    kind: what images do to positions; 'mrope' and 'interleaved' give the same ones.

  Returns:
    i32[3, B, T].

  Source: 2409.12191 section 2.1, 2509.21984 ('constant').
  """
  num_rows, length = is_image_BT.shape
  if kind == '1d' or not grids_BM3.shape[1]:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (3, num_rows, length))
  is_image = is_image_BT.astype(jnp.int32)
  images_before = jnp.cumsum(is_image, 1) - is_image  # tokens of images before this one
  text_before = jnp.arange(length) - images_before
  ends_BM = jnp.cumsum(grids_BM3.prod(-1), 1)
  is_past = images_before[:, :, None] >= ends_BM[:, None]  # [B, T, M], images that have ended
  spans_BM = grids_BM3.max(-1)
  if kind == 'constant':
    spans_BM = jnp.minimum(spans_BM, 1)
  start = text_before + (is_past * spans_BM[:, None]).sum(-1)
  if kind == 'constant':
    return jnp.broadcast_to(start, (3, num_rows, length)).astype(jnp.int32)

  within = images_before - jnp.where(is_past, ends_BM[:, None], 0).max(-1, initial=0)
  number = jnp.minimum(is_past.sum(-1), grids_BM3.shape[1] - 1)
  grid_BT3 = jnp.maximum(jnp.take_along_axis(grids_BM3, number[:, :, None], 1), 1)
  rows, columns = grid_BT3[..., 1], grid_BT3[..., 2]
  place = jnp.stack([within // (rows * columns), within // columns % rows, within % columns])
  return (start + place * is_image).astype(jnp.int32)


def frequency_axes(head_dim: int, kind: TextPositions) -> np.ndarray:
  """i32[E/2]: which of time (0), row (1) and column (2) turns each frequency.

    'mrope'        sections of (E/8, 3E/16, 3E/16) frequencies, (16, 24, 24) of 64
    'interleaved'  t r c t r c … until row and column have 5E/32 each, and then time: (24, 20, 20)

  Sections of row and column are rounded down in small heads, and time has the rest.

  Source: 2409.12191; huggingface/transformers, models/qwen2_vl and models/qwen3_vl. The sections of
  heads that are not 128 wide are ours.

  Raises:
    UserError: a head is too small to tell rows from columns.
  """
  pairs = head_dim // 2
  if kind in ('1d', 'constant'):
    return np.zeros(pairs, np.int32)
  if head_dim < 8 or head_dim % 2:
    raise UserError(f'Model.head_dim = {head_dim} has too few pairs for the times, rows and '
                    'columns of images: make it an even number of at least 8, or choose the '
                    "positions '1d' or 'constant'.")
  if kind == 'mrope':
    section = 3 * head_dim // 16
    return np.repeat(np.arange(3), (pairs - 2 * section, section, section)).astype(np.int32)
  section = 5 * head_dim // 32
  axes = np.arange(pairs) % 3
  return np.where(np.arange(pairs) < 3 * section, axes, 0).astype(np.int32)


def rope(positions_3BT: Array, head_dim: int, theta: float, scaling: Rope,
         kind: TextPositions) -> tuple[Array, Array]:
  """Cosines and sines of the rotary embedding of texts with images.

    angle_j = position of axis(j) · ω_j

  Args:
    positions_3BT: i32[3, B, T], from `token_positions`.
    head_dim: E.
    theta, scaling: as in `embed.rope`.
    kind: which axis a frequency belongs to, as `frequency_axes` says.

  Returns:
    f32[B, T, 1, E/2] each, for `embed.rotate`; those of `embed.rope` where all three agree.
  """
  axes = frequency_axes(head_dim, kind)
  frequency = embed.frequencies(head_dim, theta, scaling)
  position_BTP = jnp.moveaxis(positions_3BT, 0, -1)[..., axes].astype(jnp.float32)
  angle = (position_BTP * frequency)[:, :, None]
  return jnp.cos(angle), jnp.sin(angle)
