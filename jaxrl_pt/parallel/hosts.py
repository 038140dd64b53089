"""Arrays over several processes: which part each one owns, and moves between hosts and devices.

The sharding alone says which part of an array a process owns, and not the number of the process:
mesh axes that replicate the array (as `tensor` does with a batch's rows) or split another dimension
(as `context` does with its tokens) may span processes, too.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
import numpy as np


@functools.lru_cache(maxsize=64)
def owned(sharding: Sharding, shape: tuple[int, ...], process: int | None = None
          ) -> tuple[np.ndarray, ...]:
  """The indices of each axis that the devices of a process hold, in rising order.

  Args:
    sharding: the sharding of the global array.
    shape: the shape of the global array.
    process: the index of the process; None for this one.

  Returns:
    i64 arrays, one for each axis of `shape`. Their product is the smallest grid that contains all
    shards of the process. On slices whose hosts are blocks of chips it contains nothing else.
  """
  process = jax.process_index() if process is None else process
  indices: Mapping[Any, Any] = sharding.devices_indices_map(shape)
  mine = [index for device, index in indices.items() if device.process_index == process]
  return tuple(
      np.unique(np.concatenate([np.arange(*part.indices(size)) for part in parts]))
      for size, *parts in zip(shape, *mine, strict=True))


def from_part(part: np.ndarray, shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
  """The global array of which each process gives the part that it owns.

  Args:
    part: the part with the indices that `owned` returns for this process.
    shape: the shape of the global array.
    sharding: the sharding of the global array.

  Raises:
    ValueError: the part has another shape.
  """
  indices = owned(sharding, shape)
  if part.shape != tuple(map(len, indices)):
    raise ValueError(f'this process owns {list(map(len, indices))} of {list(shape)}, '
                     f'not {list(part.shape)}')

  def shard(index: Any) -> np.ndarray:
    bounds = (piece.indices(size)[:2] for piece, size in zip(index, shape, strict=True))
    return part[tuple(slice(*np.searchsorted(mine, both))
                      for mine, both in zip(indices, bounds, strict=True))]

  return jax.make_array_from_callback(shape, sharding, shard)


def from_whole(whole: Any, sharding: Sharding) -> jax.Array:
  """The global array of which every process gives the same whole array."""
  whole = np.asarray(whole)
  return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def on_host(tree: Any) -> Any:
  """The tree's whole arrays as NumPy arrays, in every process.

  All processes must call it at the same point. Arrays that each process has whole are not sent.
  """
  def fetch(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)

  return jax.tree.map(fetch, tree)


def agreed(tree: Any) -> Any:
  """The first process's values, in all processes, where they may have found different ones."""
  if jax.process_count() > 1:
    return multihost_utils.broadcast_one_to_all(tree)
  return tree


def highest(value: int) -> jax.Array:
  """i32[]: the highest of the processes' values, which the devices may still compute.

  All processes must call it at the same point.
  """
  mesh = Mesh(np.array(jax.devices()), ('devices',))
  values = jax.make_array_from_callback(
      (mesh.size,), NamedSharding(mesh, PartitionSpec('devices')),
      lambda index: np.full(1, value, np.int32))
  return _max(values)


_max = jax.jit(jnp.max)
