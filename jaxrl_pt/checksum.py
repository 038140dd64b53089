"""Checksums of array trees that do not depend on how the arrays are sharded."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.types import Array

# Numbers whose bit patterns exist at once where a whole array lies on one device: XLA writes them
# out on a CPU, and those of all arrays would take as much memory as a model does.
_PIECE = 1 << 24


def _mix(x: Array) -> Array:
  """A bijection of u32 that spreads every bit over all the others."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x9E3779B1)
  x = (x ^ (x >> 15)) * jnp.uint32(0x85EBCA77)
  return x ^ (x >> 16)


def _bits(x: Array) -> Array:
  """u32 bit patterns of `x`; numbers of 64 bits get a last axis of two halves."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    x = jnp.stack([x.real, x.imag], axis=-1)
  bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else (
      jnp.finfo(x.dtype).bits)
  if bits < 8:  # int2 and int4: the value says it all
    return x.astype(jnp.int32).astype(jnp.uint32)
  if bits >= 32:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, {8: jnp.uint8, 16: jnp.uint16}[bits]).astype(jnp.uint32)


def _checksum(x: Array, first: Array | int = 0) -> Array:
  """The sum over an array, whose first number has the flat index `first`."""
  bits = _bits(x)
  index, stride = jnp.full(bits.shape, first, jnp.uint32), 1
  for axis in reversed(range(bits.ndim)):
    iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index = index + iota * jnp.uint32(stride % 2**32)
    stride *= bits.shape[axis]
  return jnp.sum(_mix(bits ^ _mix(index + jnp.uint32(1))), dtype=jnp.uint32)


@jax.jit
def _checksums(leaves: list[Array]) -> Array:
  """u32[leaves]: one vector, so that one transfer fetches them all."""
  return jnp.stack([_checksum(x) for x in leaves])


@functools.partial(jax.jit, static_argnums=2)
def _checksum_of_rows(x: Array, row: Array, num_rows: int) -> Array:
  rows = jax.lax.dynamic_slice_in_dim(x, row, num_rows)
  return _checksum(rows, row.astype(jnp.uint32) * jnp.uint32(_stride(x)))


def _stride(x: Array) -> int:
  """How many flat indices, modulo 2³², a row of `x` takes."""
  return math.prod(x.shape[1:]) * max(1, x.dtype.itemsize // 4) % 2**32


def _in_pieces(x: Array) -> int:
  """The checksum of a large array, of which some rows are taken at a time."""
  num_rows = max(1, _PIECE * x.shape[0] // x.size)
  total = 0
  for row in range(0, x.shape[0], num_rows):
    count = min(num_rows, x.shape[0] - row)
    # Taken as an integer at once, so that the next piece waits for the memory of this one.
    total += int(_checksum_of_rows(x, jnp.int32(row), count))
  return total % 2**32


def _is_large(x: Any) -> bool:
  """Whether it is taken in pieces; an array on several devices stays where it is."""
  return (isinstance(x, jax.Array) and x.size > _PIECE and x.shape[0] > 1
          and len(x.devices()) == 1)


def paths(tree: Any) -> dict[str, Any]:
  """{path: leaf}, paths spelt like `params/layers/w`."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def checksum(tree: Any) -> dict[str, int]:
  """Checksum of every leaf: Σ_i mix(bits_i ⊕ mix(i + 1)) mod 2³², i the flat index.

  The sum is exact integer arithmetic over global positions, so it does not depend on
  the sharding or the order of summation; `mix` is a bijection, so any one changed
  element changes it, and moved or paired changes pass with probability 2⁻³².

  Args:
    tree: arrays of any dtype but typed PRNG keys (store `jax.random.key_data`).

  Returns:
    {path: checksum}, computed on the devices where the leaves lie.
  """
  leaves = paths(tree)
  if not leaves:
    return {}
  large = {path: _in_pieces(x) for path, x in leaves.items() if _is_large(x)}
  others = [path for path in leaves if path not in large]
  sums = np.asarray(_checksums([leaves[path] for path in others])) if others else ()
  found = {**large, **{path: int(value) for path, value in zip(others, sums, strict=True)}}
  return {path: found[path] for path in leaves}
