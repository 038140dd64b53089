"""Linear layers: plain, BitLinear and H-BitLinear, adapted or not, behind one function."""

import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.config import Quant
from jaxrl_pt.nn import quant as q
from jaxrl_pt.nn.norm import rms_norm
from jaxrl_pt.nn.ops import Axes, Ops
from jaxrl_pt.nn.packed import TernaryBytes
from jaxrl_pt.types import Array


@struct.dataclass
class Adapted:
  """A frozen weight with its low-rank adapter, in place of the weight in a parameter tree.

  A tree of ParamSpec has it too, with a ParamSpec in place of each array.
  """

  base: Any  # f[..., I, O], a TernaryWeight or TernaryBytes
  a: Array  # f32[..., I, r]
  b: Array  # f32[..., r, O]
  scale: float = struct.field(pytree_node=False)


Weight = Array | q.TernaryWeight | TernaryBytes | Adapted


def low_rank(x: Array, w: Adapted) -> Array:
  """scale · (X A) B: what the adapter of a weight adds to Y = X W.

  Args:
    x: f[..., I], as it is before a BitLinear rotates or rounds it.
    w: the weight of one layer.

  Returns:
    f[..., O] in x's dtype.

  Source: LoRA 2106.09685 section 4.1.
  """
  return matmul(matmul(x, w.a), w.b) * w.scale


def linear(x: Array, w: Weight, quant: Quant, ops: Ops, axes: Axes) -> Array:
  """Y = X W, with W and X quantised as `quant` says.

  Args:
    x: f[..., I].
    w: f[I, O] latent weights, or the packed weights of `quant.pack`; either may be adapted.
    quant: how both are quantised; weights 'none' give the plain product in x's dtype.
    ops: computes the quantised product.
    axes: logical names of w's dimensions.

  Returns:
    f[..., O] in x's dtype.

  Source: 2504.18415 section 2, 2504.12285 section 2.
  """
  if isinstance(w, Adapted):
    return linear(x, w.base, quant, ops, axes) + low_rank(x, w)
  if quant.weights == 'none':
    assert not isinstance(w, q.TernaryWeight | TernaryBytes), (
        'packed weights in a model without BitLinear')
    return matmul(x, w)
  codes, scale = q.activations(jax.lax.stop_gradient(x), quant.activations)
  return q.bit_matmul(x, w, codes, scale, quant.activations, ops.product, axes, quant.weights)


def normed_linear(x: Array, gain: Array | None, epsilon: float, w: Weight,
                  quant: Quant, ops: Ops, axes: Axes) -> Array:
  """Y = RMSNorm(X) W, as W_o and W_down compute it; `quant.hadamard` makes it H-BitLinear.

  Args:
    x, w, quant, ops, axes: as in `linear`.
    gain: f32[I] gain of the norm; None leaves the norm out.
    epsilon: of the norm.

  Returns:
    f[..., O] in x's dtype.

  Source: 2504.18415 section 2 (H-BitLinear), 2504.12285 section 2 (SubLN).
  """
  if isinstance(w, Adapted):
    of_base = normed_linear(x, gain, epsilon, w.base, quant, ops, axes)
    return of_base + low_rank(x if gain is None else rms_norm(x, gain, epsilon), w)
  if quant.weights == 'ternary' and quant.hadamard:
    x_r, codes, scale = ops.rotated(x, gain, epsilon, quant.activations)
    return q.bit_matmul(x_r, w, codes, scale, quant.activations, ops.product, axes)
  normed = x if gain is None else rms_norm(x, gain, epsilon)
  return linear(normed, w, quant, ops, axes)


def add_bias(x: Array, bias: Array) -> Array:
  """X + b, added in float32, so that the gradient of b is summed over all tokens in float32.

  Args:
    x: f[..., O].
    bias: f[O].

  Returns:
    f[..., O] in x's dtype.
  """
  return (x.astype(jnp.float32) + bias).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Array, w: Array, dtype: DTypeLike | None = None) -> Array:
  """The product x @ w, whose gradient is computed as dW = Xᵀ dY and summed in float32.

  dW has w's own type. If the caller cast the weight to x's type instead, dW would be rounded to
  that type before it is added up over chips, micro-batches or pieces of a loss.

  JAX itself would write the derivative as (dYᵀ X)ᵀ. On a CPU XLA then computes the elementwise
  operations before it in transposed order, at a small fraction of memory speed. The barrier in the
  backward pass keeps XLA from fusing them into both products that read dY.

  Args:
    x: f[..., I].
    w: f[I, O], cast to x's type.
    dtype: type of the result; None takes x's.

  Returns:
    dtype[..., O].
  """
  return jnp.matmul(x, w.astype(x.dtype),
                    preferred_element_type=x.dtype if dtype is None else dtype)


def _matmul_forward(x: Array, w: Array, dtype: DTypeLike | None
                    ) -> tuple[Array, tuple[Array, Array]]:
  return matmul(x, w, dtype), (x, w)


def _matmul_backward(dtype: DTypeLike | None, saved: tuple[Array, Array],
                     dy: Array) -> tuple[Array, Array]:
  del dtype
  x, w = saved
  dy = jax.lax.optimization_barrier(dy)
  rows = tuple(range(x.ndim - 1))
  dw = jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
  return jnp.matmul(dy, w.T.astype(x.dtype)).astype(x.dtype), dw.astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)
