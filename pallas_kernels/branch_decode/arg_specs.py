"""The calls of branch decoding that are compiled, reported and tuned."""

import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.branch_decode import kernel_tpu, reference
from pallas_kernels.branch_decode.tuning import Blocks, Shape, blocks, default
from pallas_kernels.dispatch import Generation

PAGE = 128
# GQA and head width of BitNet b1.58 2B4T, one document of 4096 tokens; a small one for CI.
_DOCUMENT = Shape(num_queries=4, head_dim=128, num_branches=256, num_prefix=4096, num_slots=128,
                  dtype='bfloat16')
_SMALL = Shape(num_queries=4, head_dim=128, num_branches=16, num_prefix=512, num_slots=64,
               dtype='bfloat16')


def cases(generation: Generation) -> list[tuning.Case]:
  """Every branch at the end of the document, every suffix full: nothing is skipped."""
  return [_case(_DOCUMENT, 5, blocks(_DOCUMENT, generation)),
          _case(_SMALL, 2, blocks(_SMALL, generation))]


def _case(shape: Shape, num_groups: int, chosen: Blocks) -> tuning.Case:
  G, E, R, T, S, dtype = shape
  K, H = num_groups, num_groups * G
  def array(*dims: int, of: Any = dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.dtype(of))
  prefix, suffix, lengths = array(1, K, T, E), array(1, K, R, S, E), array(1, R, of='int32')
  args = (array(1, H, R, E), prefix, prefix, lengths, suffix, suffix, lengths)
  multiply_adds: dict[tuning.Operand, int] = {'bf16': 2 * H * R * (T + S) * E}
  lse = array(1, H, R, of='float32')
  least = tuning.num_bytes(*args, args[0], lse)
  # Besides: lengths in all lanes, written and read; the keys of each further query block; the
  # log-sum-exp written in the kernel's order and put into the caller's.
  lanes = array(R, kernel_tpu.LANES, of='int32')
  moved = (least + 4 * tuning.num_bytes(lanes) + 2 * tuning.num_bytes(lse)
           + (R // chosen.branches - 1) * tuning.num_bytes(prefix, prefix))
  run = functools.partial(kernel_tpu.branch_decode, blocks=chosen)
  # XLA keeps the prefix's scores in HBM: at the least they are written once and read once.
  scores = array(H, R, T, of='float32')
  xla = tuning.Call(reference.branch_decode, args,
                    tuning.Cost(multiply_adds, least + 2 * tuning.num_bytes(scores)))
  # The state's pieces begin and finish once in as many steps as the grid has for them.
  pieces = G * chosen.branches // kernel_tpu.lse_piece(chosen)
  pieces_per_step = -(-pieces // kernel_tpu.num_steps(shape, chosen))
  call = tuning.Call(run, args, tuning.Cost(multiply_adds, moved),
                     (pieces_per_step, pieces_per_step))
  return tuning.Case(
      kernel='branch_decode', variant='', activations='bf16',
      shape=f'T{T} R{R} S{S} {H}:{K}x{E}', call=call, minimum_bytes=least,
      alternatives={'separate_prefixes': _separate_prefixes(shape, K), 'xla': xla})


def _separate_prefixes(shape: Shape, num_groups: int) -> tuning.Call:
  """What one gets without sharing: a cache per branch, through JAX's paged attention.

  XLA's attention over f[R, T + S, K, E] reads the same bytes, which bound both, and writes
  its scores besides: this is the stronger of the two.
  """
  G, E, R, T, S, dtype = shape
  K, H = num_groups, num_groups * G
  pages = -(-(T + S) // PAGE)
  q = jax.ShapeDtypeStruct((R, H, E), jnp.dtype(dtype))
  cache = jax.ShapeDtypeStruct((K, R * pages, PAGE, E), jnp.dtype(dtype))
  lengths = jax.ShapeDtypeStruct((R,), jnp.int32)
  table = jax.ShapeDtypeStruct((R, pages), jnp.int32)
  at_once = max(n for n in range(1, 17) if pages % n == 0)
  run = functools.partial(paged_attention, pages_per_compute_block=at_once)
  read = 2 * K * R * (T + S) * E * jnp.dtype(dtype).itemsize  # of a last page, what is filled
  return tuning.Call(run, (q, cache, cache, lengths, table), tuning.Cost(
      {'bf16': 2 * H * R * (T + S) * E}, read + tuning.num_bytes(q, lengths, table, q)))


def candidates(generation: Generation) -> dict[str, list[tuple[dict[str, int], tuning.Case]]]:
  """Per tuning key, block choices and their cases."""
  del generation  # The same are worth a look everywhere.
  document = [Blocks(256, 128, 512, 32, 128), Blocks(256, 256, 512, 32, 128),
              Blocks(256, 128, 1024, 64, 128), Blocks(256, 256, 1024, 64, 128),
              Blocks(128, 128, 512, 16, 128), Blocks(128, 128, 1024, 32, 128)]
  small = [default(_SMALL), Blocks(16, 16, 256, 16, 64)]
  return {shape.key: [(b._asdict(), _case(shape, num_groups, b)) for b in choices]
          for shape, num_groups, choices in ((_DOCUMENT, 5, document), (_SMALL, 2, small))}
