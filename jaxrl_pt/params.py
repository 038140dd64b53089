"""Parameters described before they exist.

One tree of `ParamSpec` gives the parameter count, the initial values, the shardings, the targets
of a restore, which weights decay, which are quantised and what other formats call them; nothing
else states a shape or a name twice.
"""

from collections.abc import Callable
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array, Params

Init = Callable[[Array, tuple[int, ...], Any], Array]


# A projection of a block (a BitLinear where weights are ternary), the table of embeddings, the head
# that gives logits, or the gains of a norm.
Role = Literal['projection', 'table', 'head', 'gain']


class ParamSpec(NamedTuple):
  """A parameter before it exists.

  shape, dtype: of the array; axes: one logical axis name a dimension; init: its first values.
  role: decides what is done with it: `is_decayed`, and quantisation and rounding for a sampler.
  hugging_face: its name in such a model without '.weight', with {layer} where the array is stacked
    over layers; empty if no such model has it, which an export then refuses.
  """

  shape: tuple[int, ...]
  dtype: Any
  axes: tuple[str, ...]
  init: Init
  role: Role
  hugging_face: str = ''

  @property
  def is_decayed(self) -> bool:
    """Whether weight decay acts on it: on products, not on the embeddings or gains of norms."""
    return self.role in ('projection', 'head')


def is_spec(x: Any) -> bool:
  return isinstance(x, ParamSpec)


def normal(stddev: float) -> Init:
  """Gaussian of the given standard deviation."""
  return lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype)


def ones(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """All ones (gains of norms)."""
  del key
  return jnp.ones(shape, dtype)


def map_specs(fn: Callable[[ParamSpec], Any], specs: Any) -> Any:
  """Applies `fn` to every ParamSpec leaf."""
  return jax.tree.map(fn, specs, is_leaf=is_spec)


def init(specs: Any, key: Array) -> Params:
  """Draws every parameter from its own key, folded from its path's place in the tree.

  Call it under `jit` with `out_shardings` so that no device ever holds the whole.
  """
  leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
  values = [s.init(jax.random.fold_in(key, i), s.shape, s.dtype) for i, s in enumerate(leaves)]
  return jax.tree.unflatten(treedef, values)


def abstract(specs: Any) -> Any:
  """The tree as `jax.ShapeDtypeStruct`, for `eval_shape`-style uses."""
  return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)


def count(specs: Any) -> int:
  """Number of parameters."""
  return sum(math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=is_spec))
