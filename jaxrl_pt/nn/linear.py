"""Linear layers: plain, BitLinear and H-BitLinear behind one function."""

import jax
import jax.numpy as jnp

from jaxrl_pt.config import Quant
from jaxrl_pt.nn import quant as q
from jaxrl_pt.types import Array


def linear(x: Array, w: Array, quant: Quant, *, rotate: bool = False) -> Array:
  """Y = X W, with W and X quantised as `quant` says.

  Args:
    x: f[..., I].
    w: f[I, O] (latent) weights.
    quant: 'none' weights give the plain product in x's dtype.
    rotate: True at W_o and W_down, where `quant.hadamard` makes it H-BitLinear.

  Returns:
    f[..., O] in x's dtype.

  Source: 2504.18415 section 2, 2504.12285 section 2.
  """
  if quant.weights == 'none':
    return matmul(x, w.astype(x.dtype))
  if rotate and quant.hadamard:
    x = q.hadamard(x)
  return q.bit_matmul(x, w, quant.activations)


@jax.custom_vjp
def matmul(x: Array, w: Array) -> Array:
  """x f[..., I] @ w f[I, O], with dW = Xᵀ dY asked for in that very form.

  The derivative that JAX writes is (dYᵀ X)ᵀ; on a CPU XLA then computes the elementwise
  operations before it in transposed order, at a small fraction of memory speed. The
  barrier keeps it from fusing them into both products that read dY.
  """
  return jnp.matmul(x, w)


def _matmul_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
  return jnp.matmul(x, w), (x, w)


def _matmul_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
  x, w = saved
  dy = jax.lax.optimization_barrier(dy)
  rows = tuple(range(x.ndim - 1))
  dw = jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))
  return jnp.matmul(dy, w.T), dw


matmul.defvjp(_matmul_forward, _matmul_backward)
