"""The operations of a block that have kernels, as values that a model is built with.

The defaults here are the definitions, computed by XLA; `parallel.kernels` puts TPU kernels
in their place. A model does not know which of the two it was given.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.config import ActivationQuant
from jaxrl_pt.nn import quant
from jaxrl_pt.nn.attention import causal_attention
from jaxrl_pt.nn.kv_quant import PackedPages
from jaxrl_pt.nn.page_writes import write_tokens
from jaxrl_pt.nn.paged_attention import paged_attention, paged_attention_beside
from jaxrl_pt.nn.sparse_attention import Reading, sparse_attention
from jaxrl_pt.types import Array
from pallas_kernels.hadamard_quantize import reference
from pallas_kernels.sparse_decode import Selection

# Logical names of a weight's two dimensions, e.g. ('embed', 'heads').
Axes = tuple[str, str]
# product(x_codes, x_scale, w_codes, w_scale, kind, axes, dtype) → y
Product = Callable[[Array, Array, Array, Array, ActivationQuant, Axes, DTypeLike], Array]
# rotated(x, gain or None, epsilon, kind) → (x_r, codes, scale)
Rotated = Callable[[Array, Array | None, float, ActivationQuant], tuple[Array, Array, Array]]
# attention(q_BTHE, k_BTKE, v_BTKE, segments_BT) → out_BTHE
Attention = Callable[[Array, Array, Array, Array], Array]
# paged(q_BSHE, pages, scales or None, table_BP, starts_B, counts_B) → out_BSHE
Paged = Callable[[Array, Array | PackedPages, Array | None, Array, Array, Array], Array]
# paged_beside(the arguments of paged, table_DP, shared_B) → out_BSHE
PagedBeside = Callable[
    [Array, Array | PackedPages, Array | None, Array, Array, Array, Array, Array], Array]
# write_pages(pool, table_BP, starts_B, counts_B, new_BSK2…, nobody) → pool
WritePages = Callable[[Array, Array, Array, Array, Array, Array | int], Array]


class ReadSparsely(Protocol):
  """The signature of `sparse_attention`."""

  def __call__(self, q_BHE: Array, pages: Array | PackedPages, bounds_LBKPD: Array, layer: Array,
               table_BP: Array, lengths_B: Array, selection: Selection,
               scales: Array | None = None) -> Reading: ...


def product(x_codes: Array, x_scale: Array, w_codes: Array, w_scale: Array,
            kind: ActivationQuant, axes: Axes, dtype: DTypeLike) -> Array:
  """The quantised product Y = (codes_x · codes_w) · scale_x · scale_w.

  Args:
    x_codes: [..., I] integers in any type.
    x_scale: f32[..., 1].
    w_codes: [I, O] in {−1, 0, 1} in any type.
    w_scale: f32[1, 1].
    kind: how the activations were quantised; only kernels read it.
    axes: logical names of I and O; only kernels read them.
    dtype: type of the result.

  Returns:
    dtype[..., O]; sums of codes stay below 2²⁴, so float32 accumulates them exactly.
  """
  del kind, axes
  sums = jnp.matmul(x_codes.astype(dtype), w_codes.astype(dtype),
                    preferred_element_type=jnp.float32)
  return (sums * (x_scale * w_scale[..., 0])).astype(dtype)


def rotated(x: Array, gain: Array | None, epsilon: float,
            kind: ActivationQuant) -> tuple[Array, Array, Array]:
  """The input of H-BitLinear: an RMSNorm with its gain, the Hadamard rotation, the quantiser.

  Args:
    x: f[..., I].
    gain: f32[I], or None for no norm.
    epsilon: of the norm.
    kind: how each token's row is quantised.

  Returns:
    x_r f[..., I], the rotated row, through which the gradient flows; its codes f[..., I]; their
    scale f32[..., 1]. The codes are those of the row before it is rounded to x's type.

  Source: 2504.18415 section 2.
  """
  x_r = reference.rotated(x, gain, epsilon)
  codes, scale = quant.activations(jax.lax.stop_gradient(x_r), kind)
  return x_r.astype(x.dtype), codes.astype(x.dtype), scale


class Ops(NamedTuple):
  """The operations that a block computes with; the types above give their signatures."""

  product: Product = product
  rotated: Rotated = rotated
  attention: Attention = causal_attention
  paged: Paged = paged_attention
  paged_beside: PagedBeside = paged_attention_beside
  write_pages: WritePages = write_tokens
  sparse: ReadSparsely = sparse_attention
