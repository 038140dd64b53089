"""Branch decoding on a TPU: one kernel for the shared keys and for every branch's suffix.

A grid step takes one block of prefix keys, against the queries of all branches in VMEM (a
dense matmul), and one tile of suffixes, each against its own branch. Both update the same
online softmax (2205.14135), so there is nothing to merge, and the suffixes, which are bytes
more than arithmetic, arrive while the MXU works on the prefix.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.branch_decode import tuning

Array = jax.Array
Ref = Any
LANES = 128
SUBLANES = 8


def branch_decode(q_NHRE: Array, k_prefix_NKTE: Array, v_prefix_NKTE: Array,
                  prefix_lengths_NR: Array, k_suffix_NKRSE: Array, v_suffix_NKRSE: Array,
                  suffix_lengths_NR: Array, *, blocks: tuning.Blocks,
                  interpret: Any = False) -> tuple[Array, Array]:
  """`api.branch_decode` with given blocks, for shapes that `check` lets pass."""
  N, H, R, E = q_NHRE.shape
  K, T = k_prefix_NKTE.shape[1:3]
  G, S = H // K, k_suffix_NKRSE.shape[3]
  BR, BC, BT, BS, bs = blocks
  Q, chunks, groups, slot_blocks = R // BR, BR // BC, BR // BS, S // bs
  tiles = groups * slot_blocks
  grid = (N, K, Q, max(T // BT, tiles))

  # Per chunk and tile, the longest length decides what is skipped.
  chunk_lengths = prefix_lengths_NR.reshape(N, R // BC, BC).max(-1)
  tile_lengths = suffix_lengths_NR.reshape(N, R // BS, BS).max(-1)

  def key_block(n: Any, k: Any, q: Any, j: Any, chunk_lengths: Ref, _: Ref) -> tuple[Any, ...]:
    longest = functools.reduce(jnp.maximum, (chunk_lengths[n, q * chunks + c]
                                             for c in range(chunks)))
    return n, k, jnp.minimum(j, lax.div(longest - 1, BT)), 0

  def suffix_tile(n: Any, k: Any, q: Any, j: Any, _: Ref,
                  tile_lengths: Ref) -> tuple[Any, ...]:
    group, block = _tile(jnp.minimum(j, tiles - 1), slot_blocks)
    group = q * groups + group
    last = lax.div(jnp.maximum(tile_lengths[n, group] - 1, 0), bs)
    return n, k, group, jnp.minimum(block, last), 0

  lengths = pl.BlockSpec((None, BR, LANES), lambda n, k, q, j, *_: (n, q, 0))
  prefix = pl.BlockSpec((None, None, BT, E), key_block)
  suffix = pl.BlockSpec((None, None, BS, bs, E), suffix_tile)
  queries = pl.BlockSpec((None, None, G, BR, E), lambda n, k, q, j, *_: (n, k, 0, q, 0))
  out, lse = pl.pallas_call(
      functools.partial(_body, blocks=blocks, slot_blocks=slot_blocks, tiles=tiles,
                        key_blocks=T // BT),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=grid,
          in_specs=[lengths, lengths, queries, prefix, prefix, suffix, suffix],
          out_specs=[queries, pl.BlockSpec((None, None, None, G, BR),
                                           lambda n, k, q, j, *_: (n, k, q, 0, 0))],
          scratch_shapes=[pltpu.VMEM((G, BR, LANES), jnp.float32),
                          pltpu.VMEM((G, BR, LANES), jnp.float32),
                          pltpu.VMEM((G, BR, E), jnp.float32)]),
      out_shape=[jax.ShapeDtypeStruct((N, K, G, R, E), q_NHRE.dtype),
                 jax.ShapeDtypeStruct((N, K, Q, G, BR), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')),
      interpret=interpret,
  )(chunk_lengths, tile_lengths, _to_lanes(prefix_lengths_NR), _to_lanes(suffix_lengths_NR),
    q_NHRE.reshape(N, K, G, R, E), k_prefix_NKTE, v_prefix_NKTE, k_suffix_NKRSE,
    v_suffix_NKRSE)
  return out.reshape(N, H, R, E), lse.transpose(0, 1, 3, 2, 4).reshape(N, H, R)


def check(shape: tuning.Shape) -> None:
  """Whether the kernel takes a shape.

  Raises:
    NotImplementedError: it does not; says what it takes.
  """
  if shape.dtype not in ('bfloat16', 'float32'):
    raise NotImplementedError('bfloat16 or float32')
  if shape.num_branches % tuning.BRANCH_TILE or shape.num_slots % tuning.BRANCH_TILE:
    raise NotImplementedError(f'branches and suffix slots in multiples of {tuning.BRANCH_TILE}')
  if shape.num_prefix % tuning.KEY_TILE:
    raise NotImplementedError(f'prefix slots in multiples of {tuning.KEY_TILE}')
  if shape.head_dim not in (64, 128, 256):
    raise NotImplementedError('heads of 64, 128 or 256')


def _tile(j: Any, slot_blocks: int) -> tuple[Any, Any]:
  """Suffix tile j: its group of branches and its block of slots."""
  return lax.div(j, slot_blocks), lax.rem(j, slot_blocks)


def _to_lanes(lengths_NR: Array) -> Array:
  """Each length in all lanes of its row, as the kernel compares it."""
  return jnp.broadcast_to(lengths_NR.astype(jnp.int32)[..., None], (*lengths_NR.shape, LANES))


def _widen(x: Array, width: int) -> Array:
  """[rows, 128] with equal lanes → [rows, width]."""
  if width <= LANES:
    return x[:, :width]
  whole = jnp.concatenate([x] * -(-width // LANES), axis=1)
  return whole[:, :width]


def _lane_sums(p: Array) -> Array:
  """[rows, width] → [rows, 128] whose lanes sum to the row's sum."""
  width = p.shape[1]
  if width % LANES:
    lane = lax.broadcasted_iota(jnp.int32, (p.shape[0], LANES), 1)
    return jnp.where(lane == 0, p.sum(1, keepdims=True), 0.0)
  return functools.reduce(jnp.add, (p[:, i:i + LANES] for i in range(0, width, LANES)))


