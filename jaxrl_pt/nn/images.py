"""Images as tokens: patches, their positions, noise levels, and convolutions."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.types import Array

# The noise level, from 0 to 1, in the unit of the sines and cosines (DiT counts 1,000 levels).
_LEVELS = 1000.0


def patchify(x_BHWC: Array, side: int) -> Array:
  """f[B, H/side · W/side, side · side · C]: the patches of images, row by row."""
  num, height, width, channels = x_BHWC.shape
  x = x_BHWC.reshape(num, height // side, side, width // side, side, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(num, -1, side * side * channels)


def unpatchify(x_BND: Array, side: int, shape: tuple[int, int]) -> Array:
  """f[B, H, W, C]: the images of which these are the patches; inverts `patchify`.

  Args:
    x_BND: f[B, H/side · W/side, side · side · C].
    side: of a patch.
    shape: H and W.
  """
  rows, columns = (size // side for size in shape)
  x = x_BND.reshape(x_BND.shape[0], rows, columns, side, side, -1)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(x_BND.shape[0], *shape, x.shape[-1])


def positions_2d(rows: int, columns: int, width: int) -> np.ndarray:
  """f32[rows · columns, width]: fixed sines and cosines of both coordinates (2212.09748).

  Half of the width says the row, half the column, each as ViT's positions say a place.
  """
  frequency = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
  row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing='ij')
  angles = [place.reshape(-1, 1) * frequency for place in (row, column)]
  parts = [part for angle in angles for part in (np.sin(angle), np.cos(angle))]
  return np.concatenate(parts, -1).astype(np.float32)


def sinusoid(level_B: Array, width: int) -> Array:
  """f32[B, width]: cosines and sines of a noise level from 0 to 1 (2006.11239)."""
  frequency = jnp.exp(-math.log(10_000.0) * jnp.arange(width // 2) / (width // 2))
  angle = _LEVELS * level_B[:, None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def convolve(x_BHWC: Array, w_HWIO: Array, stride: int = 1) -> Array:
  """A convolution that keeps the size but for its stride: f[B, ⌈H/stride⌉, ⌈W/stride⌉, O]."""
  return jax.lax.conv_general_dilated(
      x_BHWC, w_HWIO.astype(x_BHWC.dtype), (stride, stride), 'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def pooled(x_BHWC: Array, side: int) -> Array:
  """f[B, H / side, W / side, C]: the means of squares of pixels."""
  num, height, width, channels = x_BHWC.shape
  return x_BHWC.reshape(num, height // side, side, width // side, side, channels).mean((2, 4))
