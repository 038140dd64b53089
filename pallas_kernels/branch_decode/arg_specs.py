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
  multiply_adds = {'bf16': 2 * H * R * (T + S) * E}
  least = tuning.num_bytes(*args, args[0], array(1, H, R, of='float32'))
  run = functools.partial(kernel_tpu.branch_decode, blocks=chosen)
  # The state's pieces begin and finish once in as many steps as the grid has for them.
  pieces = G * chosen.branches // kernel_tpu.lse_piece(chosen)
  pieces_per_step = -(-pieces // kernel_tpu.num_steps(shape, chosen))
  call = tuning.Call(run, args, tuning.Cost(
      multiply_adds, least + (R // chosen.branches - 1) * tuning.num_bytes(prefix, prefix)))
  xla = tuning.Call(reference.branch_decode, args, tuning.Cost(multiply_adds, least))
  return tuning.Case(
      kernel='branch_decode', variant='', activations='bf16',
      shape=f'T{T} R{R} S{S} {H}:{K}x{E}', call=call, minimum_bytes=least,
      dynamic_trips=(pieces_per_step, pieces_per_step),
      alternatives={'separate_prefixes': _separate_prefixes(shape, K), 'xla': xla})


def _separate_prefixes(shape: Shape, num_groups: int) -> tuning.Call:
  """What one gets without sharing: a cache per branch, through JAX's paged attention."""
  G, E, R, T, S, dtype = shape
  K, H = num_groups, num_groups * G
  pages = -(-(T + S) // PAGE)
  q = jax.ShapeDtypeStruct((R, H, E), jnp.dtype(dtype))
  cache = jax.ShapeDtypeStruct((K, R * pages, PAGE, E), jnp.dtype(dtype))
  lengths = jax.ShapeDtypeStruct((R,), jnp.int32)
  table = jax.ShapeDtypeStruct((R, pages), jnp.int32)
  run = functools.partial(paged_attention, pages_per_compute_block=pages // 3)
  return tuning.Call(run, (q, cache, cache, lengths, table), tuning.Cost(
      {'bf16': 2 * H * R * (T + S) * E}, tuning.num_bytes(q, cache, cache, lengths, table, q)))


def candidates(generation: Generation) -> dict[str, list[tuple[dict[str, int], tuning.Case]]]:
  """Per tuning key, block choices near the default and their cases."""
  del generation
  base = default(_DOCUMENT)
  choices = [base]
  return {_DOCUMENT.key: [(b._asdict(), _case(_DOCUMENT, 5, b)) for b in choices]}
