"""Rectified sparse attention's decoding step, as definitions (2506.04108 section 2).

Positions of a row are cut into blocks of one page. Layouts, chosen so that what a step must
read streams well on a TPU:

  kv_pages_KNSPE  f[K, N, 2, page, E]: keys, then values, of each page: one copy fetches both.
  bounds_BKPD     f[B, K, P, 2E]: elementwise maxima, then minima, of each block's keys. Every
                  step reads a row's in full, so they lie by row and block, not by page.
  page_table_BP   i32[B, P]: the page that holds a row's block.
"""

from fractions import Fraction
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Selection(NamedTuple):
  """How many blocks a step attends to.

  active: p, the share of a row's blocks; 1 attends to all.
  min_blocks: n_min, the least number of blocks (all of them where the row has fewer).
  local_blocks: n_local, how many of the last blocks are always among them.
  """

  active: float = 0.1
  min_blocks: int = 16
  local_blocks: int = 1

  def num_selected(self, num_blocks: Any) -> Any:
    """min(M, max(n_min, ⌈M p⌉)) of M blocks, an int or i32[...], in exact arithmetic."""
    share = Fraction(self.active).limit_denominator(1000)
    wanted = -(-num_blocks * share.numerator // share.denominator)
    if isinstance(num_blocks, int):
      return min(num_blocks, max(self.min_blocks, wanted))
    return jnp.minimum(num_blocks, jnp.maximum(self.min_blocks, wanted))


DENSE = Selection(active=1.0)


def num_blocks(lengths_B: Array, page_size: int) -> Array:
  """i32[B]: blocks that hold a row's positions; the last may be partly filled."""
  return (lengths_B + page_size - 1) // page_size


def pooled_query(q_BHE: Array, bounds_BKPD: Array) -> Array:
  """[max(q̄, 0), min(q̄, 0)], q̄ the mean of a group's queries: f[B, K, 2E], as the bounds."""
  num_rows, num_heads, head_dim = q_BHE.shape
  num_groups = bounds_BKPD.shape[1]
  q = q_BHE.astype(jnp.float32).reshape(num_rows, num_groups, num_heads // num_groups, head_dim)
  mean = q.mean(2).astype(bounds_BKPD.dtype)
  return jnp.concatenate([jnp.maximum(mean, 0), jnp.minimum(mean, 0)], -1)


def block_scores(q_BHE: Array, bounds_BKPD: Array, layer: Array | None = None) -> Array:
  """Σ_j max(q̄_j kmax_ij, q̄_j kmin_ij) = max(q̄, 0) · kmax_i + min(q̄, 0) · kmin_i.

  With a layer the bounds are f[L, B, K, P, 2E]."""
  if layer is not None:
    bounds_BKPD = bounds_BKPD[layer]
  precision = 'highest' if bounds_BKPD.dtype == jnp.float32 else None
  return jnp.einsum('bkd,bkpd->bkp', pooled_query(q_BHE, bounds_BKPD), bounds_BKPD,
                    precision=precision, preferred_element_type=jnp.float32)


def select_blocks(scores_BKP: Array, lengths_B: Array, page_size: int,
                  selection: Selection) -> tuple[Array, Array]:
  """The n highest of each row's blocks, of equal ones the first, in ascending order."""
  capacity = scores_BKP.shape[-1]
  blocks_B = num_blocks(lengths_B, page_size)
  counts_B = selection.num_selected(blocks_B)
  blocks, counts = blocks_B[:, None, None], counts_B[:, None, None]
  index = jnp.arange(capacity)
  scores = jnp.where(index >= blocks - selection.local_blocks, jnp.inf, scores_BKP)
  # Blocks beyond the row's come last, whatever their scores.
  order = jnp.lexsort((-scores, jnp.broadcast_to(index >= blocks, scores.shape)))
  chosen = order[..., :selection.num_selected(capacity)]
  rank = jnp.arange(chosen.shape[-1])
  chosen = jnp.sort(jnp.where(rank < counts, chosen, capacity))
  return jnp.where(rank < counts, chosen, 0).astype(jnp.int32), counts_B.astype(jnp.int32)


def sparse_attention(q_BHE: Array, kv_pages_KNSPE: Array, blocks_BKN: Array, counts_B: Array,
                     page_table_BP: Array, lengths_B: Array) -> tuple[Array, Array]:
  """softmax(q kᵀ / √E) v over the first counts_B of the blocks, and log Σ exp."""
  num_rows, num_heads, head_dim = q_BHE.shape
  num_groups, _, _, page_size, _ = kv_pages_KNSPE.shape
  pages = jnp.take_along_axis(page_table_BP[:, None], blocks_BKN, -1)
  kv = kv_pages_KNSPE[jnp.arange(num_groups)[:, None], pages]  # [B, K, N, 2, page, E]
  q = q_BHE.reshape(num_rows, num_groups, num_heads // num_groups, head_dim)
  precision = 'highest' if kv.dtype == jnp.float32 else None
  logits = jnp.einsum('bkge,bknpe->bkgnp', q, kv[:, :, :, 0], precision=precision,
                      preferred_element_type=jnp.float32) / math.sqrt(head_dim)
  positions = blocks_BKN[..., None] * page_size + jnp.arange(page_size)
  seen = (positions < lengths_B[:, None, None, None]) & (
      jnp.arange(blocks_BKN.shape[-1])[:, None] < counts_B[:, None, None, None])
  # Zero times whatever a slot that was never written holds must be zero.
  v = jnp.where(seen[..., None], kv[:, :, :, 1], 0)
  logits = jnp.where(seen[:, :, None], logits, -jnp.inf)
  lse = jax.nn.logsumexp(logits, (-2, -1))
  weights = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0, lse)[..., None, None])
  out = jnp.einsum('bkgnp,bknpe->bkge', weights.astype(v.dtype), v, precision=precision,
                   preferred_element_type=jnp.float32)
  return out.reshape(q_BHE.shape).astype(q_BHE.dtype), lse.reshape(num_rows, num_heads)


def describe_blocks(kv_pages_KNSPE: Array, blocks_BR: Array, page_table_BP: Array,
                    lengths_B: Array) -> Array:
  """Elementwise maxima, then minima, of the keys of the named blocks that lie in the row."""
  page_size = kv_pages_KNSPE.shape[3]
  pages = jnp.take_along_axis(page_table_BP, blocks_BR, -1)
  k = jnp.moveaxis(kv_pages_KNSPE[:, pages, 0], 0, 1)  # [B, K, R, page, E]
  positions = blocks_BR[..., None] * page_size + jnp.arange(page_size)
  seen = (positions < lengths_B[:, None, None])[:, None, ..., None]
  highest = jnp.where(seen, k, -jnp.inf).max(-2)
  lowest = jnp.where(seen, k, jnp.inf).min(-2)
  return jnp.concatenate([highest, lowest], -1)


def update_descriptors(bounds_BKPD: Array, k_BKE: Array, positions_B: Array,
                       page_size: int) -> Array:
  """bounds of block ⌊t / page⌋ ∪ the new key; at a block's first position, the key alone."""
  rows, blocks = jnp.arange(len(positions_B)), positions_B // page_size
  first = (positions_B % page_size == 0)[:, None, None]
  highest, lowest = jnp.split(bounds_BKPD[rows, :, blocks], 2, -1)
  k = k_BKE.astype(bounds_BKPD.dtype)
  new = jnp.concatenate([jnp.where(first, k, jnp.maximum(highest, k)),
                         jnp.where(first, k, jnp.minimum(lowest, k))], -1)
  return bounds_BKPD.at[rows, :, blocks].set(new)
