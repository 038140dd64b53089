"""Parameters described before they exist.

A model has one tree of `ParamSpec`. From it follow the number of parameters, their initial values,
their shardings, the target of a restore, which weights decay, which are quantised and what they are
called in Hugging Face's format. No shape and no name is stated a second time.
"""

from collections.abc import Callable
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array, Params

Init = Callable[[Array, tuple[int, ...], Any], Array]  # (key, shape, dtype) → array

# A projection of a block (a BitLinear where weights are ternary), its bias, the table of
# embeddings, the head that gives logits, the gains of a norm, or any other matrix or kernel of a
# convolution, which is never quantised. In an adapted model also the ternary codes of a frozen
# projection, their scale, or a matrix of a low-rank adapter.
Role = Literal['projection', 'bias', 'table', 'head', 'gain', 'dense', 'codes', 'scale', 'adapter']


class ParamSpec(NamedTuple):
  """A parameter before it exists.

  shape, dtype: the array's shape and dtype.
  axes: the name of a logical axis for each dimension.
  init: draws the initial values.
  role: decides whether the parameter decays, is quantised, and is rounded in a weight sync.
  hugging_face: the name of the parameter's module in a Hugging Face model, with {layer} if the
    array is stacked over layers. It is empty if no such model has the parameter, and an export is
    then refused.
  is_trained: whether training changes it. A frozen parameter has no gradient and no moments.
  """

  shape: tuple[int, ...]
  dtype: Any
  axes: tuple[str, ...]
  init: Init
  role: Role
  hugging_face: str = ''
  is_trained: bool = True

  @property
  def is_decayed(self) -> bool:
    """Whether weight decay acts on it: on matrices that multiply, and on nothing else."""
    return self.role in ('projection', 'head', 'dense', 'adapter')


def is_spec(x: Any) -> bool:
  """Whether `x` is a ParamSpec, which `jax.tree` must not take apart."""
  return isinstance(x, ParamSpec)


def normal(stddev: float) -> Init:
  """Draws from a Gaussian of the given standard deviation."""
  return lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype)


def ones(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """All ones, for the gains of norms."""
  del key
  return jnp.ones(shape, dtype)


def zeros(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """All zeros, for biases."""
  del key
  return jnp.zeros(shape, dtype)


def map_specs(fn: Callable[[ParamSpec], Any], specs: Any) -> Any:
  """Applies `fn` to every ParamSpec leaf."""
  return jax.tree.map(fn, specs, is_leaf=is_spec)


def init(specs: Any, key: Array) -> Params:
  """Draws every parameter from a key of its own: `key` folded with the leaf's number in the tree.

  Call it under `jit` with `out_shardings`, so that no device ever holds all parameters.
  """
  leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
  values = [s.init(jax.random.fold_in(key, i), s.shape, s.dtype) for i, s in enumerate(leaves)]
  return jax.tree.unflatten(treedef, values)


def abstract(specs: Any) -> Any:
  """The tree of parameters as `jax.ShapeDtypeStruct`."""
  return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)


def count(specs: Any) -> int:
  """The number of parameters."""
  return sum(math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=is_spec))


def num_bytes(specs: Any) -> int:
  """The bytes that all parameters take; a ternary code takes two bits."""
  bits = lambda s: jnp.iinfo(s.dtype).bits if s.role == 'codes' else 8 * s.dtype.itemsize
  return sum(math.prod(s.shape) * bits(s)
             for s in jax.tree.leaves(specs, is_leaf=is_spec)) // 8


# --- Trained and frozen parameters ------------------------------------------------


def trained(specs: Any, tree: Any) -> Any:
  """The leaves of a tree like `specs` that training changes, with None in place of the others.

  Training differentiates and optimises this tree alone; where no adapter freezes the model, it is
  the whole tree.
  """
  return _those(specs, tree, are_trained=True)


def frozen(specs: Any, tree: Any) -> Any:
  """The leaves of a tree like `specs` that stay as they are, with None in place of the others."""
  return _those(specs, tree, are_trained=False)


def _those(specs: Any, tree: Any, are_trained: bool) -> Any:
  return jax.tree.map(lambda s, x: x if s.is_trained == are_trained else None, specs, tree,
                      is_leaf=is_spec)


def joined(tree: Any, part: Any) -> Any:
  """The tree with the leaves of `part`, which has None where the leaf of `tree` stays."""
  return jax.tree.map(lambda new, old: old if new is None else new, part, tree,
                      is_leaf=lambda x: x is None)
