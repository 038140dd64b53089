"""Attention of one new token of each row to the blocks of its context that promise the most.

    out = softmax(q k_Sᵀ / √E) v_S,  S = the n = min(M, max(n_min, ⌈M p⌉)) highest of
    score_i = Σ_j max(q̄_j kmax_ij, q̄_j kmin_ij), the last n_local of the M blocks forced

A block is a page. The selected pages are read in one loop with a running softmax, so that memory
does not grow with the context.

Source: 2506.04108 section 2.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt.nn import kv_quant
from jaxrl_pt.nn.attention import MASKED
from jaxrl_pt.nn.block_selection import select
from jaxrl_pt.nn.kv_quant import PackedPages
from jaxrl_pt.types import Array
from pallas_kernels.sparse_decode import Selection
from pallas_kernels.sparse_decode.reference import block_scores, num_blocks

# How many copied keys and values one turn of the loop over pages may hold, and how many numbers of
# descriptors one turn of the scoring loop. A CPU keeps the former in its second cache.
COPIED_NUMBERS, SCORED_NUMBERS = 2**19, 2**21

# scores(q_BHE, bounds_BKPD) → f32[B, K, P]
Scores = Callable[[Array, Array], Array]


class Reading(NamedTuple):
  """What was read, and the result."""

  out: Array  # f[B, H, E]
  blocks: Array  # i32[B, K, N] ascending; what stands beyond the count means nothing
  counts: Array  # i32[B] n


def sparse_attention(q_BHE: Array, pages: Array | PackedPages, bounds_LBKPD: Array, layer: Array,
                     table_BP: Array, lengths_B: Array, selection: Selection,
                     scales: Array | None = None, *, scores: Scores = block_scores) -> Reading:
  """Attention of one new token of each row to its selected blocks.

  Args:
    q_BHE: f[B, H, E] queries, after RoPE; H is a multiple of K.
    pages: f or i8[K, N, 2, page, E] keys, then values, or packed ones; those of the new token
      included.
    bounds_LBKPD: f[L, B, K, P, 2E] maxima, then minima, of the keys of each block, in all layers.
    layer: i32[] the layer in question.
    table_BP: i32[B, P] the pages of each row, as indices into the pool.
    lengths_B: i32[B] cached tokens of each row, the new one included; 0 for an idle row, whose
      result means nothing.
    selection: how many blocks are selected.
    scales: f32[K, N, 2, page] where pages are quantised, else None.
    scores: the function that scores blocks; control experiments take another one.
  """
  num_scored = num_blocks(lengths_B, pages.shape[3])
  values = score_layer(scores, q_BHE, bounds_LBKPD, layer, num_scored.max())
  blocks, counts = select(values, num_scored, selection)
  out = _attend_listed(q_BHE, pages, scales, table_BP, lengths_B, blocks, counts)
  return Reading(out, blocks, counts)


# --- Scores -----------------------------------------------------------------------


def scored_per_turn(num_lists: int, table_len: int, width: int) -> int:
  """Descriptors of each list that one turn of the scoring loop reads."""
  turns = -(-num_lists * table_len * width // SCORED_NUMBERS)
  return -(-table_len // turns)


def score_layer(scores: Scores, q_BHE: Array, bounds_LBKPD: Array, layer: Array,
                end: Array) -> Array:
  """f32[B, K, P]: scores of a layer's blocks before `end`.

  They are computed a part at a time, so that only a part of the descriptors is ever copied.
  """
  _, num_rows, num_groups, table_len, width = bounds_LBKPD.shape
  size = scored_per_turn(num_rows * num_groups, table_len, width)

  def turn(i: Array, values: Array) -> Array:
    # The last part may begin early; it then computes some scores again.
    part = jax.lax.dynamic_slice(bounds_LBKPD, (layer, 0, 0, i * size, 0),
                                 (1, num_rows, num_groups, size, width))[0]
    return jax.lax.dynamic_update_slice(values, scores(q_BHE, part), (0, 0, i * size))

  return jax.lax.fori_loop(0, -(-end // size), turn,
                           jnp.zeros((num_rows, num_groups, table_len)))


# --- Attention to lists of pages --------------------------------------------------


def pages_per_turn(num_lists: int, num_listed: int, page_numbers: int) -> int:
  """Pages of each list that one turn of the loop reads; all turns read about equally many."""
  turns = -(-num_listed // max(1, COPIED_NUMBERS // (num_lists * page_numbers)))
  return -(-num_listed // turns)


def _attend_listed(q_BHE: Array, pages: Array | PackedPages, scales: Array | None, table_BP: Array,
                   lengths_B: Array, blocks_BKN: Array, counts_B: Array) -> Array:
  """softmax(q kᵀ / √E) v over the first tokens of the listed blocks; the softmax is float32.

  Lists are ascending, and P and greater numbers stand for no block.
  """
  num_rows, num_heads, width = q_BHE.shape
  num_groups, _, _, block, _ = pages.shape
  q = q_BHE.reshape(num_rows, num_groups, num_heads // num_groups, width)
  q = (q * width**-0.5).astype(q.dtype)
  table_len = table_BP.shape[1]
  per_turn = pages_per_turn(num_rows * num_groups, blocks_BKN.shape[-1],
                            math.prod(pages.shape[2:]))
  blocks = jnp.pad(blocks_BKN, ((0, 0), (0, 0), (0, -blocks_BKN.shape[-1] % per_turn)),
                   constant_values=table_len)
  ids = jnp.take_along_axis(table_BP[:, None], blocks, 2, mode='clip')

  def turn(masked: bool, i: Array, state: _Softmax) -> _Softmax:
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * per_turn, per_turn, 2)
    k, v = (kv_quant.read(pages, scales, functools.partial(_copied, part(ids), which),
                          part(blocks) == 0, q.dtype) for which in (0, 1))
    k, v = (x.reshape(num_rows, num_groups, -1, width) for x in (k, v))
    scores = jnp.einsum('bkge,bkce->bkgc', q, k, preferred_element_type=jnp.float32)
    if masked:
      at = part(blocks)[..., None] * block + jnp.arange(block)
      seen = at.reshape(num_rows, num_groups, 1, -1) < lengths_B[:, None, None, None]
      scores = jnp.where(seen, scores, MASKED)
    return state.add(scores, v)

  turns = -(-counts_B.max() // per_turn)
  # Before its last entry a list holds only keys that its row sees.
  unmasked = jnp.where(lengths_B > 0, counts_B, blocks_BKN.shape[-1]).min() - 1
  unmasked = jnp.clip(unmasked // per_turn, 0, turns)
  state = _Softmax.empty(*q.shape)
  state = jax.lax.fori_loop(0, unmasked, functools.partial(turn, False), state)
  state = jax.lax.fori_loop(unmasked, turns, functools.partial(turn, True), state)
  out = state.out / jnp.maximum(state.total, 1e-30)[..., None]
  return out.reshape(q_BHE.shape).astype(q_BHE.dtype)


class _Softmax(NamedTuple):
  """A softmax-weighted sum over the keys so far, of the G queries of each list."""

  highest: Array  # f32[B, K, G]
  total: Array  # f32[B, K, G] Σ exp(score − highest)
  out: Array  # f32[B, K, G, E]

  @classmethod
  def empty(cls, *shape: int) -> '_Softmax':
    return cls(jnp.full(shape[:3], MASKED), jnp.zeros(shape[:3]), jnp.zeros(shape))

  def add(self, scores_BKGC: Array, v_BKCE: Array) -> '_Softmax':
    highest = jnp.maximum(self.highest, scores_BKGC.max(-1))
    weights = jnp.exp(scores_BKGC - highest[..., None])
    kept = jnp.exp(self.highest - highest)
    new = jnp.einsum('bkgc,bkce->bkge', weights.astype(v_BKCE.dtype), v_BKCE,
                     preferred_element_type=jnp.float32)
    return _Softmax(highest, self.total * kept + weights.sum(-1),
                    self.out * kept[..., None] + new)


def _copied(ids_BKN: Array, which: int, leaf: Array) -> Array:
  """[B, K, N, page, …]: what an array [K, N', 2, page, …] holds of the pages with these ids.

  Keys (0) and values (1) are copied apart: out of one copy, XLA would read each with a stride.
  Heads are mapped over, so that chips which hold different heads read their own and no more.
  """
  numbers = jax.lax.GatherDimensionNumbers(
      offset_dims=tuple(range(2, leaf.ndim - 1)), collapsed_slice_dims=(0, 1),
      start_index_map=(0, 1))

  def of_head(of_head_N2: Array, ids_BN: Array) -> Array:
    at = jnp.stack([ids_BN, jnp.full_like(ids_BN, which)], -1)
    return jax.lax.gather(of_head_N2, at, numbers, (1, 1, *of_head_N2.shape[2:]),
                          mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)

  return jax.vmap(of_head, in_axes=(0, 1), out_axes=1)(leaf, ids_BKN)
