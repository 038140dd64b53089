"""Gradient accumulation: the gradient of a sum over rows, added up over slices of the rows."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array

Tree = TypeVar('Tree')


def split(batch: Tree, parts: int, groups: int | None = None) -> Tree:
  """Splits the rows of every array into slices: [N, …] → [parts, N / parts, …].

  Slice m takes the groups of rows m, m + parts, m + 2 · parts, …, so that each slice has rows of
  every device and no row moves to another device.

  Args:
    batch: tree of arrays with N rows each, or with one row for each group of rows.
    parts: the number of slices.
    groups: the number of groups; the N / groups neighbouring rows of a group stay in one slice.
      None makes every row a group.
  """
  def each(x: Array) -> Array:
    num = x.shape[0] if groups is None else groups
    grouped = x.reshape(num // parts, parts, x.shape[0] // num, *x.shape[1:])
    return jnp.moveaxis(grouped, 1, 0).reshape(parts, x.shape[0] // parts, *x.shape[1:])

  sliced: Tree = jax.tree.map(each, batch)
  return sliced


def join(sliced: Tree, groups: int | None = None) -> Tree:
  """The inverse of `split`: [parts, N / parts, …] → [N, …].

  Args:
    sliced: tree of arrays with a leading axis of slices.
    groups: as for `split`.
  """
  def each(x: Array) -> Array:
    parts, num = x.shape[0], x.shape[0] * x.shape[1] if groups is None else groups
    grouped = x.reshape(parts, num // parts, -1, *x.shape[2:])
    return jnp.moveaxis(grouped, 0, 1).reshape(parts * x.shape[1], *x.shape[2:])

  whole: Tree = jax.tree.map(each, sliced)
  return whole


def mapped(function: Callable[[Any], Tree], batch: Any, num_micro: int,
           groups: int | None = None) -> Tree:
  """`function(batch)` for a function of rows, computed one micro-batch after the other.

  Args:
    function: a batch → a tree of arrays, with a row for each row of the batch.
    batch, num_micro: as for `gradient`.
    groups: as for `split`.
  """
  if num_micro == 1:
    return function(batch)
  return join(jax.lax.map(function, split(batch, num_micro, groups)), groups)


def gradient(value_and_grad: Callable[[Any, Any], Any], params: Any, batch: Any, num_micro: int,
             split: Callable[[Any, int], Any] = split) -> Any:
  """Computes `value_and_grad(params, batch)` one micro-batch after the other.

  Args:
    value_and_grad: (params, batch) → a tree of values, metrics and gradients, each a sum over the
      rows of the batch, so that the results of micro-batches add up to the result of the whole.
    params: the parameters that the gradient is taken with respect to.
    batch: tree of arrays with a row for each example.
    num_micro: the number of micro-batches.
    split: (batch, num_micro) → the batch with a leading axis of micro-batches.

  Returns:
    What `value_and_grad` returns for the whole batch.
  """
  if num_micro == 1:
    return value_and_grad(params, batch)
  slices = split(batch, num_micro)
  first = jax.tree.map(lambda x: x[0], slices)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                       jax.eval_shape(value_and_grad, params, first))
  add = lambda total, part: (jax.tree.map(jnp.add, total, value_and_grad(params, part)), None)
  return jax.lax.scan(add, zeros, slices)[0]
