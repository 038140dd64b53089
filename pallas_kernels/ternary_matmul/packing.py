"""Ternary codes as planar bytes: the exchange format of BitNet checkpoints."""

import jax
import jax.numpy as jnp

Array = jax.Array


def pack_planar(codes_KN: Array, axis: int = 1) -> Array:
  """Packs four ternary codes along an axis into a byte; along the outputs N:

    byte[k, r] = Σ_i (codes[k, r + i R] + 1) · 4^i,   i = 0 … 3, R = ⌈N / 4⌉

  Args:
    codes_KN: int[K, N] in {−1, 0, 1}; N are the outputs.
    axis: 1 packs along N, as checkpoints do; 0 along K.

  Returns:
    uint8[K, ⌈N / 4⌉] or uint8[⌈K / 4⌉, N]; what lies beyond the end is code −1, 0 bits. Files
    store the transpose.

  Source: 2504.12285's released checkpoints; transformers' `integrations/bitnet.py`.
  """
  size = codes_KN.shape[axis]
  R = -(-size // 4)
  missing = [(0, 4 * R - size) if i == axis else (0, 0) for i in range(2)]
  bits = jnp.pad((codes_KN.astype(jnp.int8) + 1).astype(jnp.uint8), missing)
  planes = jnp.split(bits, 4, axis)
  return planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6


def unpack_planar(packed: Array, size: int, axis: int = 1) -> Array:
  """The inverse of `pack_planar`.

  Args:
    packed: uint8 as `pack_planar` returns it.
    size: codes along `axis`.
    axis: along which they were packed.

  Returns:
    int2[K, N] in {−1, 0, 1}.
  """
  planes = [(packed >> 2 * i & 3).astype(jnp.int8) - 1 for i in range(4)]
  codes = jnp.concatenate(planes, axis=axis)
  return jax.lax.slice_in_dim(codes, 0, size, axis=axis).astype(jnp.int2)
