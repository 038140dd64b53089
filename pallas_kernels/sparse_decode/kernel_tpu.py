"""The three kernels of a sparse decoding step: scores, selection, attention."""

import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.sparse_decode import reference
from pallas_kernels.sparse_decode.reference import Selection

Array = jax.Array
LANES, SUBLANES = 128, 8
LOWEST = -2 ** 31  # below every score's key


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


# --- Scores -----------------------------------------------------------------------


def block_scores(q_BHE: Array, bounds_BKPD: Array, layer: Array | None = None, *,
                 scored_blocks: int, interpret: Any = False) -> Array:
  """Scores of all blocks: the descriptors stream through the MXU as its weights.

  With a layer the bounds are f[L, B, K, P, 2E], and only that layer's are read.

  Raises:
    NotImplementedError: 2E is no multiple of the 128 lanes.
  """
  bounds_LBKPD = bounds_BKPD[None] if layer is None else bounds_BKPD
  layer = jnp.zeros((), jnp.int32) if layer is None else layer
  num_rows, num_groups, capacity, width = bounds_LBKPD.shape[1:]
  if width % LANES:
    raise NotImplementedError(f'descriptors of width {width}, no multiple of {LANES}')
  q = reference.pooled_query(q_BHE, bounds_LBKPD[0])[:, :, None]
  size = capacity if capacity <= scored_blocks else _round_up(scored_blocks, LANES)
  scores = pl.pallas_call(
      _scores_body,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(num_rows, num_groups, pl.cdiv(capacity, size)),
          in_specs=[pl.BlockSpec((None, None, 1, width), lambda b, k, p, _: (b, k, 0, 0)),
                    pl.BlockSpec((None, None, None, size, width),
                                 lambda b, k, p, layer: (layer[0], b, k, p, 0))],
          out_specs=pl.BlockSpec((None, None, 1, size), lambda b, k, p, _: (b, k, 0, p))),
      out_shape=jax.ShapeDtypeStruct((num_rows, num_groups, 1, capacity), jnp.float32),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary', 'arbitrary')),
      name='sparse_decode_scores', interpret=interpret,
  )(layer[None].astype(jnp.int32), q, bounds_LBKPD)
  return scores[:, :, 0]


def _dot_t(x: Array, y: Array) -> Array:
  """x yᵀ in float32."""
  precision = 'highest' if y.dtype == jnp.float32 else None
  return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision=precision,
                             preferred_element_type=jnp.float32)


def _dot(x: Array, y: Array) -> Array:
  precision = 'highest' if y.dtype == jnp.float32 else None
  return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def _scores_body(layer_ref: Any, q_ref: Any, bounds_ref: Any, scores_ref: Any) -> None:
  del layer_ref  # The block specs have read it.
  scores_ref[...] = _dot_t(q_ref[...], bounds_ref[...])


# --- Selection --------------------------------------------------------------------


def select_blocks(scores_BKP: Array, lengths_B: Array, page_size: int, selection: Selection, *,
                  interpret: Any = False) -> tuple[Array, Array]:
  """The n highest scores' indices: the n-th highest by bisection on the bits of float32, then
  ranks and their inversion as products of 0/1 matrices, whose sums are exact."""
  num_rows, num_groups, capacity = scores_BKP.shape
  num_lists = num_rows * num_groups
  blocks_B = reference.num_blocks(lengths_B, page_size)
  counts_B = selection.num_selected(blocks_B).astype(jnp.int32)
  together = math.gcd(num_lists, SUBLANES)
  chunks = pl.cdiv(capacity, LANES)
  width = selection.num_selected(capacity)
  scores = scores_BKP.reshape(num_lists, capacity)
  scores = jnp.pad(scores, ((0, 0), (0, chunks * LANES - capacity)))
  chosen = pl.pallas_call(
      functools.partial(_select_body, num_local=selection.local_blocks, num_groups=num_groups),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(num_lists // together,),
          in_specs=[pl.BlockSpec((together, chunks, LANES), lambda i, *_: (i, 0, 0))],
          out_specs=pl.BlockSpec((together, 1, _round_up(width, LANES)),
                                 lambda i, *_: (i, 0, 0)),
          scratch_shapes=[pltpu.VMEM((together, chunks, LANES), jnp.int32),
                          pltpu.VMEM((together, 1, LANES), jnp.int32)]),
      out_shape=jax.ShapeDtypeStruct((num_lists, 1, _round_up(width, LANES)), jnp.int32),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
      name='sparse_decode_select', interpret=interpret,
  )(blocks_B.astype(jnp.int32), counts_B, scores.reshape(num_lists, chunks, LANES))
  return chosen[:, 0, :width].reshape(num_rows, num_groups, width), counts_B


