"""Rectified sparse attention over pages: its cache and the two attentions that fill and read it.

    dense   S new tokens see everything before them; the descriptors of the blocks that they
            touch are computed again. It serves prefill, rectification and verification of drafts.
    sparse  one new token sees the blocks whose descriptors promise the largest logits.

A block is a page. Both attentions read lists of whole pages in one loop with a running softmax, so
that memory does not grow with the context.

Source: 2506.04108 section 2.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt import config as cfg
from jaxrl_pt.models.kv_cache import Attend
from jaxrl_pt.nn.attention import MASKED
from jaxrl_pt.sampling import resa_selection
from jaxrl_pt.types import Array
from pallas_kernels import sparse_decode as kernels
from pallas_kernels.dispatch import Generation
from pallas_kernels.sparse_decode import Selection, tuning
from pallas_kernels.sparse_decode.reference import block_scores, num_blocks

NOBODY = 0  # The page of each layer that belongs to no row.
# How many copied keys and values, and how many scores, one turn of the loop over pages may hold.
COPIED_NUMBERS, SCORES = 2**21, 2**20


@struct.dataclass
class SparseCache:
  """N pages of b tokens in each layer, B rows' tables of P pages, and their descriptors."""

  pages: Array  # f[K, L · N, 2, b, E] keys, then values; a layer's pages side by side
  bounds: Array  # f[L, B, K, P, 2E] descriptors: maxima, then minima, of each block's keys
  table: Array  # i32[B, P] page of each block, counted inside a layer
  # u32[L, B, K, W] the blocks that the newest sparse step read (`resa_selection.packed`), or () if
  # nobody asks for them.
  selected: Any = ()

  @property
  def block(self) -> int:
    """Tokens of a block."""
    return self.pages.shape[3]

  @property
  def pages_per_layer(self) -> int:
    """N, the pages of each layer."""
    return self.pages.shape[1] // self.bounds.shape[0]


def init(config: cfg.Model, table_BP: Array, num_pages: int, block: int,
         dtype: DTypeLike) -> SparseCache:
  """An empty cache for the rows of `table_BP`; page `NOBODY` is one of the `num_pages`."""
  layers, heads, width = config.num_layers, config.num_kv_heads, config.head_dim
  pages = jnp.zeros((heads, layers * num_pages, 2, block, width), dtype)
  bounds = jnp.zeros((layers, table_BP.shape[0], heads, table_BP.shape[1], 2 * width), dtype)
  return SparseCache(pages, bounds, table_BP)


def noting(cache: SparseCache) -> SparseCache:
  """The same cache, which from now on says which blocks the newest sparse step read."""
  layers, rows, heads, num_blocks, _ = cache.bounds.shape
  words = resa_selection.num_words(num_blocks)
  return dataclasses.replace(cache, selected=jnp.zeros((layers, rows, heads, words), jnp.uint32))


def rows_of_pages(num_rows: int, num_blocks: int) -> tuple[Array, int]:
  """A table in which each row has pages of its own, side by side, and the number of all pages."""
  table = 1 + jnp.arange(num_rows * num_blocks, dtype=jnp.int32).reshape(num_rows, num_blocks)
  return table, 1 + num_rows * num_blocks


# --- The two attentions -----------------------------------------------------------


