"""The cache of rectified sparse attention over pages, and the attentions that fill and read it.

    dense   S new tokens see everything before them; the descriptors of the blocks that they
            touch are computed again. It serves rectification and verification of drafts.
    sparse  one new token sees the blocks whose descriptors promise the largest logits.

A block is a page.

Source: 2506.04108 section 2.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, TypeVar

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.models import paged_cache
from jaxrl_pt.models.kv_cache import Attend
from jaxrl_pt.models.paged_cache import NOBODY, PagedCache
from jaxrl_pt.nn import block_selection, kv_quant
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.nn.sparse_attention import Reading
from jaxrl_pt.types import Array
from pallas_kernels import sparse_decode as kernels
from pallas_kernels.sparse_decode import Selection

Tree = TypeVar('Tree')


@struct.dataclass
class SparseCache:
  """A pool of pages, B rows' tables of P pages, and the descriptors of the rows' blocks."""

  pool: PagedCache
  table: Array  # i32[B, P] page of each block; NOBODY where a row has none
  bounds: Array  # f[L, B, K, P, 2E] descriptors: maxima, then minima, of each block's keys
  # u32[L, B, K, W] the blocks that the newest sparse step read (`block_selection.packed`), or () if
  # nobody asks for them.
  selected: Any = ()

  @property
  def block(self) -> int:
    """Tokens of a block."""
    return self.pool.page_size


def descriptors(config: cfg.Model, num_rows: int, table_len: int, dtype: Any) -> Array:
  """Descriptors of no keys, f[L, B, K, P, 2E]."""
  return jnp.zeros((config.num_layers, num_rows, config.num_kv_heads, table_len,
                    2 * config.head_dim), dtype)


def noting(cache: SparseCache) -> SparseCache:
  """The same cache, which from now on says which blocks the newest sparse step read."""
  *lists, table_len, _ = cache.bounds.shape
  words = block_selection.num_words(table_len)
  return dataclasses.replace(cache, selected=jnp.zeros((*lists, words), jnp.uint32))


def selection_of(resa: cfg.ReSA) -> Selection:
  """How many blocks a step reads."""
  return Selection(resa.active, resa.min_blocks, resa.local_blocks)


# --- The two attentions -----------------------------------------------------------


def dense(ops: Ops, rows_R: Array, starts_R: Array, counts_R: Array, *,
          last_is_read: bool = True) -> Attend:
  """Attention of consecutive new tokens of some rows to all tokens before them.

  It writes their keys and values and the descriptors of the blocks that they touch.

  Args:
    ops: the model's operations.
    rows_R: i32[R] distinct rows of the cache; B stands for no row, and its results mean nothing.
    starts_R: i32[R] the position of each row's first new token.
    counts_R: i32[R] new tokens of each row; the rest is padding.
    last_is_read: whether the result of the last layer is used. Without it, what the last layer
      attends to is not read, since its keys and values do not depend on that.
  """
  def attend(q: Array, k: Array, v: Array, cache: SparseCache,
             layer: Array) -> tuple[Array, SparseCache]:
    num_rows, num_new = cache.table.shape[0], q.shape[1]
    counts = jnp.where(rows_R < num_rows, counts_R, 0)
    table = jnp.take(cache.table, rows_R, axis=0, mode='fill', fill_value=NOBODY)
    pool = paged_cache.write(ops, cache.pool, layer, table, starts_R, counts, k, v)
    # Of parameters that are not stacked, the layer is an int.
    cache = describe(dataclasses.replace(cache, pool=pool), jnp.asarray(layer)[None], rows_R,
                     starts_R, starts_R + counts, num_new)
    is_read = last_is_read | (layer < cache.bounds.shape[0] - 1)
    out = ops.paged(q, pool.pages, pool.scales, table + layer * pool.num_pages, starts_R,
                    jnp.where(is_read, counts, 0))
    return out, cache

  return attend


def sparse(ops: Ops, resa: cfg.ReSA, positions_B: Array, active_B: Array,
           is_dense_B: Array | bool = False) -> Attend:
  """Attention of one new token of each row to the blocks selected for each key/value head.

  Args:
    ops: the model's operations.
    resa: how many blocks are selected.
    positions_B: i32[B].
    active_B: bool[B]; the other rows write nothing, and their results mean nothing.
    is_dense_B: bool[B] the rows whose token sees everything before it, as in a prefill.
  """
  def attend(q: Array, k: Array, v: Array, cache: SparseCache,
             layer: Array) -> tuple[Array, SparseCache]:
    pool = paged_cache.write(ops, cache.pool, layer, cache.table, positions_B,
                             active_B.astype(jnp.int32), k, v)
    stored = kv_quant.as_stored(k, positions_B[:, None], pool.kv)
    bounds = _updated(cache, layer, stored[:, 0], positions_B, active_B)
    cache = dataclasses.replace(cache, pool=pool, bounds=bounds)
    table = cache.table + layer * pool.num_pages
    is_sparse = active_B & ~jnp.asarray(is_dense_B)
    read = ops.sparse(q[:, 0], pool.pages, bounds, layer, table,
                      jnp.where(is_sparse, positions_B + 1, 0), selection_of(resa), pool.scales)
    out, cache = read.out[:, None], _noted(cache, layer, read)
    if is_dense_B is False:
      return out, cache
    return _dense_where(ops, active_B & is_dense_B, q, cache, table, positions_B, out), cache

  return attend


def _dense_where(ops: Ops, wanted_B: Array, q_BSHE: Array, cache: SparseCache, table_BP: Array,
                 positions_B: Array, out_BSHE: Array) -> Array:
  """The results of dense attention in the wanted rows, and those given in the others."""
  def turn(rows_R: Array, out: Array) -> Array:
    at = jnp.minimum(rows_R, wanted_B.shape[0] - 1)
    new = ops.paged(q_BSHE[at], cache.pool.pages, cache.pool.scales, table_BP[at],
                    positions_B[at], (rows_R == at).astype(jnp.int32))
    return out.at[rows_R].set(new, mode='drop')

  return of_rows(wanted_B, FEW_ROWS, turn, out_BSHE)


FEW_ROWS = 4  # Rows that join or are read densely at once. They are few, and the others wait.


def of_rows(wanted_B: Array, at_once: int, change: Callable[[Array, Tree], Tree],
            state: Tree) -> Tree:
  """change(rows, state) for some wanted rows at a time; the other rows cost nothing.

  Args:
    wanted_B: bool[B].
    at_once: R, the number of rows of a turn.
    change: (i32[R] wanted rows, B for none; state) → state.
    state: any tree.
  """
  num_rows = wanted_B.shape[0]
  size = min(num_rows, at_once)
  rows = jnp.where(wanted_B, jnp.arange(num_rows), num_rows)
  rows = jnp.pad(jnp.sort(rows), (0, -num_rows % size), constant_values=num_rows)
  turn = lambda i, state: change(jax.lax.dynamic_slice_in_dim(rows, i * size, size), state)
  return jax.lax.fori_loop(0, -(-wanted_B.sum() // size), turn, state)


def _noted(cache: SparseCache, layer: Array, read: Reading) -> SparseCache:
  """The cache with the blocks that a layer has read, where somebody asks for them."""
  if isinstance(cache.selected, tuple):
    return cache
  num_blocks = cache.table.shape[1]
  is_read = jnp.arange(read.blocks.shape[-1]) < read.counts[:, None, None]
  bits = block_selection.packed(jnp.where(is_read, read.blocks, num_blocks), num_blocks)
  return dataclasses.replace(cache, selected=cache.selected.at[layer].set(bits))


# --- Descriptors ------------------------------------------------------------------


def describe(cache: SparseCache, layers_L: Array, rows_R: Array, starts_R: Array,
             lengths_R: Array, num_tokens: int) -> SparseCache:
  """Computes the descriptors of the ⌈S / b⌉ + 1 blocks from each row's start on again.

  Args:
    cache: the cache whose keys have changed.
    layers_L: i32[L'] the layers in question.
    rows_R: i32[R] distinct rows; B stands for no row.
    starts_R: i32[R] the first position of each row whose key has changed.
    lengths_R: i32[R] tokens of each row. Keys beyond this length are left out, and blocks without
      keys keep their descriptors.
    num_tokens: S, the largest number of keys of a row that have changed.
  """
  num_rows, table_len = cache.table.shape
  touched = starts_R[:, None] // cache.block + jnp.arange(-(-num_tokens // cache.block) + 1)
  table = jnp.take(cache.table, rows_R, axis=0, mode='fill', fill_value=NOBODY)
  pages = jnp.take_along_axis(table, touched, 1, mode='clip')
  positions = touched[..., None] * cache.block + jnp.arange(cache.block)
  seen = (positions < lengths_R[:, None, None])[None, None, :, :, :, None]
  at = layers_L[:, None, None] * cache.pool.num_pages + pages
  keys = paged_cache.keys(cache.pool, at, touched == 0, cache.bounds.dtype)
  k = keys.swapaxes(0, 1)  # [L', K, R, T, b, E]
  bounds = jnp.concatenate([jnp.where(seen, k, -jnp.inf).max(-2),
                            jnp.where(seen, k, jnp.inf).min(-2)], -1)
  has_keys = (touched * cache.block < lengths_R[:, None]) & (rows_R < num_rows)[:, None]
  place = (layers_L[:, None, None], rows_R[:, None], slice(None),
           jnp.where(has_keys, touched, table_len))
  return dataclasses.replace(cache, bounds=cache.bounds.at[place].set(
      bounds.transpose(0, 2, 3, 1, 4), mode='drop'))


DESCRIBED_TOKENS = 1024  # of each row and layer, in one turn of `describe_rows`


def describe_rows(cache: SparseCache, is_row_B: Array, lengths_B: Array) -> SparseCache:
  """Computes the descriptors of all blocks of some rows."""
  size = min(cache.table.shape[1], max(1, DESCRIBED_TOKENS // cache.block)) * cache.block
  num_layers = cache.bounds.shape[0]

  def some(rows_R: Array, cache: SparseCache) -> SparseCache:
    lengths = lengths_B.at[rows_R].get(mode='fill', fill_value=0)

    def turn(i: Array, cache: SparseCache) -> SparseCache:
      starts = jnp.full(rows_R.shape, i // num_layers * size)
      return describe(cache, (i % num_layers)[None], rows_R, starts, lengths, size - cache.block)

    return jax.lax.fori_loop(0, -(-lengths.max() // size) * num_layers, turn, cache)

  return of_rows(is_row_B, FEW_ROWS, some, cache)


def _updated(cache: SparseCache, layer: Array, k_BKE: Array, positions_B: Array,
             active_B: Array) -> Array:
  """Descriptors of all layers after one layer has one more key of each active row."""
  num_rows, table_len = cache.table.shape
  at = (layer, jnp.arange(num_rows), slice(None), positions_B // cache.block)
  old_BKD = cache.bounds.at[at].get(mode='clip')
  new_BKD = kernels.update_descriptors(old_BKD[:, :, None], k_BKE, positions_B % cache.block,
                                       page_size=cache.block)[:, :, 0]
  blocks = jnp.where(active_B, positions_B // cache.block, table_len)
  return cache.bounds.at[layer, jnp.arange(num_rows), :, blocks].set(new_BKD, mode='drop')
