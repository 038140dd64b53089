"""Ternary codes as planar bytes: the exchange format of BitNet checkpoints."""

import jax
import jax.numpy as jnp

Array = jax.Array


def pack_planar(codes_KN: Array) -> Array:
  """Packs four columns of ternary codes into a byte.

    byte[k, r] = Σ_i (codes[k, r + i R] + 1) · 4^i,   i = 0 … 3, R = ⌈N / 4⌉

  Args:
    codes_KN: int[K, N] in {−1, 0, 1}; N are the outputs.

  Returns:
    uint8[K, R]; outputs beyond N are 0 bits. Files store its transpose.

  Source: 2504.12285's released checkpoints; transformers' `integrations/bitnet.py`.
  """
  K, N = codes_KN.shape
  R = -(-N // 4)
  bits = jnp.pad((codes_KN.astype(jnp.int8) + 1).astype(jnp.uint8), ((0, 0), (0, 4 * R - N)))
  planes = bits.reshape(K, 4, R)
  return planes[:, 0] | planes[:, 1] << 2 | planes[:, 2] << 4 | planes[:, 3] << 6


def unpack_planar(packed_KR: Array, N: int) -> Array:
  """The inverse of `pack_planar`.

  Args:
    packed_KR: uint8[K, ⌈N / 4⌉].
    N: outputs.

  Returns:
    int2[K, N] in {−1, 0, 1}.
  """
  planes = [(packed_KR >> 2 * i & 3).astype(jnp.int8) - 1 for i in range(4)]
  return jnp.concatenate(planes, axis=1)[:, :N].astype(jnp.int2)
