"""The gradient of a sum over rows, computed in slices of the rows that add up."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array

Tree = TypeVar('Tree')


def split(batch: Tree, parts: int, groups: int | None = None) -> Tree:
  """[N, …] → [parts, N / parts, …] of every array.

  Part m has groups m, m + parts, … of rows: every device keeps its own.

  Args:
    batch: arrays of N rows or, of what a group shares, one row a group.
    parts: how many slices.
    groups: rows that must stay together are N / groups neighbours; None keeps none together.
  """
  def each(x: Array) -> Array:
    num = x.shape[0] if groups is None else groups
    grouped = x.reshape(num // parts, parts, x.shape[0] // num, *x.shape[1:])
    return jnp.moveaxis(grouped, 1, 0).reshape(parts, x.shape[0] // parts, *x.shape[1:])

  sliced: Tree = jax.tree.map(each, batch)
  return sliced


def gradient(value_and_grad: Callable[[Any, Any], Any], params: Any, batch: Any, num_micro: int,
             split: Callable[[Any, int], Any] = split) -> Any:
  """`value_and_grad(params, batch)`, of a function that is a sum over rows, in micro-batches.

  Args:
    value_and_grad: (params, batch) → a tree of values, metrics and gradients, all sums over rows.
    params: what the gradient is taken by.
    batch: arrays with a row for each example.
    num_micro: micro-batches, one after the other; their results are added up.
    split: how rows become micro-batches.
  """
  if num_micro == 1:
    return value_and_grad(params, batch)
  slices = split(batch, num_micro)
  one = jax.tree.map(lambda x: x[0], slices)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                       jax.eval_shape(value_and_grad, params, one))
  add = lambda total, part: (jax.tree.map(jnp.add, total, value_and_grad(params, part)), None)
  return jax.lax.scan(add, zeros, slices)[0]