def _dot(a: Array, b: Array, contract_b: int) -> Array:
  """a [M, C] times b, contracted over b's axis, in float32."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((1,), (contract_b,)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


def _body(chunk_lengths: Ref, tile_lengths: Ref, prefix_lengths: Ref, suffix_lengths: Ref,
          q_ref: Ref, k_ref: Ref, v_ref: Ref, ks_ref: Ref, vs_ref: Ref, out_ref: Ref,
          lse_ref: Ref, max_ref: Ref, sum_ref: Ref, acc_ref: Ref, *, blocks: tuning.Blocks,
          slot_blocks: int, tiles: int, key_blocks: int) -> None:
  n, q, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  G, BR, E = q_ref.shape
  to_log2 = 1 / (math.sqrt(E) * math.log(2))  # exp2 is what the hardware has

  @pl.when(j == 0)
  def _() -> None:
    max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  def update(rows: Any, scores: Array, values: Callable[[Array], Array]) -> None:
    """Online softmax of a few branches; `values` multiplies the weights by their values."""
    state = [ref[:, rows, :].reshape(scores.shape[0], -1)
             for ref in (max_ref, sum_ref, acc_ref)]
    width = scores.shape[1]
    highest = jnp.maximum(state[0], scores.max(1, keepdims=True))
    weights = jnp.exp2(scores - _widen(highest, width))
    decay = jnp.exp2(state[0] - highest)
    out = values(weights.astype(v_ref.dtype))
    for ref, value in ((max_ref, highest), (sum_ref, decay * state[1] + _lane_sums(weights)),
                       (acc_ref, _widen(decay, E) * state[2] + out)):
      ref[:, rows, :] = value.reshape(G, -1, value.shape[1])

  def masked(scores: Array, lengths: Array, first: Any) -> Array:
    """Scaled scores, −inf at and after each branch's length; `first` is column 0's position."""
    limits = jnp.broadcast_to((lengths - first)[None], (G, *lengths.shape))
    limits = limits.reshape(-1, LANES)
    columns = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return jnp.where(columns < _widen(limits, scores.shape[1]), scores * to_log2, -jnp.inf)

  # --- the shared prefix: all branches of a chunk in one matmul
  def prefix_chunk(c: Any, _: None) -> None:
    longest = chunk_lengths[n, q * (BR // blocks.chunk) + c]

    @pl.when((j < key_blocks) & (j * blocks.keys < longest))
    def _() -> None:
      rows = pl.ds(pl.multiple_of(c * blocks.chunk, blocks.chunk), blocks.chunk)
      scores = _dot(q_ref[:, rows, :].reshape(-1, E), k_ref[...], 1)
      update(rows, masked(scores, prefix_lengths[rows, :], j * blocks.keys),
             lambda weights: _dot(weights, v_ref[...], 0))

  lax.fori_loop(0, BR // blocks.chunk, prefix_chunk, None)

  # --- the suffixes: rows of 8 branches against each one's own keys, of which its row is kept
  group, block = _tile(j, slot_blocks)
  row = lax.broadcasted_iota(jnp.int32, (G, SUBLANES, 1), 1)

  def own(rows: Array, cached: Ref, first: Any, contract: int) -> Array:
    """Row r of each query head against the cache of branch first + r."""
    kept = None
    for r in range(SUBLANES):
      product = _dot(rows, cached[first + r], contract).reshape(G, SUBLANES, -1)
      kept = product if kept is None else jnp.where(row == r, product, kept)
    return kept.reshape(G * SUBLANES, -1)

  def suffixes(i: Any, _: None) -> None:
    first = pl.multiple_of(i * tuning.BRANCH_TILE, tuning.BRANCH_TILE)
    start = pl.multiple_of(group * blocks.suffix_branches + first, tuning.BRANCH_TILE)
    # Half a tile of 16-bit rows is cut in float32.
    queries = q_ref[:, pl.ds(start, tuning.BRANCH_TILE), :].astype(jnp.float32)
    for half in range(0, tuning.BRANCH_TILE, SUBLANES):
      rows = pl.ds(pl.multiple_of(start + half, SUBLANES), SUBLANES)
      mine = queries[:, half:half + SUBLANES].reshape(G * SUBLANES, E).astype(q_ref.dtype)
      scores = own(mine, ks_ref, first + half, 1)
      update(rows, masked(scores, suffix_lengths[rows, :], block * blocks.slots),
             functools.partial(own, cached=vs_ref, first=first + half, contract=0))

  tile = jnp.minimum(q * (BR // blocks.suffix_branches) + group, tile_lengths.shape[1] - 1)

  @pl.when((j < tiles) & (block * blocks.slots < tile_lengths[n, tile]))
  def _() -> None:
    lax.fori_loop(0, blocks.suffix_branches // tuning.BRANCH_TILE, suffixes, None)

  @pl.when(j == pl.num_programs(3) - 1)
  def _() -> None:
    total = sum_ref[...].sum(-1)
    lse_ref[...] = (max_ref[...].max(-1) + jnp.log2(total)) * math.log(2)
    whole = sum_ref[...].sum(-1, keepdims=True)
    out_ref[...] = (acc_ref[...] / whole).astype(out_ref.dtype)