def _iota(shape: tuple[int, ...], axis: int) -> Array:
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _select_body(blocks_ref: Any, counts_ref: Any, scores_ref: Any, chosen_ref: Any,
                 keys_ref: Any, least_ref: Any, *, num_local: int, num_groups: int) -> None:
  together, chunks, _ = scores_ref.shape
  first = pl.program_id(0) * together
  rows = [jax.lax.div(first + r, num_groups) for r in range(together)]
  index = _iota((chunks, LANES), 0) * LANES + _iota((chunks, LANES), 1)
  for r, row in enumerate(rows):
    scores, num_blocks = scores_ref[r], blocks_ref[row]
    # Zero has two encodings; the integers that order floats must know one.
    bits = jnp.where(scores == 0, 0, pltpu.bitcast(scores, jnp.int32))
    keys = jnp.where(bits < 0, bits ^ 0x7fffffff, bits)
    keys = jnp.where(index >= num_blocks - num_local, 0x7f800000, keys)
    keys_ref[r] = jnp.where(index >= num_blocks, LOWEST, keys)

  counts = jnp.stack([jnp.full((1, 1), counts_ref[row], jnp.int32) for row in rows])

  def narrow(bit: Array, least: Array) -> Array:
    """Raises the threshold by a bit where enough keys reach it still."""
    higher = least + (jnp.int32(1) << (31 - bit))  # wraps from the sign bit, as it should
    reach = jnp.sum((keys_ref[...] >= higher).astype(jnp.int32), (1, 2), keepdims=True)
    return jnp.where(reach >= counts, higher, least)

  least = jax.lax.fori_loop(0, 32, narrow, jnp.full((together, 1, 1), LOWEST, jnp.int32))
  least_ref[...] = jnp.broadcast_to(least, least_ref.shape)
  upto = (_iota((LANES, LANES), 0) <= _iota((LANES, LANES), 1)).astype(jnp.bfloat16)
  before = (_iota((chunks, chunks), 1) < _iota((chunks, chunks), 0)).astype(jnp.bfloat16)
  ones = jnp.ones((LANES, LANES), jnp.bfloat16)

  def ranks(mask: Array) -> tuple[Array, Array, Array]:
    """Of 0/1 entries: ranks from 1 in their chunk, entries in it, entries before it."""
    mask = mask.astype(jnp.bfloat16)
    total = _dot(mask, ones)
    return _dot(mask, upto), total, _dot(before, total.astype(jnp.bfloat16))

  def invert(r: Array, _: Any) -> None:
    keys, least, count = keys_ref[r], least_ref[r], counts_ref[jax.lax.div(first + r, num_groups)]
    above = keys > least
    equal = keys == least
    room = count - jnp.sum(above.astype(jnp.int32))
    rank, _, start = ranks(equal.astype(jnp.float32))
    chosen = above | (equal & (rank + start <= room.astype(jnp.float32)))
    rank, total, start = ranks(chosen.astype(jnp.float32))
    rank_T = jnp.where(chosen, rank, 0).T.astype(jnp.bfloat16)  # [lane, chunk]
    chunk = _iota((chunks, LANES), 0) * LANES
    lane = _iota((LANES, LANES), 0)
    for tile in range(chosen_ref.shape[-1] // LANES):
      # Entry s of the list is the one of rank s + 1 − start in the chunk that spans s.
      wanted = (_iota((1, LANES), 1) + tile * LANES + 1).astype(jnp.float32) - start
      spans = (wanted > 0) & (wanted <= total)
      rank_in = jnp.sum(jnp.where(spans, wanted, 0), 0, keepdims=True)
      found = _dot(rank_T, spans.astype(jnp.bfloat16)) == jnp.where(rank_in > 0, rank_in, -1)
      at = (jnp.sum(jnp.where(spans, chunk, 0), 0, keepdims=True)
            + jnp.sum(jnp.where(found, lane, 0), 0, keepdims=True))
      chosen_ref[r, :, pl.ds(tile * LANES, LANES)] = at

  jax.lax.fori_loop(0, together, invert, None)


# --- Attention --------------------------------------------------------------------


def sparse_attention(q_BHE: Array, kv_pages_KNSPE: Array, blocks_BKN: Array, counts_B: Array,
                     page_table_BP: Array, lengths_B: Array, *, attended_keys: int,
                     num_cores: int = 1, interpret: Any = False) -> tuple[Array, Array]:
  """Flash-decoding over the listed pages, fetched by double-buffered copies.

  Each core takes a run of lists (row and key/value head); while it computes on the last pages
  of one, the first of the next are on their way.

  Raises:
    NotImplementedError: E is no multiple of the 128 lanes, or a page no multiple of its
      dtype's tile.
  """
  num_rows, num_heads, head_dim = q_BHE.shape
  num_groups, _, _, page_size, _ = kv_pages_KNSPE.shape
  dtype = kv_pages_KNSPE.dtype
  if head_dim % LANES or page_size % (SUBLANES * 4 // dtype.itemsize):
    raise NotImplementedError(f'{dtype} pages of [{page_size}, {head_dim}]')
  num_lists, group = num_rows * num_groups, num_heads // num_groups
  padded = _round_up(group, SUBLANES)
  q = q_BHE.astype(dtype).reshape(num_lists, group, head_dim)
  q = jnp.pad(q, ((0, 0), (0, padded - group), (0, 0)))
  per_step = max(1, min(attended_keys // page_size, blocks_BKN.shape[-1]))
  steps = pl.cdiv(blocks_BKN.shape[-1], per_step)
  blocks = blocks_BKN.reshape(num_lists, 1, -1)
  blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, steps * per_step - blocks.shape[-1])))

  cores = math.gcd(num_cores, num_lists)
  on_core = num_lists // cores

  def spec(width: int, ahead: int, per: int) -> pl.BlockSpec:
    """SMEM block of this list or the next of the core; `per` lists share one."""
    def index(core: Array, j: Array, *_: Any) -> tuple[Array | int, ...]:
      return jax.lax.div(core * on_core + jnp.minimum(j + ahead, on_core - 1), per), 0, 0
    return pl.BlockSpec((None, 1, width), index, memory_space=pltpu.SMEM)

  def heads(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, padded, width), lambda core, j, *_: (core * on_core + j, 0, 0))

  listed, capacity = blocks.shape[-1], page_table_BP.shape[-1]
  pages = page_table_BP[:, None]
  out, lse = pl.pallas_call(
      functools.partial(_attention_body, num_groups=num_groups, steps=steps),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(cores, on_core),
          in_specs=[spec(listed, 0, 1), spec(listed, 1, 1), spec(capacity, 0, num_groups),
                    spec(capacity, 1, num_groups), heads(head_dim),
                    pl.BlockSpec(memory_space=pl.ANY)],
          out_specs=[heads(head_dim), heads(1)],
          scratch_shapes=[
              pltpu.VMEM((2, per_step, 2, page_size, head_dim), dtype),
              pltpu.SemaphoreType.DMA((2,)),
              pltpu.VMEM((padded, 1), jnp.float32), pltpu.VMEM((padded, 1), jnp.float32),
              pltpu.VMEM((padded, head_dim), jnp.float32)]),
      out_shape=[jax.ShapeDtypeStruct(q.shape, q_BHE.dtype),
                 jax.ShapeDtypeStruct((num_lists, padded, 1), jnp.float32)],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'),
                                           disable_bounds_checks=True),
      name='sparse_decode_attention', interpret=interpret,
  )(lengths_B, counts_B, blocks, blocks, pages, pages, q, kv_pages_KNSPE)
  return (out[:, :group].reshape(q_BHE.shape), lse[:, :group, 0].reshape(num_rows, num_heads))


