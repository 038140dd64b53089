"""The key/value cache of `extend`: one slot per position, stacked over layers."""

from flax import struct
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.config import Model
from jaxrl_pt.types import Array


@struct.dataclass
class KVCache:
  """Keys (after RoPE) and values. Slot c of a row holds position c; what lies beyond the
  row's length is garbage that no query's mask reaches."""

  k: Array  # f[L, B, C, K, E]
  v: Array  # f[L, B, C, K, E]


def init(config: Model, num_rows: int, num_slots: int, dtype: DTypeLike) -> KVCache:
  """An empty cache for `num_rows` sequences of at most `num_slots` tokens."""
  shape = (config.num_layers, num_rows, num_slots, config.num_kv_heads, config.head_dim)
  return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(cache_BCKE: Array, new_BSKE: Array, positions_BS: Array) -> Array:
  """Puts S new entries of each row into the slots of their positions."""
  rows = jnp.arange(cache_BCKE.shape[0])[:, None]
  return cache_BCKE.at[rows, positions_BS].set(new_BSKE.astype(cache_BCKE.dtype))


def repeat(cache: KVCache, num_copies: int, num_slots: int) -> KVCache:
  """Gives each row `num_copies` consecutive copies (a group's samples) and room for
  `num_slots` more tokens. A group's prompt is so computed once."""
  def grow(x: Array) -> Array:
    x = jnp.repeat(x, num_copies, axis=1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, num_slots), (0, 0), (0, 0)))
  return KVCache(grow(cache.k), grow(cache.v))
