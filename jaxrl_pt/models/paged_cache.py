"""The paged key/value cache: sequences are lists of fixed-size pages of one pool.

A page holds the keys and values of `page` consecutive tokens of one sequence, and a page table says
which page holds which tokens. Sequences of one prompt share the pages of that prompt. Page 0
belongs to nobody: rows without a sequence write there, and nothing reads it. Pages are stored in
the model's own type, or as int8 with one scale per token and head.
"""

import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.config import Model
from jaxrl_pt.models.kv_cache import Attend
from jaxrl_pt.nn import attention as attn
from jaxrl_pt.types import Array

NOBODY = 0
# A step reads the smallest of these fractions (1/8, 1/4, …) of the page table that its sequences
# need, so that short sequences do not pay for the longest that fits.
READ_SHARES = (8, 4, 2, 1)


@struct.dataclass
class PagedCache:
  """A pool of N pages a layer."""

  pages: Array  # f or i8[L, K, N, 2, page, E]; keys, then values
  scales: Array | None  # f32[L, K, N, 2, page] where pages are int8


def init(config: Model, num_pages: int, page_size: int, dtype: DTypeLike) -> PagedCache:
  """An empty pool; with the dtype int8, keys and values are quantised as they are written."""
  shape = (config.num_layers, config.num_kv_heads, num_pages, 2, page_size, config.head_dim)
  scales = jnp.zeros(shape[:-1], jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
  return PagedCache(jnp.zeros(shape, dtype), scales)


def paged(table_BP: Array, positions_BS: Array, is_token_BS: Array | bool = True) -> Attend:
  """Each new token is written to the page of its position and sees the positions up to it.

  Args:
    table_BP: i32[B, P] the page of each `page` tokens of each row; NOBODY where a row has none.
    positions_BS: i32[B, S].
    is_token_BS: bool[B, S], False for padding, which is written to page NOBODY.
  """
  def attend(q: Array, k: Array, v: Array, cache: PagedCache,
             layer: Array) -> tuple[Array, PagedCache]:
    page_size = cache.pages.shape[4]
    pages_BS = jnp.take_along_axis(table_BP, positions_BS // page_size, 1, mode='clip')
    pages_BS = jnp.where(is_token_BS, pages_BS, NOBODY)
    cache = _write(cache, layer, pages_BS, positions_BS % page_size, jnp.stack([k, v], 3))
    num_pages = table_BP.shape[1]
    widths = sorted({-(-num_pages // share) for share in READ_SHARES})
    needed = positions_BS.max() // page_size + 1
    which = sum((needed > width).astype(jnp.int32) for width in widths[:-1])
    branches = [functools.partial(_read, table_BP[:, :width], positions_BS) for width in widths]
    return jax.lax.switch(which, branches, q, cache, layer), cache

  return attend


def _write(cache: PagedCache, layer: Array, pages_BS: Array, offsets_BS: Array,
           new_BSK2E: Array) -> PagedCache:
  # Every axis but the last is indexed: an axis left whole between them would make the TPU's
  # scatter ask for another layout, and the whole pool be copied there and back in each layer.
  heads_K1, both = jnp.arange(new_BSK2E.shape[2])[:, None], jnp.arange(2)
  at = (layer, heads_K1, pages_BS[..., None, None], both, offsets_BS[..., None, None])
  if cache.scales is None:
    return PagedCache(cache.pages.at[at].set(new_BSK2E.astype(cache.pages.dtype)), None)
  codes, scales = quantise(new_BSK2E)
  return PagedCache(cache.pages.at[at].set(codes), cache.scales.at[at].set(scales))


def quantise(x: Array) -> tuple[Array, Array]:
  """Quantises vectors f[..., E] by their absmax to int8 codes and a scale f32[...] for each."""
  x = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.abs(x).max(-1), 1e-12) / 127
  return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def _read(table_BP: Array, positions_BS: Array, q: Array, cache: PagedCache,
          layer: Array) -> Array:
  num_rows, num_pages = table_BP.shape
  _, num_heads, _, _, page_size, width = cache.pages.shape

  def of_rows(leaf: Array) -> Array:
    gathered = leaf[layer, jnp.arange(num_heads)[:, None], table_BP[:, None]]  # [B, K, P, 2, …]
    gathered = jnp.moveaxis(gathered, 3, 0)
    return gathered.reshape(2, num_rows, num_heads, num_pages * page_size, *leaf.shape[5:])

  kv = of_rows(cache.pages).astype(q.dtype)
  if cache.scales is not None:
    kv = kv * of_rows(cache.scales)[..., None].astype(q.dtype)
  mask = attn.cache_mask(positions_BS, num_pages * page_size)
  return attn.head_major_attention(q, kv[0], kv[1], mask)


def copy_page(cache: PagedCache, source: Array, target: Array) -> PagedCache:
  """The pool with page `source` copied to page `target`."""
  def copy(leaf: Any) -> Any:
    page = jax.lax.dynamic_index_in_dim(leaf, source, axis=2)
    return jax.lax.dynamic_update_slice_in_dim(leaf, page, target, axis=2)
  return jax.tree.map(copy, cache)
