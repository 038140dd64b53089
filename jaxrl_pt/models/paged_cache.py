"""The paged key/value cache: sequences are lists of fixed-size pages of one pool.

A page holds the keys and values of `page` consecutive tokens of one sequence, and a page table says
which page holds which tokens. Sequences with a common beginning share the pages of that beginning.
Page 0 belongs to nobody: rows without a sequence write there, and no sequence reads it. Pages are
stored in the model's own type, or in 8, 4 or 3 bits with one scale per token and head (`kv_quant`).
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.config import KV, Model
from jaxrl_pt.models.kv_cache import Attend, KVCache
from jaxrl_pt.nn import absmax, kv_quant
from jaxrl_pt.nn.kv_quant import PackedPages
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.types import Array

NOBODY = 0


@struct.dataclass
class PagedCache:
  """N pages in each of L layers; page p of layer l is entry l · N + p of the pool."""

  pages: Array | PackedPages  # f or i8[K, L · N, 2, page, E], or packed; keys, then values
  scales: Array | None  # f32[K, L · N, 2, page] where pages are quantised
  num_pages: int = struct.field(pytree_node=False)  # N
  kv: KV = struct.field(pytree_node=False)

  @property
  def page_size(self) -> int:
    """Tokens of a page."""
    return self.pages.shape[3]

  @property
  def num_layers(self) -> int:
    """L."""
    return self.pages.shape[1] // self.num_pages


def init(config: Model, num_pages: int, page_size: int, dtype: DTypeLike, kv: KV = 'model'
         ) -> PagedCache:
  """An empty pool; unless kv is 'model', keys and values are quantised as they are written.

  Args:
    config: the model's sizes.
    num_pages: N.
    page_size: tokens of a page.
    dtype: the model's own type.
    kv: how keys and values are stored.

  Raises:
    UserError: the heads' channels do not fill whole bytes.
  """
  shape = (config.num_kv_heads, config.num_layers * num_pages, 2, page_size, config.head_dim)
  if kv == 'model':
    return PagedCache(jnp.zeros(shape, dtype), None, num_pages, kv)
  pages = jnp.zeros(shape, jnp.int8) if kv == 'int8' else kv_quant.empty(shape, kv_quant.BITS[kv])
  return PagedCache(pages, jnp.zeros(shape[:-1], jnp.float32), num_pages, kv)


def paged(ops: Ops, table_BP: Array, starts_B: Array, counts_B: Array) -> Attend:
  """New tokens are written to the pages of their positions, and each sees the positions up to it.

  Args:
    ops: the model's operations.
    table_BP: i32[B, P] the page of each `page` tokens of each row; NOBODY where a row has none.
    starts_B: i32[B] position of each row's first new token.
    counts_B: i32[B] new tokens of each row, which come first; the rest is padding, which is written
      to page NOBODY.
  """
  def attend(q: Array, k: Array, v: Array, cache: PagedCache,
             layer: Array) -> tuple[Array, PagedCache]:
    cache = write(ops, cache, layer, table_BP, starts_B, counts_B, k, v)
    out = ops.paged(q, cache.pages, cache.scales, table_BP + layer * cache.num_pages, starts_B,
                    counts_B)
    return out, cache

  return attend


def paged_beside(ops: Ops, table_BP: Array, starts_B: Array, counts_B: Array, table_DP: Array,
                 shared_B: Array) -> Attend:
  """`paged` of rows that lie beside the other rows of their document, whose pages are read once.

  Args:
    ops, table_BP, starts_B, counts_B: as for `paged`.
    table_DP, shared_B: as for `ops.paged_beside`.
  """
  def attend(q: Array, k: Array, v: Array, cache: PagedCache,
             layer: Array) -> tuple[Array, PagedCache]:
    cache = write(ops, cache, layer, table_BP, starts_B, counts_B, k, v)
    first = layer * cache.num_pages
    out = ops.paged_beside(q, cache.pages, cache.scales, table_BP + first, starts_B, counts_B,
                           table_DP + first, shared_B)
    return out, cache

  return attend


def write(ops: Ops, cache: PagedCache, layer: Array | int, table_BP: Array, starts_B: Array,
          counts_B: Array, k_BSKE: Array, v_BSKE: Array) -> PagedCache:
  """Writes keys and values of S tokens of each row to their pages; arguments as for `paged`."""
  new_BSK2E, first = jnp.stack([k_BSKE, v_BSKE], 3), layer * cache.num_pages

  def put(leaf: Array, new: Array) -> Array:
    return ops.write_pages(leaf, table_BP + first, starts_B, counts_B, new, NOBODY + first)

  if cache.kv == 'model':
    assert not isinstance(cache.pages, PackedPages)
    return dataclasses.replace(cache, pages=put(cache.pages, new_BSK2E.astype(cache.pages.dtype)))
  assert cache.scales is not None
  codes, scales = absmax.quantise(new_BSK2E, kv_quant.BITS[cache.kv])
  if not isinstance(cache.pages, PackedPages):
    return dataclasses.replace(cache, pages=put(cache.pages, codes),
                               scales=put(cache.scales, scales))
  # The token at position 0 has 8 bits; it stands in a pool of pages of one token each.
  codes_8, scales_8 = absmax.quantise(new_BSK2E[:, :1], 8)
  is_first = starts_B == 0
  scales = scales.at[:, :1].set(jnp.where(is_first[:, None, None, None], scales_8, scales[:, :1]))
  of_first = ops.write_pages(cache.pages.first, table_BP[:, :1] + first, jnp.zeros_like(starts_B),
                             jnp.where(is_first, jnp.minimum(counts_B, 1), 0), codes_8,
                             NOBODY + first)
  pages = dataclasses.replace(
      cache.pages, codes=put(cache.pages.codes, absmax.pack(codes, cache.pages.bits)),
      first=of_first)
  return dataclasses.replace(cache, pages=pages, scales=put(cache.scales, scales))


def keys(cache: PagedCache, pages: Array, is_first: Array, dtype: DTypeLike) -> Array:
  """The keys of some pages, dtype[K, ..., page, E].

  Args:
    cache: the pool.
    pages: i32[...] as indices into the pool.
    is_first: bool[...] whether position 0 is the page's first.
    dtype: of the keys.
  """
  take = lambda leaf: leaf[:, pages, 0]
  return kv_quant.read(cache.pages, cache.scales, take, is_first, dtype)


def write_rows(ops: Ops, cache: PagedCache, table_BP: Array, rows: KVCache, lengths_B: Array
               ) -> PagedCache:
  """Writes the first tokens of whole rows of another cache to pages, in all layers at once.

  Args:
    ops: the model's operations.
    cache: the pool.
    table_BP: i32[B, P] the pages of each row.
    rows: f[L, B, K, T, E] keys and values.
    lengths_B: i32[B] how many tokens of each row are written; at most T.
  """
  num_layers, _, num_heads, length, width = rows.k.shape
  # `write` takes the rows of all layers as rows of the first one.
  of_layer = jnp.arange(num_layers)[:, None, None] * cache.num_pages
  table = (table_BP + of_layer).reshape(-1, table_BP.shape[1])
  flat = lambda x_LBKTE: jnp.swapaxes(x_LBKTE, 2, 3).reshape(-1, length, num_heads, width)
  return write(ops, cache, 0, table, jnp.zeros(len(table), jnp.int32),
               jnp.tile(lengths_B, num_layers), flat(rows.k), flat(rows.v))


def copy_pages(cache: PagedCache, sources_C: Array, targets_C: Array) -> PagedCache:
  """The pool with pages copied in all layers; NOBODY as source and target copies nothing."""
  of_layer = jnp.arange(cache.num_layers)[:, None] * cache.num_pages
  source, target = of_layer + sources_C, of_layer + targets_C

  def copied(leaf: Array) -> Array:
    return leaf.at[:, target].set(leaf[:, source])

  return jax.tree.map(copied, cache)
