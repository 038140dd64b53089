"""Key/value caches of `extend` and the attentions that read them.

A cache is a pytree that is carried through the layers. Each leaf has a leading layer axis, so a
step writes its new entries in place and copies nothing. Each kind of cache comes with an `Attend`,
a function that writes new keys and values and returns the attention over what it may see: whole
sequences, prefill, decode, trees, pages and sparse reading differ in it alone. Keys are stored
after RoPE, heads before time, so that the keys of a head lie side by side.
"""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.config import Model
from jaxrl_pt.nn import attention as attn
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.types import Array

# attend(q_BSHE, k_BSKE, v_BSKE, cache, layer i32[]) → (out_BSHE, cache)
Attend = Callable[[Array, Array, Array, Any, Array], tuple[Array, Any]]


@struct.dataclass
class KVCache:
  """Each sequence has one row of slots, and slot c holds position c.

  Slots beyond a row's length hold garbage, which the mask of every query hides.
  """

  k: Array  # f[L, B, K, C, E]
  v: Array  # f[L, B, K, C, E]


def init(config: Model, num_rows: int, num_slots: int, dtype: DTypeLike) -> KVCache:
  """An empty cache for `num_rows` sequences of at most `num_slots` tokens."""
  shape = (config.num_layers, num_rows, config.num_kv_heads, num_slots, config.head_dim)
  return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


# --- Whole sequences --------------------------------------------------------------


def sequences(ops: Ops, segments_BT: Array) -> Attend:
  """Attention inside the packed segments of whole sequences; there is no cache."""
  def attend(q: Array, k: Array, v: Array, cache: Any, layer: Array) -> tuple[Array, Any]:
    del layer
    return ops.attention(q, k, v, segments_BT), cache

  return attend


def prompts(ops: Ops, num_rows: int, num_tokens: int) -> Attend:
  """Does what `dense` does, for tokens that start at position 0 of an empty KVCache.

  It uses the faster attention of whole sequences and leaves keys and values in the cache.
  """
  one_segment = jnp.ones((num_rows, num_tokens), jnp.int32)

  def attend(q: Array, k: Array, v: Array, cache: KVCache,
             layer: Array) -> tuple[Array, KVCache]:
    new = KVCache(_put(cache.k, k, layer), _put(cache.v, v, layer))
    return ops.attention(q, k, v, one_segment), new

  return attend


def _put(cache_LBKCE: Array, new_BTKE: Array, layer: Array) -> Array:
  new = jnp.swapaxes(new_BTKE, 1, 2)[None].astype(cache_LBKCE.dtype)
  return jax.lax.dynamic_update_slice(cache_LBKCE, new, (layer, 0, 0, 0, 0))


# --- New tokens against a row of slots ---------------------------------------------


def dense(positions_BS: Array) -> Attend:
  """Each new token is written to the slot of its position and sees the slots up to it."""
  def attend(q: Array, k: Array, v: Array, cache: KVCache,
             layer: Array) -> tuple[Array, KVCache]:
    cache = KVCache(write(cache.k, k, positions_BS, layer),
                    write(cache.v, v, positions_BS, layer))
    k_BKCE, v_BKCE = cache.k[layer].astype(q.dtype), cache.v[layer].astype(q.dtype)
    mask = attn.cache_mask(positions_BS, k_BKCE.shape[2])
    return attn.head_major_attention(q, k_BKCE, v_BKCE, mask), cache

  return attend


def write(cache_LBKCE: Array, new_BSKE: Array, positions_BS: Array, layer: Array) -> Array:
  """Puts S new entries of each row into the slots of their positions."""
  rows = jnp.arange(cache_LBKCE.shape[1])[:, None]
  return cache_LBKCE.at[layer, rows, :, positions_BS].set(new_BSKE.astype(cache_LBKCE.dtype))


# --- Branches that share a prefix ---------------------------------------------------


def tree(ops: Ops, prefix_len: int, prefix_lengths_NR: Array) -> Attend:
  """Documents with their branches in one packed row: [T of the document | R · S of the branches].

  The attention of a tree mask: the document is causal; branch r's tokens see the document's
  positions below prefix_lengths[n, r] and, causally, one another. There is no cache.
  """
  num_docs = prefix_lengths_NR.shape[0]

  def attend(q: Array, k: Array, v: Array, cache: Any, layer: Array) -> tuple[Array, Any]:
    del layer
    k_doc, v_doc = k[:, :prefix_len], v[:, :prefix_len]
    one_segment = jnp.ones((num_docs, prefix_len), jnp.int32)
    out_doc = ops.attention(q[:, :prefix_len], k_doc, v_doc, one_segment)
    if q.shape[1] == prefix_len:  # No branch has tokens of its own.
      return out_doc, cache
    out_own = whole_branches(q[:, prefix_len:], k[:, prefix_len:], v[:, prefix_len:],
                              jnp.swapaxes(k_doc, 1, 2), jnp.swapaxes(v_doc, 1, 2),
                              prefix_lengths_NR)
    return jnp.concatenate([out_doc, out_own], 1), cache

  return attend


def branches_of(prefix: KVCache, prefix_lengths_NR: Array) -> Attend:
  """Does what `tree` does for the branches alone, where the documents' keys and values are cached.

  Rows hold the R · S tokens of a document's branches. It is differentiable in the prefix, too.
  """
  def attend(q: Array, k: Array, v: Array, cache: Any, layer: Array) -> tuple[Array, Any]:
    out = whole_branches(q, k, v, prefix.k[layer], prefix.v[layer], prefix_lengths_NR)
    return out, cache

  return attend


def whole_branches(q: Array, k: Array, v: Array, k_NKTE: Array, v_NKTE: Array,
                    prefix_lengths_NR: Array) -> Array:
  """Attention of branches that lie side by side, each over its document and itself."""
  own = (*prefix_lengths_NR.shape, -1)
  q_NRSHE, k_own, v_own = (x.reshape(*own, *x.shape[2:]) for x in (q, k, v))
  out = attn.blocked_branch_attention(
      q_NRSHE, k_NKTE, v_NKTE, prefix_lengths_NR, k_own.transpose(0, 3, 1, 2, 4),
      v_own.transpose(0, 3, 1, 2, 4))
  return out.reshape(q.shape)
