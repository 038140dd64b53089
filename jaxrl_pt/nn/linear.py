"""Linear layers: plain, BitLinear and H-BitLinear behind one function."""

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
    return jnp.matmul(x, w.astype(x.dtype))
  if rotate and quant.hadamard:
    x = q.hadamard(x)
  return q.bit_matmul(x, w, quant.activations)
