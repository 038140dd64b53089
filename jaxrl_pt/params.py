"""Parameters described before they exist.

One tree of `ParamSpec` gives the parameter count, the initial values, the
shardings and the targets of a restore; nothing else states a shape twice.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array, Params

Init = Callable[[Array, tuple[int, ...], Any], Array]


class ParamSpec(NamedTuple):
  """A parameter before it exists: shape, dtype, one logical axis name per dimension, init."""

  shape: tuple[int, ...]
  dtype: Any
  axes: tuple[str, ...]
  init: Init


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
