"""The paged key/value cache: sequences are lists of fixed-size pages of one pool.

A page holds the keys and values of `page` consecutive tokens of one sequence, and a page table says
which page holds which tokens. Sequences with a common beginning share the pages of that beginning.
Page 0 belongs to nobody: rows without a sequence write there, and no sequence reads it. Pages are
stored in the model's own type, or as int8 with one scale per token and head.
"""

import dataclasses

from flax import struct
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.config import Model
from jaxrl_pt.models.kv_cache import Attend, KVCache
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.types import Array

NOBODY = 0


@struct.dataclass
class PagedCache:
  """N pages in each of L layers; page p of layer l is entry l · N + p of the pool."""

  pages: Array  # f or i8[K, L · N, 2, page, E]; keys, then values
  scales: Array | None  # f32[K, L · N, 2, page] where pages are int8
  num_pages: int = struct.field(pytree_node=False)  # N

  @property
  def page_size(self) -> int:
    """Tokens of a page."""
    return self.pages.shape[3]

  @property
  def num_layers(self) -> int:
    """L."""
    return self.pages.shape[1] // self.num_pages


def init(config: Model, num_pages: int, page_size: int, dtype: DTypeLike) -> PagedCache:
  """An empty pool; with the dtype int8, keys and values are quantised as they are written."""
  shape = (config.num_kv_heads, config.num_layers * num_pages, 2, page_size, config.head_dim)
  scales = jnp.zeros(shape[:-1], jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
  return PagedCache(jnp.zeros(shape, dtype), scales, num_pages)


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

  if cache.scales is None:
    return dataclasses.replace(cache, pages=put(cache.pages, new_BSK2E.astype(cache.pages.dtype)))
  codes, scales = quantise(new_BSK2E)
  return dataclasses.replace(cache, pages=put(cache.pages, codes),
                             scales=put(cache.scales, scales))


def quantise(x: Array) -> tuple[Array, Array]:
  """Quantises vectors f[..., E] by their absmax to int8 codes and a scale f32[...] for each."""
  x = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.abs(x).max(-1), 1e-12) / 127
  return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


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

  scales = None if cache.scales is None else copied(cache.scales)
  return dataclasses.replace(cache, pages=copied(cache.pages), scales=scales)
