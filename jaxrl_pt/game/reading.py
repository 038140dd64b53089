"""Reads frames: what is recognised is drawn again and compared with the frame.

A frame that a model has made may be blurred, torn or between two worlds. Two numbers say how far
it may be believed.

- `blend`. On the line from the nearest template T₁ to a rival T₂ the point nearest to a tile x is
  T₁ + w (T₂ − T₁) with

      w = ½ (1 − (‖x − T₂‖² − ‖x − T₁‖²) / ‖T₁ − T₂‖²).

  Zero is a clean tile and ½ is as much the one as the other; the largest w over all tiles and
  rivals counts.
- `residual`. The frame is drawn again from what was read; the largest root mean square difference
  over blocks of 4 × 4 units counts, so that anything that does not belong there shows.

A frame above either limit is unreadable, and an unreadable frame is never counted as right.

Source: our own; the MaaG paper (arXiv 2503.21172) says of no metric how frames are read.
"""

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.game.base import Game, Parts, Reading, Truth

MAX_RESIDUAL = 0.15
MAX_BLEND = 0.25
_BLOCK = 4  # units


def classify(tiles_ND: Array, templates_KD: np.ndarray) -> tuple[Array, Array]:
  """The nearest template of each tile, and the largest share of a rival in it.

  Args:
    tiles_ND: f32[N, ...], from 0 to 1.
    templates_KD: f32[K, ...] with K of at least 2, no two of them alike.

  Returns:
    i32[N] indices of templates, f32[N] the shares w of the module's docstring.
  """
  tiles_ND = tiles_ND.reshape(len(tiles_ND), -1)
  flat_KD = templates_KD.reshape(len(templates_KD), -1).astype(np.float32)
  apart_KK = ((flat_KD[:, None] - flat_KD[None]) ** 2).sum(-1)
  # ‖x − T‖² less ‖x‖², which is the same for all templates.
  product_NK = jnp.matmul(tiles_ND, flat_KD.T, precision=jax.lax.Precision.HIGHEST)
  error_NK = (flat_KD**2).sum(-1) - 2 * product_NK
  best_N = lowest(error_NK)
  is_best_NK = best_N[:, None] == np.arange(len(flat_KD))
  return best_N, rival_share(error_NK, (is_best_NK[..., None] * apart_KK).sum(1))


def lowest(values_NK: Array) -> Array:
  """i32[N]: the place of the first lowest value in each row; it compiles faster than `argmin`."""
  is_lowest_NK = values_NK == values_NK.min(-1, keepdims=True)
  place_K = np.arange(values_NK.shape[-1], dtype=np.int32)
  return jnp.where(is_lowest_NK, place_K, len(place_K) - 1).min(-1)


def rival_share(error_NK: Array, apart_NK: Array) -> Array:
  """f32[N]: the largest share w of any template but the nearest one.

  Args:
    error_NK: f32[N, K] squared distances to the templates, up to a constant of the row.
    apart_NK: f32[N, K] squared distances between the templates and the nearest one, to which
      this is 0.
  """
  margin_NK = error_NK - error_NK.min(-1, keepdims=True)
  share_NK = (1 - margin_NK / jnp.maximum(apart_NK, 1e-9)) / 2
  return jnp.where(apart_NK > 0, share_NK, 0.0).max(-1)


def read(game: Game, frame: Array) -> Reading:
  """Reads one frame.

  Args:
    game: the game that it is to show.
    frame: u8[H, W, 3], or f32[H, W, 3] from 0 to 1.

  Raises:
    ValueError: another shape or type.
  """
  if frame.shape != (*game.frame_shape, 3) or frame.dtype not in (jnp.uint8, jnp.float32):
    raise ValueError(f'a frame of {type(game.config).__name__} is u8 or f32 of shape '
                     f'{(*game.frame_shape, 3)}, not {frame.dtype} of {frame.shape}')
  frame = as_float(frame)
  parts = game.recognise(frame)
  residual = _residual(game, frame, parts)
  readable = (residual <= MAX_RESIDUAL) & (parts.blend <= MAX_BLEND)
  return Reading(parts.counters, parts.cells, parts.objects, residual, parts.blend, readable)


def as_float(frame: Array) -> Array:
  """f32 from 0 to 1 of the pixels of a frame."""
  return frame.astype(jnp.float32) / 255 if frame.dtype == jnp.uint8 else frame


def _residual(game: Game, frame: Array, parts: Parts) -> Array:
  drawn = as_float(game.draw(parts.counters, parts.cells, parts.objects))
  height, width = game.frame_shape
  side = _BLOCK * (width // 32)
  error = ((frame - drawn) ** 2).mean(-1)
  blocks = error.reshape(height // side, side, width // side, side).mean((1, 3))
  return jnp.sqrt(blocks.max())


def is_exact(reading: Reading, truth: Truth) -> Array:
  """bool[]: the frame is readable and shows what is true, in every counter, cell and object."""
  same = [(a == b).all() for a, b in ((reading.counters, truth.counters),
                                      (reading.cells, truth.cells),
                                      (reading.objects, truth.objects))]
  return reading.readable & same[0] & same[1] & same[2]
