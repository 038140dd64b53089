"""The shapes at which sparse decoding is compiled, reported and tuned.

A row of 256K tokens and 8 key/value heads takes 1 GiB of cache in bfloat16, 32 rows more than
most chips hold; the cases are one device's share under tensor parallelism of 4 (2 key/value
heads of 8, 8 query heads of 32), the same for the kernel and the dense alternative. Pages
are distinct: nothing is shared between rows.

How well copies of single pages use the HBM (8 KiB each at 16 tokens, 64 KiB at 128) is not in
a static floor: small pages are worse than theirs says.
"""

import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
import jax.numpy as jnp

from pallas_kernels.dispatch import Generation
from pallas_kernels.sparse_decode import api, tuning
from pallas_kernels.sparse_decode.reference import Selection
from pallas_kernels.tuning import Call, Case, Cost

PAGE_SIZES = (16, 32, 64, 128)
HEAD_DIM, GROUP = 128, 4
# The dense alternative's page table lies in scalar memory as a whole, which only large pages
# allow at this size; they also suit its copies best.
DENSE_PAGE, DENSE_PAGES_PER_STEP = 128, 16
BFLOAT16_BYTES = 2


def _array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _case(generation: Generation, page_size: int, rows: int, context: int, groups: int,
          active: float, choice: tuning.Blocks | None) -> Case:
  capacity, lists = context // page_size, rows * groups
  selection = Selection(active)
  choice = choice or tuning.blocks(generation, page_size)
  listed = selection.num_selected(capacity)
  per_step = min(max(1, choice.attended_keys // page_size), listed)
  fetched = -(-listed // per_step) * per_step
  descriptors = lists * capacity * 2 * HEAD_DIM
  heads = rows * groups * GROUP * HEAD_DIM
  page = 2 * page_size * HEAD_DIM
  small = 2 * heads * BFLOAT16_BYTES + 4 * rows * groups * GROUP
  least = (descriptors + lists * listed * page) * BFLOAT16_BYTES + small
  # Scores and lists pass through HBM once each way, the table is read twice a list.
  moved = ((descriptors + lists * fetched * page) * BFLOAT16_BYTES + small
           + 4 * lists * (2 * capacity + 4 * listed + 2 * capacity))
  macs = 8 * lists * 2 * HEAD_DIM * (capacity + fetched * page_size)
  run = functools.partial(api.sparse_decode, selection=selection, generation=generation,
                          blocks=choice)
  args = (_array((rows, groups * GROUP, HEAD_DIM)),
          _array((groups, rows * capacity, 2, page_size, HEAD_DIM)),
          _array((rows, groups, capacity, 2 * HEAD_DIM)),
          _array((rows, capacity), jnp.int32), _array((rows,), jnp.int32))
  return Case('sparse_decode', f'page {page_size}', 'bf16',
              f'{rows}x{context // 1024}K p={active} heads {groups * GROUP}/{groups}',
              Call(run, args, Cost({'bf16': macs}, moved)), least,
              {'dense_paged_attention': _dense(generation, rows, context, groups)})


def _dense(generation: Generation, rows: int, context: int, groups: int) -> Call:
  """JAX's paged attention over everything, with the grid whose every step is counted. Its
  issue cycles hold a branch that only the first step takes; its HBM cycles do not."""
  capacity = context // DENSE_PAGE
  run = functools.partial(paged_attention, inline_seq_dim=False,
                          megacore_mode='batch' if generation in ('v4', 'v5p') else None,
                          pages_per_compute_block=min(DENSE_PAGES_PER_STEP, capacity))
  pages = _array((groups, rows * capacity, DENSE_PAGE, HEAD_DIM))
  args = (_array((rows, groups * GROUP, HEAD_DIM)), pages, pages, _array((rows,), jnp.int32),
          _array((rows, capacity), jnp.int32))
  cells = 2 * rows * groups * context * HEAD_DIM
  small = 2 * rows * groups * GROUP * HEAD_DIM * BFLOAT16_BYTES
  return Call(run, args, Cost({'bf16': 8 * cells}, cells * BFLOAT16_BYTES + small))


def cases(generation: Generation, choice: tuning.Blocks | None = None) -> list[Case]:
  """256K and 4K tokens of context, by page size; all rows full."""
  return [_case(generation, page_size, rows, context, 2, 0.1, choice)
          for rows, context in ((32, 256 * 1024), (8, 4096)) for page_size in PAGE_SIZES]


def candidates(generation: Generation) -> dict[str, list[tuple[dict[str, int], Case]]]:
  """Per page size, the block sizes to choose from with the long case of each."""
  choices = [tuning.Blocks(scored, attended) for scored in (2048, 4096)
             for attended in (1024, 2048, 4096)]
  return {tuning.key(page_size): [
      (choice._asdict(), _case(generation, page_size, 32, 256 * 1024, 2, 0.1, choice))
      for choice in choices] for page_size in PAGE_SIZES}