def _attention_body(lengths_ref: Any, counts_ref: Any, blocks_ref: Any, next_blocks_ref: Any,
                    table_ref: Any, next_table_ref: Any, q_ref: Any, kv_ref: Any, out_ref: Any,
                    lse_ref: Any, buffer_ref: Any, arrived: Any, highest_ref: Any,
                    sum_ref: Any, acc_ref: Any, *, num_groups: int, steps: int) -> None:
  _, per_step, _, page_size, head_dim = buffer_ref.shape
  j, on_core = pl.program_id(1), pl.num_programs(1)
  i = pl.program_id(0) * on_core + j
  row = jax.lax.div(i, num_groups)
  count, length = counts_ref[row], lengths_ref[row]
  # Blocks ascend: of those listed only the last can be the row's partly filled one.
  ends_in_tail = blocks_ref[0, jnp.maximum(count - 1, 0)] == jax.lax.div(length - 1, page_size)
  unused = jnp.where(ends_in_tail, page_size - 1 - jax.lax.rem(length - 1, page_size), 0)
  num_keys = count * page_size - unused

  def fetch(i: Array, step: Array | int, blocks_ref: Any, table_ref: Any) -> None:
    slot = (i * steps + step) & 1
    # Addressed in two steps, which leaves less to do for each page: scalar work is what
    # bounds small pages.
    pages, into = kv_ref.at[jax.lax.rem(i, num_groups)], buffer_ref.at[slot]
    for n in range(per_step):
      page = table_ref[0, blocks_ref[0, step * per_step + n]]
      pltpu.make_async_copy(pages.at[page], into.at[n], arrived.at[slot]).start()

  def attend(step: Array | int) -> None:
    slot = (i * steps + step) & 1
    # One wait for the bytes of all the step's copies.
    pltpu.make_async_copy(buffer_ref.at[slot], buffer_ref.at[slot], arrived.at[slot]).wait()
    keys = buffer_ref[slot, :, 0].reshape(-1, head_dim)
    values = buffer_ref[slot, :, 1].reshape(-1, head_dim)
    logits = _dot_t(q_ref[...], keys) * (1 / math.sqrt(head_dim))
    at = step * per_step * page_size + _iota(logits.shape, 1)
    logits = jnp.where(at < num_keys, logits, -jnp.inf)
    highest = jnp.maximum(highest_ref[...], jnp.max(logits, 1, keepdims=True))
    decay = jnp.exp(highest_ref[...] - highest)
    weights = jnp.exp(logits - highest)
    highest_ref[...] = highest
    sum_ref[...] = sum_ref[...] * decay + jnp.sum(weights, 1, keepdims=True)
    acc_ref[...] = acc_ref[...] * decay + _dot(weights.astype(values.dtype), values)

  @pl.when((j == 0) & (count > 0))
  def fetch_first() -> None:
    fetch(i, 0, blocks_ref, table_ref)

  highest_ref[...] = jnp.full(highest_ref.shape, -jnp.inf)
  sum_ref[...] = jnp.zeros(sum_ref.shape)
  acc_ref[...] = jnp.zeros(acc_ref.shape)

  def body(step: Array, _: Any) -> None:
    @pl.when((step + 1) * per_step < count)
    def fetch_next_step() -> None:
      fetch(i, step + 1, blocks_ref, table_ref)

    @pl.when(step * per_step < count)
    def attend_step() -> None:
      attend(step)

  jax.lax.fori_loop(0, steps - 1, body, None)
  more = j + 1 < on_core
  following = jax.lax.div(jnp.where(more, i + 1, i), num_groups)

  @pl.when(more & (counts_ref[following] > 0))
  def fetch_next_list() -> None:
    fetch(i + 1, 0, next_blocks_ref, next_table_ref)

  @pl.when((steps - 1) * per_step < count)
  def attend_last() -> None:
    attend(steps - 1)

  total = sum_ref[...]
  out_ref[...] = (acc_ref[...] / jnp.where(total > 0, total, 1)).astype(out_ref.dtype)
  lse_ref[...] = jnp.where(total > 0, highest_ref[...] + jnp.log(total), -jnp.inf)
