"""The calls of paged attention that are compiled, reported and tuned.

Every row is at the end of 8192 tokens and pages are distinct: nothing is shared. A pool of one
layer is taken; where a layer begins is a number in the table and changes nothing. Bytes in HBM
are those of whole pages, whose copies of 64 tokens and more are long enough to stream.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as jax_paged
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.dispatch import Generation
from pallas_kernels.paged_attention import kernel_tpu
from pallas_kernels.paged_attention.tuning import Blocks, Shape, blocks, default

CONTEXT = 8192
# JAX's kernels: pages, keys and queries of a step that suit them best.
THEIR_PAGE, THEIR_KEYS, THEIR_QUERIES = 128, 1024, 8


class _Heads(NamedTuple):
  name: str
  num_heads: int
  num_groups: int
  width: int

  def __str__(self) -> str:
    return f'{self.num_heads}:{self.num_groups}x{self.width}'


BITNET = _Heads('2B4T', 20, 5, 128)
QWEN_32B = _Heads('32B tensor=4', 10, 2, 128)  # a chip's share of 40:8
SMALL = _Heads('small heads', 14, 2, 64)  # of Qwen 0.5B; keys beside values


def _array(*shape: int, of: Any = 'bfloat16') -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.dtype(of))


def _shape(heads: _Heads, num_new: int, page: int, dtype: str) -> Shape:
  return Shape(num_new, heads.num_groups, heads.num_heads // heads.num_groups, heads.width, page,
               dtype, beside=heads.width < kernel_tpu.LANES)


def _case(generation: Generation, heads: _Heads, rows: int, num_new: int, page: int, dtype: str,
          choice: Blocks | None = None) -> tuning.Case:
  shape = _shape(heads, num_new, page, dtype)
  choice = choice or blocks(shape, generation)
  per_row, int8 = CONTEXT // page, dtype == 'int8'
  of_page = (page, 2 * heads.width) if shape.beside else (2, page, heads.width)
  num_pages = rows * per_row
  q = _array(rows, num_new, heads.num_heads, heads.width)
  pages = _array(heads.num_groups, num_pages, *of_page, of=dtype)
  scales = _array(heads.num_groups, num_pages, 2, page, of='float32') if int8 else None
  table, numbers = _array(rows, per_row, of='int32'), _array(rows, of='int32')
  kernel = functools.partial(kernel_tpu.paged_attention, blocks=choice,
                             num_cores=2 if generation in ('v4', 'v5p') else 1)
  args = (q, pages, *([scales] if int8 else []), table, numbers, numbers)
  run = kernel if int8 else lambda q, pages, *rest: kernel(q, pages, None, *rest)
  least = tuning.num_bytes(q, *args)
  blocks_of_queries = -(-num_new // choice.queries)
  items = rows * blocks_of_queries * (heads.num_groups // choice.heads)
  lines = _array(items * choice.heads, kernel_tpu.round_up(choice.queries * shape.group, 8),
                 of_page[-1])
  # Besides: queries and results as the kernel has them, written and read; each item's page
  # numbers and the next one's; the pages once more for each further block of queries.
  moved = (least + 4 * tuning.num_bytes(lines) + items * 2 * 4 * per_row
           + (blocks_of_queries - 1) * tuning.num_bytes(*args[1:-3]))
  cost = tuning.Cost(_multiply_adds(rows, num_new, heads), moved)
  return tuning.Case(
      'paged_attention', f'{"decode" if num_new == 1 else "prefill"} {heads.name}',
      'int8' if int8 else 'bf16', f'{rows}x{num_new} {heads} page {page}',
      tuning.Call(run, args, cost, _trips(shape, choice)), least,
      {} if int8 or shape.beside else _jax_kernels(generation, heads, rows, num_new, cost))


def _multiply_adds(rows: int, num_new: int, heads: _Heads) -> dict[tuning.Operand, int]:
  return {'bf16': 2 * rows * heads.num_heads * heads.width
                  * (num_new * CONTEXT - num_new * (num_new - 1) // 2)}


def _trips(shape: Shape, choice: Blocks) -> tuple[int, ...]:
  """Trips of the kernel's loops as they end, with the mean of the blocks of queries rounded up.

  The first copies of all are one of many items, and no row is idle.
  """
  per_step, part = kernel_tpu.pages_of_step(shape, choice, CONTEXT // shape.page_size)
  step_keys, part_keys = per_step * shape.page_size, part * shape.page_size
  starts = range(CONTEXT - shape.num_new, CONTEXT, choice.queries)
  whole, masked, parts, cleared = 0, 0, 0, 0
  for start in starts:
    end = min(start + choice.queries, CONTEXT)
    seen_by_all = min((start + 1) // step_keys, -(-end // step_keys))
    whole, masked = whole + seen_by_all, masked + -(-end // step_keys) - seen_by_all
    keys = end - (-(-end // step_keys) - 1) * step_keys
    if end % step_keys or start + 1 < end // step_keys * step_keys:
      parts += -(-keys // part_keys)
      cleared += -(-keys // part_keys) * part - keys // shape.page_size
  fetch = divmod(per_step, kernel_tpu.UNROLLED)
  mean = lambda n: -(-n // len(starts))
  in_masked = (*fetch, per_step, mean(cleared), mean(parts)) if masked else (0,) * 5
  return (0, 0, 0, 0, *fetch, mean(whole), *in_masked, mean(masked))


def _jax_kernels(generation: Generation, heads: _Heads, rows: int, num_new: int,
                 cost: tuning.Cost) -> dict[str, tuning.Call]:
  """JAX's own kernels where they take the shape, each with the pool that it wants: keys and
  values apart, or all heads inside a page."""
  per_row = CONTEXT // THEIR_PAGE
  table, lengths = _array(rows, per_row, of='int32'), _array(rows, of='int32')
  width = (THEIR_PAGE, heads.width)
  calls = {}
  if num_new == 1:
    run = functools.partial(jax_paged, inline_seq_dim=False,
                            megacore_mode='batch' if generation in ('v4', 'v5p') else None,
                            pages_per_compute_block=THEIR_KEYS // THEIR_PAGE)
    half = _array(heads.num_groups, rows * per_row, *width)
    calls['jax_paged_attention'] = tuning.Call(
        run, (_array(rows, heads.num_heads, heads.width), half, half, lengths, table), cost)
  # It refuses 2 · 5 heads in a page of bfloat16, and is for chips of one core.
  if heads.num_groups & (heads.num_groups - 1) == 0 and generation not in ('v4', 'v5p'):
    run = functools.partial(ragged_paged_attention, sm_scale=heads.width**-0.5,
                            num_kv_pages_per_block=THEIR_KEYS // THEIR_PAGE,
                            num_queries_per_block=THEIR_QUERIES)
    q = _array(rows * num_new, heads.num_heads, heads.width)
    pool = _array(rows * per_row, THEIR_PAGE, 2 * heads.num_groups, heads.width)
    sequences = THEIR_QUERIES if num_new == 1 else 1  # of a block of queries
    calls['jax_ragged_paged_attention'] = tuning.Call(
        run, (q, pool, lengths, table, _array(rows + 1, of='int32'), _array(1, of='int32')),
        cost, (CONTEXT // THEIR_KEYS, sequences))
  return calls


def cases(generation: Generation) -> list[tuning.Case]:
  """Decoding with 32 and 256 slots, and a chunk of a prompt."""
  case = functools.partial(_case, generation)
  return [case(BITNET, 32, 1, 64, 'bfloat16'), case(BITNET, 256, 1, 64, 'bfloat16'),
          case(BITNET, 32, 1, 16, 'bfloat16'),
          case(BITNET, 32, 1, 128, 'int8'), case(BITNET, 256, 1, 128, 'int8'),
          case(QWEN_32B, 32, 1, 64, 'bfloat16'), case(QWEN_32B, 256, 1, 64, 'bfloat16'),
          case(QWEN_32B, 32, 1, 128, 'int8'), case(QWEN_32B, 256, 1, 128, 'int8'),
          case(SMALL, 32, 1, 64, 'bfloat16'),
          case(BITNET, 1, 256, 64, 'bfloat16'), case(BITNET, 1, 256, 128, 'int8'),
          case(QWEN_32B, 1, 256, 64, 'bfloat16')]


def candidates(generation: Generation) -> dict[str, list[tuple[dict[str, int], tuning.Case]]]:
  """Per tuning key, block choices and their cases: chunks of a prompt alone.

  Decoding is bound by memory with the default; larger steps would have fewer cycles that
  nobody waits for, and cost rows whose context is shorter than a step."""
  found: dict[str, list[tuple[dict[str, int], tuning.Case]]] = {}
  for heads, page, dtype in ((BITNET, 64, 'bfloat16'), (BITNET, 128, 'int8'),
                             (QWEN_32B, 64, 'bfloat16')):
    shape = _shape(heads, 256, page, dtype)
    base = default(shape)
    choices = [base, base._replace(keys=512), base._replace(keys=2048),
               base._replace(queries=2 * base.queries),
               base._replace(keys=2048, queries=base.queries // 2)]
    found[shape.key] = [(choice._asdict(), _case(generation, heads, 1, 256, page, dtype, choice))
                        for choice in choices]
  return found
