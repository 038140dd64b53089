"""Token embedding and rotary positions."""

import jax.numpy as jnp

from jaxrl_pt.types import Array


def rope(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
  """Cosines and sines of the rotary embedding, half-split layout (2104.09864).

  Args:
    positions: i32[B, T].

  Returns:
    f32[B, T, 1, E/2] each, ready to broadcast over heads.
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = positions.astype(jnp.float32)[..., None, None] * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Rotates the pairs (i, i + E/2) of f[B, T, H, E] by the given angles."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
  return rotated.astype(x.dtype)
