"""Normalisation by the root mean square, or by mean and variance."""

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array

EPSILON = 1e-5


def rms_norm(x: Array, gain: Array, epsilon: float = EPSILON) -> Array:
  """RMSNorm over the last axis, in float32: X / √(mean(X²) + ε) · gain (1910.07467).

  Args:
    x: f[..., D].
    gain: f32[D].
    epsilon: ε.

  Returns:
    f[..., D] in x's dtype.
  """
  x32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + epsilon)
  return (x32 * inverse * gain).astype(x.dtype)


def layer_norm(x: Array, epsilon: float = EPSILON) -> Array:
  """LayerNorm over the last axis without gain and bias, in float32 (1607.06450).

  Args:
    x: f[..., D].
    epsilon: is added to the variance.

  Returns:
    f[..., D] in x's dtype.
  """
  wide = x.astype(jnp.float32)
  centred = wide - wide.mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + epsilon)
  return (centred * inverse).astype(x.dtype)


def group_norm(x_BHWC: Array, gain: Array, bias: Array, groups: int,
               epsilon: float = EPSILON) -> Array:
  """GroupNorm over the pixels and the channels of each group, in float32 (1803.08494).

  Args:
    x_BHWC: f[B, H, W, C].
    gain, bias: f32[C].
    groups: divides C.
    epsilon: is added to the variance.

  Returns:
    f[B, H, W, C] in x's dtype.
  """
  grouped = x_BHWC.astype(jnp.float32).reshape(*x_BHWC.shape[:3], groups, -1)
  centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
  inverse = jax.lax.rsqrt(jnp.square(centred).mean((1, 2, 4), keepdims=True) + epsilon)
  normed = (centred * inverse).reshape(x_BHWC.shape)
  return (normed * gain + bias).astype(x_BHWC.dtype)
