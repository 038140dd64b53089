"""Rectified sparse attention in the sampler's program: long responses read a part of the cache.

    prefill    documents go through the model densely; when a request gets a slot, the descriptors
               of its blocks are computed
    decode     a token of each slot attends to the selected blocks, and appends keys and values;
               tokens of the tail, which belong to the prompt, attend to all
    rectify    after every f response tokens of a row, overwrites their keys and values in all
               layers by one dense forward pass; the drawn tokens stay

By induction the cache equals that of dense decoding after each rectification. Each row counts its
own tokens, so that rows are rectified at different times.

Source: 2506.04108.
Departs from the paper's code in recomputing the descriptors of ⌈f / b⌉ + 1 blocks, not of the
whole buffer, and in leaving finished rows alone.
"""

from typing import Any

from flax import struct
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.paged_cache import PagedCache
from jaxrl_pt.nn import block_selection
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
    layers, _, heads, num_blocks, _ = bounds.shape
    words = block_selection.num_words(num_blocks)
    selected = jnp.zeros((num_rows, num_tokens, layers, heads, words), jnp.uint32)
  return Sparse(bounds, jnp.zeros(num_slots, jnp.int32), selected)


def cache_of(sparse: Sparse, pool: PagedCache, table_BP: Array) -> SparseCache:
  """The slots' cache; its steps say which blocks they read where somebody asks for them."""
  cache = SparseCache(pool, table_BP, sparse.bounds)
  return cache if isinstance(sparse.selected, tuple) else resa_attention.noting(cache)


# --- The parts --------------------------------------------------------------------


def decode(model: Model, params: Params, resa: cfg.ReSA, cache: SparseCache, tokens_B: Array,
           positions_B: Array, active_B: Array, in_prompt_B: Array | bool = False
           ) -> tuple[Array, SparseCache]:
  """One step: the hidden states f[B, D] of one more token of each active row.

  Args:
    model, params: the policy.
    resa: how many blocks are read.
    cache: the rows' cache.
    tokens_B, positions_B: i32[B].
    active_B: bool[B].
    in_prompt_B: bool[B] the rows whose token belongs to the prompt, and is read densely.
  """
  attend = resa_attention.sparse(model.ops, resa, positions_B, active_B, in_prompt_B)
  hidden, cache = model.extend(params, tokens_B[:, None], positions_B[:, None], cache, attend)
  return hidden[:, 0], cache


def rectify(model: Model, params: Params, cache: SparseCache, tokens_BF: Array, starts_B: Array,
            counts_B: Array) -> SparseCache:
  """Overwrites keys, values and descriptors of a window of each row by a dense forward pass.

  The rows that are due are gathered into forward passes of about RECTIFIED_TOKENS tokens; the
  other rows cost nothing.

  Args:
    model, params: the policy.
    cache: the rows' cache.
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

  return resa_attention.of_rows(counts_B > 0, max(1, RECTIFIED_TOKENS // window), some, cache)
