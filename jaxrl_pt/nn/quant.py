"""Ternary weights, 4- and 8-bit activations and the Hadamard rotation, as definitions.

Statistics are clamped to at least 1e-5 and rounding is half-to-even: the papers
leave both open and the authors' training tips do so (docs/methods/bitnet.md).
Codes are kept in the compute dtype: sums of code products stay below 2^24, so
float32 accumulation of them is exact and independent of its order.
"""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.config import ActivationQuant
from jaxrl_pt.types import Array, Params
from pallas_kernels.hadamard_quantize.reference import (
  EPSILON,
  hadamard,
  hadamard_factors,
  quantize,
)
from pallas_kernels.ternary_matmul import straight_through

__all__ = ['EPSILON', 'TernaryWeight', 'activations', 'bit_matmul', 'hadamard',
           'hadamard_factors', 'pack', 'ternary']


def ternary(w: Array) -> tuple[Array, Array]:
  """Absmean ternary weights: codes RoundClip(W / α, −1, 1), α = mean|W| of the matrix.

  Args:
    w: f[..., I, O] latent weights; each trailing matrix is quantised on its own.

  Returns:
    codes f[..., I, O] in {−1, 0, 1} and scale f32[..., 1, 1]; W ≈ scale · codes.

  Source: 2504.12285 section 2, 2504.18415 section 2.
  """
  scale = jnp.abs(w).astype(jnp.float32).mean((-2, -1), keepdims=True)
  scale = jnp.maximum(scale, EPSILON)
  codes = jnp.clip(jnp.round(w.astype(jnp.float32) / scale), -1, 1)
  return codes.astype(w.dtype), scale


def activations(x: Array, kind: ActivationQuant) -> tuple[Array, Array]:
  """Per-token integer activations, as `pallas_kernels.hadamard_quantize` defines them.

  Args:
    x: f[..., D]; statistics are over D.
    kind: which quantiser; 'none' returns x with scale 1.

  Returns:
    codes f[..., D] (integers in x's dtype) and scale f32[..., 1]; X ≈ scale · codes.

  Source: 2504.18415 section 2 (int8: 2504.12285 section 2).
  """
  if kind == 'none':
    return x, jnp.ones((*x.shape[:-1], 1), jnp.float32)
  return quantize(x, kind)


# --- The quantised product ------------------------------------------------------


@struct.dataclass
class TernaryWeight:
  """A packed weight, which takes the place of a latent matrix in a parameter tree."""

  codes: Array  # i2[..., I, O] in {−1, 0, 1}
  scale: Array  # f32[..., 1, 1]


def pack(params: Params, is_packed: Callable[[tuple[Any, ...]], bool],
         dtype: DTypeLike = jnp.int2) -> Params:
  """Packs some matrices of a parameter tree into TernaryWeight, 2 bits a weight, for inference.

  Args:
    params: any tree of f32[..., I, O] leaves, matrices stacked over layers included.
    is_packed: says whether the leaf at a path is the weight of a BitLinear.
    dtype: the type of the codes; a wider one than two bits is not yet what a product reads.
  """
  def leaf(path: tuple[Any, ...], w: Array) -> Any:
    if not is_packed(path):
      return w
    codes, scale = ternary(w)
    return TernaryWeight(codes.astype(dtype), scale)

  return jax.tree_util.tree_map_with_path(leaf, params)


def bit_matmul(x: Array, w: Array | TernaryWeight, x_codes: Array, x_scale: Array,
               kind: ActivationQuant, product: Callable[..., Array],
               axes: tuple[str, str]) -> Array:
  """Y = Q_a(X) · Q_w(W) with straight-through gradients: both quantisers count as identity.

    forward   Y = (codes_x · codes_w) · scale_x · scale_w
    backward  dX = dY · Q_w(W)ᵀ,  dW = Q_a(X)ᵀ · dY   (also where a code was clipped)

  Args:
    x: f[..., I] activations; their values are not read, and the gradient flows to them.
    w: f[I, O] latent weights, which are quantised to ternary here, or packed weights, which get no
      gradient.
    x_codes, x_scale: X as `activations` quantises it.
    kind, axes: arguments that `product` takes.
    product: computes the integer product with its scales, as `ops.Product` says.

  Returns:
    f[..., O] in x's dtype.

  Source: 2504.18415 section 2 (STE).
  """
  if isinstance(w, TernaryWeight):
    latent, w_codes, w_scale = None, w.codes, w.scale
  else:
    latent, (w_codes, w_scale) = w, ternary(jax.lax.stop_gradient(w))

  def multiply(x_codes: Array, x_scale: Array, w_codes: Array, w_scale: Array) -> Array:
    return product(x_codes, x_scale, w_codes, w_scale, kind, axes, x.dtype)

  return straight_through(multiply, x, latent, x_codes, x_scale, w_codes, w_scale)
