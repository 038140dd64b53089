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

from jaxrl_pt.config import ActivationQuant, WeightQuant
from jaxrl_pt.config.model import GROUP
from jaxrl_pt.nn import packed
from jaxrl_pt.nn.packed import TernaryBytes
from jaxrl_pt.types import Array, Params
from pallas_kernels.hadamard_quantize.reference import (
  EPSILON,
  hadamard,
  hadamard_factors,
  quantize,
)
from pallas_kernels.ternary_matmul import straight_through

__all__ = ['EPSILON', 'TernaryWeight', 'activations', 'as_computed', 'bit_matmul',
           'dequantised', 'hadamard', 'hadamard_factors', 'pack', 'ternary', 'ternary_128',
           'weights']


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


def ternary_128(w: Array) -> tuple[Array, Array]:
  """Ternary weights with one scale for each 128 inputs of an output, the absmax among them.

    s_go = max |W_io| over the inputs i of group g,  codes = round(W / s)

  Weights that are a scale times −1, 0 and 1 already, as imported ones are, give exactly these codes
  and scales, and dequantise to themselves.

  Args:
    w: f[..., I, O]; I is a multiple of 128.

  Returns:
    codes f[..., I, O] in {−1, 0, 1} and scale f32[..., I / 128, O].
  """
  groups = w.astype(jnp.float32).reshape(*w.shape[:-2], -1, GROUP, w.shape[-1])
  scale = jnp.abs(groups).max(-2, keepdims=True)
  codes = jnp.round(groups / jnp.where(scale > 0, scale, 1.0))
  return codes.reshape(w.shape).astype(w.dtype), scale[..., 0, :]


def weights(w: Array, kind: WeightQuant) -> tuple[Array, Array]:
  """Ternary codes and scales of latent weights, as `kind` says; it is not 'none'."""
  return ternary_128(w) if kind == 'ternary_128' else ternary(w)


def dequantised(codes: Array, scale: Array) -> Array:
  """f32[..., I, O]: codes · scale, with a scale [..., 1, 1] of a matrix or [..., I / 128, O]."""
  codes = codes.astype(jnp.float32)
  if scale.shape[-2:] == (1, 1):
    return codes * scale
  groups = codes.reshape(*scale.shape[:-1], GROUP, scale.shape[-1])
  return (groups * scale[..., None, :]).reshape(codes.shape)


def as_computed(w: Array, kind: WeightQuant) -> Array:
  """Weights of 'ternary_128' as the products read them, in their own type; others as they are."""
  return dequantised(*ternary_128(w)).astype(w.dtype) if kind == 'ternary_128' else w


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
  scale: Array  # f32[..., 1, 1] of a matrix, or f32[..., I / 128, O] of 128 inputs of an output


def pack(params: Params, is_packed: Callable[[tuple[Any, ...]], bool],
         dtype: DTypeLike = jnp.int2, kind: WeightQuant = 'ternary') -> Params:
  """Packs some matrices of a parameter tree into TernaryWeight, 2 bits a weight, for inference.

  Args:
    params: any tree of f32[..., I, O] leaves, matrices stacked over layers included.
    is_packed: says whether the leaf at a path is the weight of a BitLinear.
    dtype: the type of the codes; a wider one than two bits is not yet what a product reads.
    kind: which quantiser.
  """
  def leaf(path: tuple[Any, ...], w: Array) -> Any:
    if not is_packed(path):
      return w
    codes, scale = weights(w, kind)
    return TernaryWeight(codes.astype(dtype), scale)

  return jax.tree_util.tree_map_with_path(leaf, params)


def bit_matmul(x: Array, w: Array | TernaryWeight | TernaryBytes, x_codes: Array, x_scale: Array,
               kind: ActivationQuant, product: Callable[..., Array], axes: tuple[str, str],
               weight_kind: WeightQuant = 'ternary') -> Array:
  """Y = Q_a(X) · Q_w(W) with straight-through gradients: both quantisers count as identity.

    forward   Y = (codes_x · codes_w) · scale_x · scale_w
    backward  dX = dY · Q_w(W)ᵀ,  dW = Q_a(X)ᵀ · dY   (also where a code was clipped)

  No kernel takes one scale for 128 inputs: such weights are multiplied by XLA, dequantised where
  they are used.

  Args:
    x: f[..., I] activations; their values are not read, and the gradient flows to them.
    w: f[I, O] latent weights, which are quantised to ternary here, or packed weights, which get no
      gradient; weights in bytes pass none to x either, and refuse it.
    x_codes, x_scale: X as `activations` quantises it.
    kind, axes: arguments that `product` takes.
    product: computes the integer product with its scales, as `ops.Product` says.
    weight_kind: how w is quantised.

  Returns:
    f[..., O] in x's dtype.

  Source: 2504.18415 section 2 (STE).
  """
  if isinstance(w, TernaryBytes):
    y = packed.product(x_codes, x_scale, w, kind != 'none', x.dtype)
    return packed.without_gradient(x, y)
  if isinstance(w, TernaryWeight):
    latent, w_codes, w_scale = None, w.codes, w.scale
  else:
    latent, (w_codes, w_scale) = w, weights(jax.lax.stop_gradient(w), weight_kind)
  if w_scale.shape != (1, 1):
    # Kernels leave a product whose activations count as 'none' to XLA.
    w_codes, w_scale, kind = dequantised(w_codes, w_scale), jnp.ones((1, 1), jnp.float32), 'none'

  def multiply(x_codes: Array, x_scale: Array, w_codes: Array, w_scale: Array) -> Array:
    return product(x_codes, x_scale, w_codes, w_scale, kind, axes, x.dtype)

  return straight_through(multiply, x, latent, x_codes, x_scale, w_codes, w_scale)
