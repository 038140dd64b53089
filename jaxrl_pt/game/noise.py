"""The chance in a game: a hash of where it is needed, in a few integer operations.

A key is u32[2]. `fold` makes a key of a key and a number, and the draws of a key are a hash of it
and of their index. Nothing is consumed, so that equal seeds give equal worlds whatever the batch,
the backend or the release of JAX, and a program of a whole episode compiles in a moment, which one
with `jax.random`'s generator at every turn of the rules does not. It is no generator for
statistics: draws of up to 16 bits are what games need.

The mixing function is a bijection of 32-bit words that lets every bit of its argument change about
half of the bits of its value (two rounds of multiplying and shifting, as in MurmurHash3's
finaliser; the constants are those of Chris Wellons' `lowbias32`).
"""

import math

from jax import Array
import jax.numpy as jnp
import numpy as np

_GOLDEN = np.uint32(0x9E3779B9)


def _mix(word: Array) -> Array:
  word = (word ^ (word >> 16)) * np.uint32(0x7FEB352D)
  word = (word ^ (word >> 15)) * np.uint32(0x846CA68B)
  return word ^ (word >> 16)


def key(seed: Array | int) -> Array:
  """u32[2]: the key of a whole number from 0 to 2³² − 1."""
  word = jnp.asarray(seed, jnp.uint32) + _GOLDEN
  return jnp.stack([_mix(word), _mix(~word)])


def fold(key: Array, number: Array | int) -> Array:
  """u32[2]: a key of its own for each number from 0 to 2³² − 1.

  No two numbers give the same key, since the first word is a bijection of the number.
  """
  first = _mix(key[0] ^ (jnp.asarray(number).astype(jnp.uint32) * _GOLDEN))
  return jnp.stack([first, _mix(key[1] + first)])


def words(key: Array, shape: tuple[int, ...] = ()) -> Array:
  """u32[shape]: words each value of which is equally likely."""
  index = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape) * _GOLDEN
  return _mix(_mix(jnp.asarray(index) + key[0]) ^ key[1])


def uniform(key: Array, shape: tuple[int, ...] = ()) -> Array:
  """f32[shape]: numbers from 0 up to but not 1, in steps of 2⁻²⁴."""
  return (words(key, shape) >> 8).astype(jnp.float32) * np.float32(2.0**-24)


def whole(key: Array, low: int, high: int, shape: tuple[int, ...] = ()) -> Array:
  """i32[shape]: whole numbers from `low` to `high`, both included; at most 2¹⁶ of them."""
  return low + ((words(key, shape) >> 16) * np.uint32(high - low + 1) >> 16).astype(jnp.int32)
