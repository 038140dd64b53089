"""Low-rank adapters (LoRA) as a transformation of a model's parameters, described or given.

The adapted projections become `Adapted`: the weight, and the matrices A and B of its adapter. All
parameters but A and B are frozen, so that the optimiser, the gradient and a weight sync know
nothing of them. The frozen projections of a ternary model are kept as codes of two bits, which are
those that a BitLinear would compute from the latent weights in every step.

B starts at 0, so that an adapted model computes at first what it was made from.

Source: LoRA 2106.09685 section 4.1. Departs from the paper in the variance of A, which it leaves
open: 1 / in, that of the projections here.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.config.model import GROUP
from jaxrl_pt.errors import UserError
from jaxrl_pt.nn.linear import Adapted
from jaxrl_pt.nn.quant import TernaryWeight, weights
from jaxrl_pt.params import ParamSpec, init, is_spec, map_specs, normal, zeros
from jaxrl_pt.types import Array, Params


def projection_of(spec: ParamSpec) -> str:
  """The last part of a parameter's Hugging Face name, such as 'q_proj'."""
  return spec.hugging_face.rpartition('.')[2]


# --- Described --------------------------------------------------------------------


def adapt_specs(specs: Any, config: cfg.Model) -> Any:
  """The tree of ParamSpec of a model with the adapter that its settings choose."""
  match config.adapter:
    case cfg.LoRA() as adapter:
      return map_specs(lambda spec: _adapted_spec(spec, adapter, config.quant.weights), specs)
    case _:
      return specs


def _adapted_spec(spec: ParamSpec, adapter: cfg.LoRA, kind: cfg.WeightQuant) -> Any:
  spec = spec._replace(is_trained=False)
  if spec.role != 'projection':
    return spec
  base = spec if kind == 'none' else _packed_spec(spec, kind)
  if projection_of(spec) not in adapter.projections:
    return base
  stacked, (rows, columns) = spec.shape[:-2], spec.shape[-2:]
  *layers, row_axis, column_axis = spec.axes
  matrix = ParamSpec((*stacked, rows, adapter.rank), jnp.dtype('float32'),
                     (*layers, row_axis, 'rank'), normal(rows**-0.5), 'adapter',
                     f'{spec.hugging_face}.lora_A')
  back = matrix._replace(shape=(*stacked, adapter.rank, columns), init=zeros,
                         axes=(*layers, 'rank', column_axis),
                         hugging_face=f'{spec.hugging_face}.lora_B')
  return Adapted(base, matrix, back, adapter.scale)  # type: ignore[arg-type]  # Of specs.


def _packed_spec(spec: ParamSpec, kind: cfg.WeightQuant) -> TernaryWeight:
  """Codes and scale of a projection whose latent weights are not kept."""
  def drawn(key: Array) -> tuple[Array, Array]:
    return weights(spec.init(key, spec.shape, jnp.float32), kind)

  codes = spec._replace(
      dtype=jnp.dtype(jnp.int2), role='codes', hugging_face='',
      init=lambda key, shape, dtype: drawn(key)[0].astype(dtype))
  *layers, rows, columns = spec.shape
  of_matrix = (1, 1) if kind == 'ternary' else (rows // GROUP, columns)
  scale = spec._replace(
      shape=(*layers, *of_matrix), dtype=jnp.dtype('float32'), role='scale', hugging_face='',
      axes=(*spec.axes[:-2], 'norm', 'norm'), init=lambda key, shape, dtype: drawn(key)[1])
  return TernaryWeight(codes, scale)  # type: ignore[arg-type]  # Of specs.


# --- Given ------------------------------------------------------------------------


def _is_node(x: Any) -> bool:
  return is_spec(x) or isinstance(x, Adapted | TernaryWeight)


def adapt(specs: Any, params: Params, key: Array) -> Params:
  """Parameters of a model without adapters as those of an adapted model that computes the same.

  Args:
    specs: the tree of ParamSpec of the model with adapters.
    params: parameters of the same model without them. If they have adapters already, or the model
      has none, they are returned as they are.
    key: from which every A is drawn.
  """
  adapters = init(map_specs(lambda s: s if s.role == 'adapter' else _nothing(s), specs), key)

  def leaf(spec: Any, drawn: Any, given: Any) -> Any:
    match spec:
      case Adapted() if not isinstance(given, Adapted):
        return drawn.replace(base=_frozen(spec.base, given))
      case TernaryWeight():
        return _frozen(spec, given)
      case _:
        return given

  return jax.tree.map(leaf, specs, adapters, params, is_leaf=_is_node)


def _nothing(spec: ParamSpec) -> ParamSpec:
  """A parameter of no size, in place of one whose initial values are not wanted."""
  return spec._replace(shape=(0,), init=zeros)


def _frozen(spec: Any, given: Any) -> Any:
  """A frozen weight as its ParamSpec says: packed, or as it is."""
  if not isinstance(spec, TernaryWeight) or isinstance(given, TernaryWeight):
    return given
  is_one = spec.scale.shape[-2:] == (1, 1)  # scale of a matrix
  codes, scale = weights(given, 'ternary' if is_one else 'ternary_128')
  return TernaryWeight(codes.astype(jnp.int2), scale)


def merged(params: Params) -> Params:
  """Parameters of a model without adapters that computes the same: W + c · A B.

  Raises:
    UserError: a weight is ternary, whose codes cannot hold the sum.
  """
  def leaf(x: Any) -> Any:
    if isinstance(x, Adapted) and not isinstance(x.base, TernaryWeight):
      product = jnp.matmul(x.a, x.b, precision='highest') * x.scale
      return (x.base.astype(jnp.float32) + product).astype(x.base.dtype)
    if isinstance(x, Adapted | TernaryWeight):
      raise UserError('The adapters of a ternary model cannot be merged into it, since the sum has '
                      'no ternary codes: export the adapters with --format peft, beside the model '
                      'that the run started from.')
    return x

  return jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, Adapted | TernaryWeight))
