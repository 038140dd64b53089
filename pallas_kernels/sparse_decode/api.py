"""ReSA's decoding step: score the blocks of the context, select some, attend to them exactly.

Prefill and rectification are dense; between them a step reads the descriptors of all blocks
and the keys and values of the selected ones, 1 / page + p of the cache. `reference` defines
the layouts and each operation. Descriptors are the caller's state: `update_descriptors` when
a token is appended, `describe_blocks` after prefill and for the blocks that a rectification
rewrites; both touch few bytes and are XLA's.

Source: 2506.04108 section 2.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax

from pallas_kernels.dispatch import Generation, Implementation, first_supported
from pallas_kernels.sparse_decode import kernel_tpu, reference, tuning
from pallas_kernels.sparse_decode.reference import Selection

Array = jax.Array


def sparse_decode(q_BHE: Array, kv_pages_KNSPE: Array, bounds_BKPD: Array, page_table_BP: Array,
                  lengths_B: Array, layer: Array | None = None, *, selection: Selection,
                  generation: Generation | None, blocks: tuning.Blocks | None = None
                  ) -> tuple[Array, Array]:
  """Attention of one query a row to the selected blocks of its context.

    o = softmax(q k_Sᵀ / √E) v_S,  S = tokens of select(block_scores(q, bounds))

  With `reference.DENSE` this is dense attention.

  Args:
    q_BHE: f[B, H, E] after RoPE.
    kv_pages_KNSPE: f[K, N, 2, page, E]: keys after RoPE, then values; H / K query heads to
      each key/value head. Slots never written must hold finite numbers.
    bounds_BKPD: f[B, K, P, 2E]: elementwise maxima, then minima, of the keys of each block;
      those beyond a row's blocks may hold anything.
    page_table_BP: i32[B, P]: the page of each block; rows may share pages. Entries of the
      row's blocks must name pages.
    lengths_B: i32[B]: tokens in the cache, the query's own among them; at most P · page.
    layer: as in `block_scores`.
    selection: which share of the blocks.
    generation: the TPU's; None takes the reference.
    blocks: block sizes other than the tuned ones.

  Returns:
    out f[B, H, E] in q's dtype and log Σ exp of the logits f32[B, H] (to merge it with other
    parts of the context); 0 and −∞ where the row is empty.

  Raises:
    ValueError: shapes that do not fit together.

  Source: 2506.04108 section 2.
  Departs from the paper in selecting exactly, first blocks first where scores are equal.
  """
  page_size = kv_pages_KNSPE.shape[3]
  if blocks is None:
    blocks = tuning.blocks(generation, page_size) if generation else tuning.DEFAULT
  scores = block_scores(q_BHE, bounds_BKPD, layer, generation=generation, blocks=blocks)
  chosen, counts = select_blocks(scores, lengths_B, page_size=page_size, selection=selection,
                                 generation=generation)
  return sparse_attention(q_BHE, kv_pages_KNSPE, chosen, counts, page_table_BP, lengths_B,
                          generation=generation, blocks=blocks)


def block_scores(q_BHE: Array, bounds_BKPD: Array, layer: Array | None = None, *,
                 generation: Generation | None, blocks: tuning.Blocks = tuning.DEFAULT) -> Array:
  """An upper bound of q̄ · k over the keys k of each block, q̄ the mean of a group's queries.

    score_i = Σ_j max(q̄_j kmax_ij, q̄_j kmin_ij)

  Args:
    q_BHE: f[B, H, E] after RoPE.
    bounds_BKPD: f[B, K, P, 2E]: maxima, then minima; q̄ is rounded to their dtype.
    layer: i32[] if the bounds are those of all layers, f[L, B, K, P, 2E]: a slice of one,
      made for the kernel, would be written and read once more.
    generation, blocks: as in `sparse_decode`.

  Returns:
    f32[B, K, P].

  Raises:
    ValueError: shapes that do not fit together.

  Source: 2506.04108 section 2 (1 / √E cannot change the ranking and is left out).
  """
  num_rows, num_heads, head_dim = q_BHE.shape
  shape = bounds_BKPD.shape if layer is None else bounds_BKPD.shape[1:]
  if len(shape) != 4 or shape[0] != num_rows or shape[3] != 2 * head_dim:
    raise ValueError(f'bounds {bounds_BKPD.shape} must be [B, K, P, 2E], or [L, B, K, P, 2E] with '
                     f'a layer, for queries {q_BHE.shape} [B, H, E].')
  _check_groups(num_heads, shape[1])
  return first_supported('block_scores', _implementations(
      functools.partial(kernel_tpu.block_scores, scored_blocks=blocks.scored_blocks),
      reference.block_scores, generation), q_BHE, bounds_BKPD, layer)


def select_blocks(scores_BKP: Array, lengths_B: Array, *, page_size: int, selection: Selection,
                  generation: Generation | None) -> tuple[Array, Array]:
  """The n = min(M, max(n_min, ⌈M p⌉)) highest of a row's M blocks, the last n_local forced.

  Args:
    scores_BKP: f32[B, K, P], no NaN in a row's blocks; of equal scores the first block wins.
    lengths_B: i32[B] tokens; M = ⌈length / page⌉.
    page_size: tokens of a block.
    selection: p, n_min and n_local.
    generation: as in `sparse_decode`.

  Returns:
    blocks i32[B, K, N], ascending, 0 beyond the count, N the count of a full row; and the
    counts n, i32[B].

  Raises:
    ValueError: n_local > n_min, or p outside (0, 1].

  Source: 2506.04108 section 2.
  """
  if not 0 < selection.active <= 1:
    raise ValueError(f'active must be in (0, 1], not {selection.active}.')
  if not 0 <= selection.local_blocks <= selection.min_blocks:
    raise ValueError(f'local_blocks ({selection.local_blocks}) must be within 0 and min_blocks '
                     f'({selection.min_blocks}).')
  if scores_BKP.shape[0] != lengths_B.shape[0]:
    raise ValueError(f'{lengths_B.shape[0]} lengths for scores of {scores_BKP.shape[0]} rows.')
  return first_supported('select_blocks', _implementations(
      kernel_tpu.select_blocks, reference.select_blocks, generation),
      scores_BKP, lengths_B, page_size=page_size, selection=selection)


def sparse_attention(q_BHE: Array, kv_pages_KNSPE: Array, blocks_BKN: Array, counts_B: Array,
                     page_table_BP: Array, lengths_B: Array, *, generation: Generation | None,
                     blocks: tuning.Blocks = tuning.DEFAULT) -> tuple[Array, Array]:
  """softmax(q kᵀ / √E) v over the keys of the listed blocks; the softmax is float32.

  Args:
    q_BHE, kv_pages_KNSPE, page_table_BP, lengths_B, generation, blocks: as in `sparse_decode`.
    blocks_BKN: i32[B, K, N] ascending; entries beyond the count must name blocks of the row.
    counts_B: i32[B]: how many of them count.

  Returns:
    As `sparse_decode`.

  Raises:
    ValueError: shapes that do not fit together.

  Source: 2506.04108 section 2.
  """
  num_rows, num_heads, head_dim = q_BHE.shape
  num_groups, _, pair, _, width = kv_pages_KNSPE.shape
  if pair != 2 or width != head_dim:
    raise ValueError(f'kv_pages {kv_pages_KNSPE.shape} must be [K, N, 2, page, E] with E = '
                     f'{head_dim}.')
  _check_groups(num_heads, num_groups)
  if blocks_BKN.shape[:2] != (num_rows, num_groups):
    raise ValueError(f'blocks {blocks_BKN.shape} must be [B, K, N] with B = {num_rows} and '
                     f'K = {num_groups}.')
  for name, x in (('counts', counts_B), ('lengths', lengths_B), ('page_table', page_table_BP)):
    if x.shape[0] != num_rows:
      raise ValueError(f'{name} {x.shape} must have one entry for each of {num_rows} rows.')
  return first_supported('sparse_attention', _implementations(
      functools.partial(kernel_tpu.sparse_attention, attended_keys=blocks.attended_keys,
                        num_cores=2 if generation in ('v4', 'v5p') else 1),
      reference.sparse_attention, generation),
      q_BHE, kv_pages_KNSPE, blocks_BKN, counts_B, page_table_BP, lengths_B)


def describe_blocks(kv_pages_KNSPE: Array, blocks_BR: Array, page_table_BP: Array,
                    lengths_B: Array) -> Array:
  """Descriptors of some blocks from their keys, f[B, K, R, 2E]: maxima, then minima.

  Args:
    kv_pages_KNSPE, page_table_BP, lengths_B: as in `sparse_decode`.
    blocks_BR: i32[B, R] blocks of the row; keys beyond its length are left out, and a block
      without keys gets −∞ and ∞.

  Source: 2506.04108 section 2.
  """
  return reference.describe_blocks(kv_pages_KNSPE, blocks_BR, page_table_BP, lengths_B)


def update_descriptors(bounds_BKPD: Array, k_BKE: Array, positions_B: Array, *,
                       page_size: int) -> Array:
  """Descriptors after one more key a row; what a block's first key finds there is forgotten.

  Args:
    bounds_BKPD: f[B, K, P, 2E]; donate it, and the update is in place.
    k_BKE: f[B, K, E] new keys, after RoPE.
    positions_B: i32[B] their positions.
    page_size: tokens of a block.

  Source: 2506.04108 section 2.
  """
  return reference.update_descriptors(bounds_BKPD, k_BKE, positions_B, page_size)


def _check_groups(num_heads: int, num_groups: int) -> None:
  if num_heads % num_groups:
    raise ValueError(f'{num_heads} query heads are no multiple of {num_groups} key/value heads.')


def _implementations(kernel: Callable[..., Any], definition: Callable[..., Any],
                     generation: Generation | None) -> list[Implementation]:
  chosen = [] if generation is None else [Implementation('tpu', kernel)]
  return [*chosen, Implementation('reference', definition)]
