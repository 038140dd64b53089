"""Rectified sparse attention in the sampler's program: long responses read a part of the cache.

    prefill    documents go through the model densely; `join` computes the descriptors of a row's
               blocks when its request gets a slot
    feed       a token of each slot attends to the selected blocks, and appends keys and values;
               tokens of the tail, which belong to the prompt, attend to all
    rectify    after every f response tokens of a row, overwrites their keys and values in all
               layers by one dense forward pass; the drawn tokens stay

By induction the cache equals that of dense decoding after each rectification. Each row counts its
own tokens, so that rows are rectified at different times.

Source: 2506.04108.
Departs from the paper's code in recomputing the descriptors of ⌈f / b⌉ + 1 blocks, not of the
whole buffer, and in leaving finished rows alone.
"""

import dataclasses
from typing import Any

from flax import struct
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.paged_cache import PagedCache
from jaxrl_pt.sampling import resa_attention
from jaxrl_pt.sampling.resa_attention import SparseCache
from jaxrl_pt.types import Array, Params

RECTIFIED_TOKENS = 256  # tokens of all rows in one forward pass of the rectification


@struct.dataclass
class Sparse:
  """What sparse attention keeps of B slots and Q responses, besides the pool of pages."""

  bounds: Array  # f[L, B, K, P, 2E] descriptors of each slot's blocks
  fresh: Array  # i32[B] response tokens whose keys and values are those of dense decoding
  # u32[Q, S, L, K, W] the blocks that each response token was drawn from; () if nobody asks.
  selected: Any


def init(config: cfg.Model, resa: cfg.ReSA, num_slots: int, num_rows: int, num_tokens: int,
         table_len: int, dtype: DTypeLike) -> Sparse:
  """The state of idle slots.

  Args:
    config: the model's sizes.
    resa: whether the blocks that are read are to be known.
    num_slots: B.
    num_rows, num_tokens: Q and S.
    table_len: P.
    dtype: that of the pages.
  """
  bounds = resa_attention.descriptors(config, num_slots, table_len, dtype)
  selected: Any = ()
  if resa.replay:
    layers, _, heads, words = resa_attention.no_selection(bounds).shape
    selected = jnp.zeros((num_rows, num_tokens, layers, heads, words), jnp.uint32)
  return Sparse(bounds, jnp.zeros(num_slots, jnp.int32), selected)


def _cache(sparse: Sparse, pool: PagedCache, table_BP: Array) -> SparseCache:
  return SparseCache(pool, table_BP, sparse.bounds)


def join(sparse: Sparse, pool: PagedCache, table_BP: Array, is_new_B: Array, lengths_B: Array
         ) -> Sparse:
  """Begins the rows that have just got a slot.

  Args:
    sparse, pool: the state and the pages.
    table_BP: i32[B, P].
    is_new_B: bool[B] the rows in question.
    lengths_B: i32[B] their cached tokens.
  """
  cache = resa_attention.describe_rows(_cache(sparse, pool, table_BP), is_new_B, lengths_B)
  return dataclasses.replace(sparse, bounds=cache.bounds,
                             fresh=jnp.where(is_new_B, 0, sparse.fresh))


def feed(model: Model, params: Params, resa: cfg.ReSA, sparse: Sparse, pool: PagedCache,
         table_BP: Array, tokens_B: Array, positions_B: Array, active_B: Array,
         in_prompt_B: Array) -> tuple[Array, Array | tuple[()], Sparse, PagedCache]:
  """One step: a token of each active row goes through the model.

  Args:
    model, params: the policy.
    resa: how many blocks are selected.
    sparse, pool, table_BP: the state, the pages and the rows' tables.
    tokens_B, positions_B: i32[B].
    active_B: bool[B].
    in_prompt_B: bool[B] whether the token belongs to the prompt, whose attention is dense.

  Returns:
    Hidden states f[B, D]; the blocks that were read, u32[B, L, K, W], or (); the state; the pages.
  """
  cache = _cache(sparse, pool, table_BP)
  if resa.replay:
    cache = dataclasses.replace(cache, selected=resa_attention.no_selection(sparse.bounds))
  attend = resa_attention.sparse(model.ops, resa, positions_B, active_B, in_prompt_B)
  hidden, cache = model.extend(params, tokens_B[:, None], positions_B[:, None], cache, attend)
  selected = jnp.moveaxis(cache.selected, 1, 0) if resa.replay else ()
  return hidden[:, 0], selected, dataclasses.replace(sparse, bounds=cache.bounds), cache.pool


def rectify(model: Model, params: Params, sparse: Sparse, pool: PagedCache, table_BP: Array,
            tokens_BF: Array, starts_B: Array, counts_B: Array) -> tuple[Sparse, PagedCache]:
  """Overwrites keys, values and descriptors of a window of each row by a dense forward pass.

  The rows that are due are gathered into forward passes of about RECTIFIED_TOKENS tokens; the
  other rows cost nothing.

  Args:
    model, params: the policy.
    sparse, pool, table_BP: the state, the pages and the rows' tables.
    tokens_BF: i32[B, F] the windows' tokens.
    starts_B: i32[B] the windows' first positions.
    counts_B: i32[B] how many tokens of each window are rectified; 0 where a row is not due.
  """
  num_rows, window = tokens_BF.shape

  def some(rows_R: Array, cache: SparseCache) -> SparseCache:
    at = jnp.minimum(rows_R, num_rows - 1)
    attend = resa_attention.dense(model.ops, rows_R, starts_B[at], counts_B[at],
                                  last_is_read=False)
    positions = starts_B[at][:, None] + jnp.arange(window)
    return model.extend(params, tokens_BF[at], positions, cache, attend)[1]

  cache = resa_attention.of_rows(counts_B > 0, max(1, RECTIFIED_TOKENS // window), some,
                                 _cache(sparse, pool, table_BP))
  fresh = sparse.fresh + counts_B
  return dataclasses.replace(sparse, bounds=cache.bounds, fresh=fresh), cache.pool
