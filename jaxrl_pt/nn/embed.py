"""Token embedding and rotary positions."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.config import Llama3Rope, PlainRope, Rope
from jaxrl_pt.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table_VD: Array, tokens: Array, dtype: DTypeLike,
           whole: Callable[[Array], Array] = lambda table: table) -> Array:
  """Looks rows of the table up, rounded to `dtype`; gradients are summed in the table's own type.

    forward   X_t = round(Table[token_t]),  backward  dTable_v = Σ_{t: token_t = v} dX_t

  If the table were cast first, JAX would sum its gradient in the type of the cast. In bfloat16 the
  sum of a common token then stops growing: an addend below 2⁻⁹ of it is lost.

  Args:
    table_VD: f[V, D].
    tokens: i32[...] in [0, V).
    dtype: type of the result.
    whole: lays the rounded table out for the look-up, and the gradient of the table for the sum.

  Returns:
    dtype[..., D].
  """
  return whole(table_VD.astype(dtype))[tokens]


def _lookup_forward(table_VD: Array, tokens: Array, dtype: DTypeLike,
                    whole: Callable[[Array], Array]) -> tuple[Array, tuple[Array, Array]]:
  return lookup(table_VD, tokens, dtype, whole), (table_VD, tokens)


def _lookup_backward(dtype: DTypeLike, whole: Callable[[Array], Array],
                     saved: tuple[Array, Array], dx: Array) -> tuple[Array, None]:
  del dtype
  table_VD, tokens = saved
  return whole(jnp.zeros_like(table_VD).at[tokens].add(dx.astype(table_VD.dtype))), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def frequencies(head_dim: int, theta: float, scaling: Rope) -> Array:
  """f32[E/2]: the angle of each pair between two neighbouring positions."""
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  match scaling:
    case PlainRope():
      return frequency
    case Llama3Rope(factor=factor, low_freq_factor=low, high_freq_factor=high):
      turns = scaling.original_length * frequency / (2 * jnp.pi)  # within the original length
      kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
      return frequency * (kept + (1 - kept) / factor)


def rope(positions: Array, head_dim: int, theta: float,
         scaling: Rope) -> tuple[Array, Array]:
  """Cosines and sines of the rotary embedding, half-split layout (2104.09864).

  Args:
    positions: i32[B, T].
    head_dim: E.
    theta: base of the frequencies.
    scaling: how the frequencies are scaled for long texts.

  Returns:
    f32[B, T, 1, E/2] each, ready to broadcast over heads.
  """
  frequency = frequencies(head_dim, theta, scaling)
  angle = positions.astype(jnp.float32)[..., None, None] * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Rotates the pairs (i, i + E/2) of f[B, T, H, E] by the given angles."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
  return rotated.astype(x.dtype)