def dense(rows_R: Array, positions_RS: Array, is_token_RS: Array) -> Attend:
  """Attention of S consecutive new tokens of some rows to all tokens before them.

  It writes their keys and values and the descriptors of the blocks that they touch.

  Args:
    rows_R: i32[R] distinct rows of the cache; B stands for no row, and its results mean nothing.
    positions_RS: i32[R, S], rising by one.
    is_token_RS: bool[R, S], False for the padding on the right.
  """
  def attend(q: Array, k: Array, v: Array, cache: SparseCache,
             layer: Array) -> tuple[Array, SparseCache]:
    table = jnp.take(cache.table, rows_R, axis=0, mode='fill', fill_value=NOBODY)
    cache = _write(cache, layer, table, positions_RS, is_token_RS, k, v)
    lengths = positions_RS[:, 0] + is_token_RS.sum(1)
    cache = describe(cache, layer[None], rows_R, positions_RS[:, 0], lengths, k.shape[1])
    last = jnp.where(is_token_RS, positions_RS, 0).max()
    lists = PageLists(
        jnp.broadcast_to(jnp.arange(table.shape[1]), (table.shape[0], 1, table.shape[1])), table,
        first_masked=jnp.where(is_token_RS[:, 0], positions_RS[:, 0], last).min() // cache.block,
        end=last // cache.block + 1)
    return attend_pages(q, positions_RS, cache, layer, lists), cache

  return attend


def sparse(resa: cfg.ReSA, positions_B: Array, active_B: Array,
           generation: Generation | None = None,
           scores: resa_selection.Scores = block_scores) -> Attend:
  """Attention of one new token of each row to the blocks selected for each key/value head.

    out = softmax(q k_Sᵀ / √E) v_S,  S = the n = min(M, max(n_min, ⌈M p⌉)) highest of
    score_i = Σ_j max(q̄_j kmax_ij, q̄_j kmin_ij), the last n_local of the M blocks forced

  Args:
    resa: how many blocks are selected.
    positions_B: i32[B].
    active_B: bool[B]; the other rows write nothing, and their results mean nothing.
    generation: the generation of the TPU whose kernels are called; None computes with XLA.
    scores: the function that scores blocks; control experiments take another one.
  """
  selection = Selection(resa.active, resa.min_blocks, resa.local_blocks)

  def attend(q: Array, k: Array, v: Array, cache: SparseCache,
             layer: Array) -> tuple[Array, SparseCache]:
    cache = _write(cache, layer, cache.table, positions_B[:, None], active_B[:, None], k, v)
    bounds = _updated(cache, layer, k[:, 0], positions_B, active_B)
    cache = dataclasses.replace(cache, bounds=bounds)
    lengths = jnp.where(active_B, positions_B + 1, 0)
    if generation is not None:
      tuned = tuning.blocks(generation, cache.block)
      values = kernels.block_scores(q[:, 0], bounds, layer, generation=generation, blocks=tuned)
      blocks, counts = kernels.select_blocks(values, lengths, page_size=cache.block,
                                             selection=selection, generation=generation)
      out, _ = kernels.sparse_attention(
          q[:, 0], cache.pages, blocks, counts, cache.table + layer * cache.pages_per_layer,
          lengths, generation=generation, blocks=tuned)
      return out[:, None], _noted(cache, layer, blocks, counts)
    num_scored = num_blocks(lengths, cache.block)
    values = resa_selection.score_layer(scores, q[:, 0], bounds, layer, num_scored.max())
    blocks, counts = resa_selection.select(values, num_scored, selection)
    cache = _noted(cache, layer, blocks, counts)
    lists = PageLists(
        blocks, cache.table, end=counts.max(),
        first_masked=jnp.where(active_B, counts, blocks.shape[-1]).min() - 1)
    return attend_pages(q, positions_B[:, None], cache, layer, lists), cache

  return attend


def _noted(cache: SparseCache, layer: Array, blocks_BKN: Array, counts_B: Array) -> SparseCache:
  """The cache with the blocks that this layer reads, where somebody asks for them."""
  if isinstance(cache.selected, tuple):
    return cache
  num_blocks = cache.table.shape[1]
  is_read = jnp.arange(blocks_BKN.shape[-1]) < counts_B[:, None, None]
  bits = resa_selection.packed(jnp.where(is_read, blocks_BKN, num_blocks), num_blocks)
  return dataclasses.replace(cache, selected=cache.selected.at[layer].set(bits))


def _write(cache: SparseCache, layer: Array, table_RP: Array, positions_RS: Array,
           is_token_RS: Array, k_RSKE: Array, v_RSKE: Array) -> SparseCache:
  pages = jnp.take_along_axis(table_RP, positions_RS // cache.block, 1, mode='clip')
  pages = jnp.where(is_token_RS, pages, NOBODY) + layer * cache.pages_per_layer
  new_RSK2E = jnp.stack([k_RSKE, v_RSKE], 3).astype(cache.pages.dtype)
  if pages.size == 1:
    # XLA would fuse a single update into each operation that reads it, and copy the cache for that.
    pages = jnp.concatenate([pages, jnp.full_like(pages, NOBODY)])
    positions_RS, new_RSK2E = (jnp.concatenate([x, x]) for x in (positions_RS, new_RSK2E))
  # All axes but the last are indexed, as in `models.paged_cache`, or a TPU would copy the pages.
  heads_K1, both = jnp.arange(new_RSK2E.shape[2])[:, None], jnp.arange(2)
  offsets = positions_RS % cache.block
  at = cache.pages.at[heads_K1, pages[..., None, None], both, offsets[..., None, None]]
  return dataclasses.replace(cache, pages=at.set(new_RSK2E))


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
  at = layers_L[:, None, None] * cache.pages_per_layer + pages
  k = cache.pages[:, at, 0].swapaxes(0, 1)  # [L', K, R, T, b, E]
  bounds = jnp.concatenate([jnp.where(seen, k, -jnp.inf).max(-2),
                            jnp.where(seen, k, jnp.inf).min(-2)], -1)
  has_keys = (touched * cache.block < lengths_R[:, None]) & (rows_R < num_rows)[:, None]
  place = (layers_L[:, None, None], rows_R[:, None], slice(None),
           jnp.where(has_keys, touched, table_len))
  return dataclasses.replace(cache, bounds=cache.bounds.at[place].set(
      bounds.transpose(0, 2, 3, 1, 4), mode='drop'))


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


# --- Attention to lists of pages --------------------------------------------------


class PageLists(NamedTuple):
  """Which blocks a row's queries read, in ascending order."""

  blocks: Array  # i32[B, K or 1, N]; P and greater numbers stand for no block
  table: Array  # i32[B, P] page of each block
  first_masked: Array  # i32[] entries before it hold only keys that all queries see
  end: Array  # i32[] no row reads the entries from here on


def pages_per_turn(num_lists: int, num_queries: int, num_listed: int, page_numbers: int,
                   block: int) -> int:
  """Pages of each list that one turn of the loop reads; all turns read about equally many."""
  most = min(COPIED_NUMBERS // (num_lists * page_numbers),
             SCORES // (num_lists * num_queries * block))
  turns = -(-num_listed // max(1, most))
  return -(-num_listed // turns)


def attend_pages(q_BSHE: Array, positions_BS: Array, cache: SparseCache, layer: Array,
                 lists: PageLists) -> Array:
  """softmax(q kᵀ / √E) v over the keys of the listed blocks up to each query's position.

  Each query must see a key of its list's first block.

  Args:
    q_BSHE: f[B, S, H, E].
    positions_BS: i32[B, S].
    cache: the pages.
    layer: i32[].
    lists: the blocks that each row's queries read.

  Returns:
    f[B, S, H, E] in q's dtype; the softmax is float32.
  """
  num_rows, num_new, num_heads, width = q_BSHE.shape
  num_groups, block = cache.pages.shape[0], cache.block
  group = num_heads // num_groups
  q = q_BSHE.reshape(num_rows, num_new, num_groups, group, width)
  q = q.transpose(0, 2, 3, 1, 4).reshape(num_rows * num_groups, group * num_new, width)
  q = (q * width**-0.5).astype(q.dtype)
  positions = jnp.broadcast_to(positions_BS[:, None, None],
                               (num_rows, num_groups, group, num_new)).reshape(q.shape[:2])
  blocks = jnp.broadcast_to(lists.blocks, (num_rows, num_groups, lists.blocks.shape[-1]))
  page_numbers = math.prod(cache.pages.shape[2:])
  per_turn = pages_per_turn(q.shape[0], q.shape[1], blocks.shape[-1], page_numbers, block)
  none = lists.table.shape[1]
  blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, -blocks.shape[-1] % per_turn)),
                   constant_values=none)
  ids = _page_ids(cache, layer, lists.table, blocks).reshape(q.shape[0], -1)
  blocks = blocks.reshape(ids.shape)
  pages = cache.pages.reshape(-1, *cache.pages.shape[2:])

  def turn(masked: bool, i: Array, state: _Softmax) -> _Softmax:
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * per_turn, per_turn, 1)
    copied = _copy_pages(pages, part(ids))
    k, v = (copied[:, :, i].reshape(q.shape[0], -1, width) for i in (0, 1))
    scores = jnp.einsum('xqe,xce->xqc', q, k.astype(q.dtype),
                        preferred_element_type=jnp.float32)
    if masked:
      at = part(blocks)[..., None] * block + jnp.arange(block)
      seen = at.reshape(q.shape[0], 1, -1) <= positions[..., None]
      scores = jnp.where(seen, scores, MASKED)
    return state.add(scores, v)

  turns = -(-lists.end // per_turn)
  unmasked = jnp.clip(lists.first_masked // per_turn, 0, turns)
  state = _Softmax.empty(*q.shape)
  state = jax.lax.fori_loop(0, unmasked, functools.partial(turn, False), state)
  state = jax.lax.fori_loop(unmasked, turns, functools.partial(turn, True), state)
  out = state.out / jnp.maximum(state.total, 1e-30)[..., None]
  out = out.reshape(num_rows, num_groups, group, num_new, width).transpose(0, 3, 1, 2, 4)
  return out.reshape(q_BSHE.shape).astype(q_BSHE.dtype)


class _Softmax(NamedTuple):
  """A softmax-weighted sum over the keys so far, of X lists with Q queries each."""

  highest: Array  # f32[X, Q]
  total: Array  # f32[X, Q] Σ exp(score − highest)
  out: Array  # f32[X, Q, E]

  @classmethod
  def empty(cls, *shape: int) -> '_Softmax':
    return cls(jnp.full(shape[:2], MASKED), jnp.zeros(shape[:2]), jnp.zeros(shape))

  def add(self, scores_XQC: Array, v_XCE: Array) -> '_Softmax':
    highest = jnp.maximum(self.highest, scores_XQC.max(-1))
    weights = jnp.exp(scores_XQC - highest[..., None])
    kept = jnp.exp(self.highest - highest)
    new = jnp.einsum('xqc,xce->xqe', weights.astype(v_XCE.dtype), v_XCE,
                     preferred_element_type=jnp.float32)
    return _Softmax(highest, self.total * kept + weights.sum(-1),
                    self.out * kept[..., None] + new)


def _page_ids(cache: SparseCache, layer: Array, table_BP: Array, blocks_BKN: Array) -> Array:
  """i32[B, K, N]: where the blocks' pages lie among those of all heads and layers."""
  pages = jnp.take_along_axis(table_BP[:, None], blocks_BKN, 2, mode='clip')
  pages = jnp.where(blocks_BKN < table_BP.shape[1], pages, NOBODY)
  heads = jnp.arange(blocks_BKN.shape[1])[:, None] * cache.pages.shape[1]
  return heads + layer * cache.pages_per_layer + pages


def _copy_pages(pages_N2PE: Array, ids_XN: Array) -> Array:
  """f[X, N, 2, b, E]: the pages with these ids, copied whole."""
  numbers = jax.lax.GatherDimensionNumbers(offset_dims=(2, 3, 4), collapsed_slice_dims=(0,),
                                           start_index_map=(0,))
  return jax.lax.gather(pages_N2PE, ids_XN[..., None], numbers, (1, *pages_N2PE.shape[1:]),
                        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)
