"""The ternary product's definition, in integers."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array


def ternary_matmul(x_codes_MK: Array, x_scale_M1: Array, w_codes_KN: Array, w_scale: Array,
                   out_dtype: DTypeLike) -> Array:
  """Y = (codes_x · codes_w) · (scale_x · scale_w), or the sums themselves where Y is int32.

  Args:
    x_codes_MK: int4[M, K] or int8[M, K].
    x_scale_M1: f32[M, 1].
    w_codes_KN: int2[K, N] in {−1, 0, 1}.
    w_scale: f32[], f32[1, 1] or f32[1, N].

  Returns:
    out_dtype[M, N].
  """
  sums_MN = jnp.matmul(x_codes_MK.astype(jnp.int8), w_codes_KN.astype(jnp.int8),
                       preferred_element_type=jnp.int32)
  if out_dtype == jnp.int32:
    return sums_MN
  return (sums_MN.astype(jnp.float32) * (x_scale_M1 * w_scale)).astype(out_dtype)
