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
SUFFIXES_AT_ONCE = 32  # branches between whose small matmuls the compiler may interleave


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
  # Heads inside query blocks: the lengths of a block of branches then stay in VMEM.
  grid = (N, Q, K, max(T // BT, tiles))
  piece = lse_piece(blocks)

  # Per chunk and tile, the longest length decides what is skipped.
  chunk_lengths = prefix_lengths_NR.reshape(N, R // BC, BC).max(-1)
  tile_lengths = suffix_lengths_NR.reshape(N, R // BS, BS).max(-1)

  def key_block(n: Any, q: Any, k: Any, j: Any, chunk_lengths: Ref, _: Ref) -> tuple[Any, ...]:
    longest = functools.reduce(jnp.maximum, (chunk_lengths[n, q * chunks + c]
                                             for c in range(chunks)))
    return n, k, jnp.minimum(j, lax.div(longest - 1, BT)), 0

  def suffix_tile(n: Any, q: Any, k: Any, j: Any, _: Ref,
                  tile_lengths: Ref) -> tuple[Any, ...]:
    group, block = _tile(jnp.minimum(j, tiles - 1), slot_blocks)
    group = q * groups + group
    last = lax.div(jnp.maximum(tile_lengths[n, group] - 1, 0), bs)
    return n, k, group, jnp.minimum(block, last), 0

  lengths = pl.BlockSpec((None, BR, LANES), lambda n, q, k, j, *_: (n, q, 0))
  prefix = pl.BlockSpec((None, None, BT, E), key_block)
  suffix = pl.BlockSpec((None, None, BS, bs, E), suffix_tile)
  queries = pl.BlockSpec((None, None, G, BR, E), lambda n, q, k, j, *_: (n, k, 0, q, 0))
  out, lse = pl.pallas_call(
      functools.partial(_body, blocks=blocks, slot_blocks=slot_blocks, tiles=tiles,
                        key_blocks=T // BT),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=grid,
          in_specs=[lengths, lengths, queries, prefix, prefix, suffix, suffix],
          out_specs=[queries, pl.BlockSpec((None, None, None, G * BR // piece, piece),
                                           lambda n, q, k, j, *_: (n, k, q, 0, 0))],
          scratch_shapes=[pltpu.VMEM((G, BR, LANES), jnp.float32),
                          pltpu.VMEM((G, BR, LANES), jnp.float32),
                          pltpu.VMEM((G, BR, E), jnp.float32)]),
      out_shape=[jax.ShapeDtypeStruct((N, K, G, R, E), q_NHRE.dtype),
                 jax.ShapeDtypeStruct((N, K, Q, G * BR // piece, piece), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')),
      interpret=interpret,
  )(chunk_lengths, tile_lengths, _to_lanes(prefix_lengths_NR), _to_lanes(suffix_lengths_NR),
    q_NHRE.reshape(N, K, G, R, E), k_prefix_NKTE, v_prefix_NKTE, k_suffix_NKRSE,
    v_suffix_NKRSE)
  lse = lse.reshape(N, K, Q, G, BR).transpose(0, 1, 3, 2, 4)
  return out.reshape(N, H, R, E), lse.reshape(N, H, R)


def check(shape: tuning.Shape) -> None:
  """Whether the kernel takes a shape.

  Raises:
    NotImplementedError: it does not; says what it takes.
  """
  if shape.dtype not in ('bfloat16', 'float32'):
    raise NotImplementedError('bfloat16 or float32')
  if not (shape.num_branches and shape.num_prefix and shape.num_slots):
    raise NotImplementedError('at least one branch, prefix slot and suffix slot')
  for name, size in (('branches', shape.num_branches), ('suffix slots', shape.num_slots)):
    if size % tuning.BRANCH_TILE:
      raise NotImplementedError(f'{size} {name} are no multiple of {tuning.BRANCH_TILE}')
  if shape.num_prefix % tuning.KEY_TILE:
    raise NotImplementedError(f'prefix slots in multiples of {tuning.KEY_TILE}')
  if shape.head_dim not in (64, 128, 256):
    raise NotImplementedError('heads of 64, 128 or 256')


def num_steps(shape: tuning.Shape, blocks: tuning.Blocks) -> int:
  """Grid steps of one key/value head and query block."""
  tiles = blocks.branches // blocks.suffix_branches * (shape.num_slots // blocks.slots)
  return max(shape.num_prefix // blocks.keys, tiles)


def lse_piece(blocks: tuning.Blocks) -> int:
  """Branches that are begun and finished together: a row of lanes where possible."""
  return LANES if blocks.branches % LANES == 0 else tuning.BRANCH_TILE


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
  return functools.reduce(jnp.add, (p[:, i:i + LANES] for i in range(0, p.shape[1], LANES)))


def _dot(a: Array, b: Array, contract_b: int) -> Array:
  """a [M, C] times b, contracted over b's axis, in float32."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((1,), (contract_b,)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


def _body(chunk_lengths: Ref, tile_lengths: Ref, prefix_lengths: Ref, suffix_lengths: Ref,
          q_ref: Ref, k_ref: Ref, v_ref: Ref, ks_ref: Ref, vs_ref: Ref, out_ref: Ref,
          lse_ref: Ref, max_ref: Ref, sum_ref: Ref, acc_ref: Ref, *, blocks: tuning.Blocks,
          slot_blocks: int, tiles: int, key_blocks: int) -> None:
  n, q, j = pl.program_id(0), pl.program_id(1), pl.program_id(3)
  last = pl.num_programs(3) - 1
  G, BR, E = q_ref.shape
  pieces, piece = lse_ref.shape
  per_head = pieces // G
  to_log2 = 1 / (math.sqrt(E) * math.log(2))  # exp2 is what the hardware has

  def at(i: Any) -> tuple[Any, Any]:
    """Head and branches of a piece of the state."""
    return lax.div(i, per_head), pl.ds(pl.multiple_of(lax.rem(i, per_head) * piece, piece), piece)

  def begin(i: Any, _: None) -> None:
    for ref, value in ((max_ref, -jnp.inf), (sum_ref, 0.0), (acc_ref, 0.0)):
      ref[at(i)] = jnp.full((piece, ref.shape[2]), value, jnp.float32)

  lax.fori_loop(0, jnp.where(j == 0, pieces, 0), begin, None)

  def update(rows: Any, scores: Array, values: Callable[[Array], Array]) -> None:
    """Online softmax of a few branches; `values` multiplies the weights by their values."""
    highest_before, sums, acc = (ref[:, rows, :].reshape(scores.shape[0], -1)
                                 for ref in (max_ref, sum_ref, acc_ref))
    highest = jnp.maximum(highest_before, scores.max(1, keepdims=True))
    weights = jnp.exp2(scores - _widen(highest, scores.shape[1]))
    decay = jnp.exp2(highest_before - highest)
    for ref, value in (
        (max_ref, highest), (sum_ref, decay * sums + _lane_sums(weights)),
        (acc_ref, _widen(decay, E) * acc + values(weights.astype(v_ref.dtype)))):
      ref[:, rows, :] = value.reshape(G, -1, value.shape[1])

  def masked(scores: Array, begins: Array | None, ends: Array) -> Array:
    """Scaled scores, −inf outside each branch's columns; bounds are [branches, 128]."""
    columns = lax.broadcasted_iota(jnp.int32, scores.shape, 1)

    def per_row(x: Array) -> Array:
      every = jnp.broadcast_to(x[None], (G, *x.shape)).reshape(-1, LANES)
      return _widen(every, scores.shape[1])

    seen = columns < per_row(ends)
    if begins is not None:
      seen &= columns >= per_row(begins)
    return jnp.where(seen, scores * to_log2, -jnp.inf)

  # --- the shared prefix: all branches of a chunk in one matmul
  def prefix_chunk(c: Any, _: None) -> None:
    longest = chunk_lengths[n, q * (BR // blocks.chunk) + c]

    @pl.when((j < key_blocks) & (j * blocks.keys < longest))
    def _attend() -> None:
      rows = pl.ds(pl.multiple_of(c * blocks.chunk, blocks.chunk), blocks.chunk)
      scores = _dot(q_ref[:, rows, :].reshape(-1, E), k_ref[...], 1)
      update(rows, masked(scores, None, prefix_lengths[rows, :] - j * blocks.keys),
             lambda weights: _dot(weights, v_ref[...], 0))

  lax.fori_loop(0, BR // blocks.chunk, prefix_chunk, None)

  # --- the suffixes: the rows of 8 branches against the keys of all 8 in one matmul, of which
  # each row keeps its own; its weights meet the values of all 8, with zeros for the others'
  group, block = _tile(j, slot_blocks)
  at_once = math.gcd(blocks.suffix_branches, SUFFIXES_AT_ONCE)
  shared = max(1, LANES // blocks.slots)  # branches whose slots lie in the same lanes' tile
  width = blocks.slots * shared
  row = lax.broadcasted_iota(jnp.int32, (G, SUBLANES, 1), 1)
  own = [lax.div(row, shared) == t for t in range(SUBLANES // shared)]

  def eights(x: Array) -> list[Array]:
    """[G · at_once, C] → [G · 8, C] of 8 branches each; done in float32, whose tiles are 8 rows."""
    x = x.astype(jnp.float32).reshape(G, at_once, -1)
    return [x[:, i:i + SUBLANES].reshape(G * SUBLANES, -1) for i in range(0, at_once, SUBLANES)]

  def joined(parts: list[Array]) -> Array:
    return jnp.concatenate([x.reshape(G, SUBLANES, -1) for x in parts], 1).reshape(
        G * at_once, -1)

  def suffixes(i: Any, _: None) -> None:
    first = pl.multiple_of(i * at_once, at_once)
    rows = pl.ds(pl.multiple_of(group * blocks.suffix_branches + first, at_once), at_once)
    caches = [pl.ds(first + i, SUBLANES) for i in range(0, at_once, SUBLANES)]

    def own_scores(q: Array, cache: Any) -> Array:
      every = _dot(q.astype(q_ref.dtype), ks_ref[cache].reshape(-1, E), 1)
      every = every.reshape(G, SUBLANES, -1)
      tiles = [every[:, :, t * width:(t + 1) * width] for t in range(len(own))]
      mine = functools.reduce(lambda kept, t: jnp.where(own[t], tiles[t], kept),
                              range(1, len(own)), tiles[0])
      return mine.reshape(G * SUBLANES, width)

    def values(weights: Array) -> Array:
      products = []
      for eight, cache in zip(eights(weights), caches, strict=True):
        eight = eight.reshape(G, SUBLANES, width)
        diagonal = jnp.concatenate([jnp.where(mine, eight, 0.0) for mine in own], 2)
        products.append(_dot(diagonal.reshape(G * SUBLANES, -1).astype(v_ref.dtype),
                             vs_ref[cache].reshape(-1, E), 0))
      return joined(products)

    scores = joined([own_scores(q, cache) for q, cache in
                     zip(eights(q_ref[:, rows, :].reshape(-1, E)), caches, strict=True)])
    begins = lax.rem(lax.broadcasted_iota(jnp.int32, (at_once, LANES), 0), shared) * blocks.slots
    ends = begins + jnp.minimum(suffix_lengths[rows, :] - block * blocks.slots, blocks.slots)
    update(rows, masked(scores, begins if shared > 1 else None, ends), values)

  tile = jnp.minimum(q * (BR // blocks.suffix_branches) + group, tile_lengths.shape[1] - 1)

  @pl.when((j < tiles) & (block * blocks.slots < tile_lengths[n, tile]))
  def _suffix_tile() -> None:
    lax.fori_loop(0, blocks.suffix_branches // at_once, suffixes, None)

  def finish(i: Any, _: None) -> None:
    total = sum_ref[at(i)].sum(1, keepdims=True)
    lse = (max_ref[at(i)] + jnp.log2(total)) * math.log(2)
    out_ref[at(i)] = (acc_ref[at(i)] / total).astype(out_ref.dtype)
    lse_ref[pl.ds(i, 1), :] = lse.T[:1]

  lax.fori_loop(0, jnp.where(j == last, pieces, 0), finish, None)
