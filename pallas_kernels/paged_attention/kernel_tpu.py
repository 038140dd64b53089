"""Paged attention on a TPU: one kernel for decoding, drafts and chunks of a prompt.

An item of work is a block of a row's queries with some of its key/value heads. Its keys come in
steps of several pages: the pool stays in HBM, and each page of a step is one copy of all these
heads, on its way while the step before it is computed on; in an item's last step the pages of
the next item come. Only pages that a row has are copied. The softmax is online (2205.14135).

Queries of one key/value head lie side by side, query by query, as `rows` of a matrix. Keys that
every query of the block sees take the first of two loops, which masks nothing.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.paged_attention import tuning

Array = jax.Array
Ref = Any
LANES, SUBLANES = 128, 8
PART_KEYS = 256  # The fewest keys of a part of a step.
UNROLLED = 4  # Pages that a turn of the loop over copies takes.
LOG2_E = math.log2(math.e)


def round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def check(shape: tuning.Shape) -> None:
  """Whether the kernel takes a shape.

  Raises:
    NotImplementedError: it does not; says what it takes.
  """
  packing = 4 // jnp.dtype(shape.pages).itemsize
  lanes = (2 if shape.beside else 1) * shape.head_dim
  if lanes % LANES:
    raise NotImplementedError(f'pages with {lanes} channels a line, no multiple of {LANES}')
  if shape.page_size % (SUBLANES * packing):
    raise NotImplementedError(f'{shape.pages} pages of {shape.page_size} tokens, no multiple of '
                              f'{SUBLANES * packing}')
  # XLA keeps narrower scales transposed in HBM, and would copy all of them for the kernel.
  if shape.pages == 'int8' and shape.page_size % LANES:
    raise NotImplementedError(f'int8 pages of {shape.page_size} tokens, no multiple of {LANES}')


def paged_attention(q_BSHE: Array, pages: Array, scales: Array | None, table_BP: Array,
                    starts_B: Array, counts_B: Array, *, blocks: tuning.Blocks,
                    num_cores: int = 1, interpret: Any = False) -> Array:
  """`api.paged_attention` with given blocks, for shapes that `check` lets pass."""
  shape = tuning.shape_of(q_BSHE, pages)
  num_rows, num_new, num_heads, width = q_BSHE.shape
  heads = blocks.heads
  query_blocks, head_blocks = pl.cdiv(num_new, blocks.queries), shape.num_groups // heads
  rows = round_up(blocks.queries * shape.group, SUBLANES)
  if shape.beside:
    pages = pages[:, :, None]
  _, _, parts, page_size, lanes = pages.shape
  per_step, part = pages_of_step(shape, blocks, table_BP.shape[1])
  keys = table_BP.shape[1] * page_size
  # Keys beside values in one line of lanes are multiplied by queries beside zeros.
  line = lanes if width % LANES else width
  q = _lines(q_BSHE, shape, blocks, rows, line)
  items = num_rows * head_blocks * query_blocks
  cores = math.gcd(num_cores, items)
  on_core = items // cores
  layout = _Layout(query_blocks, head_blocks, heads, blocks.queries, shape.group, width,
                   part, scales is not None)

  def table(ahead: int) -> pl.BlockSpec:
    """Page numbers of this item's row, or of that of the core's next item."""
    def index(core: Array, j: Array, *_: Any) -> tuple[Array | int, ...]:
      return layout.place(core * on_core + jnp.minimum(j + ahead, on_core - 1))[0], 0, 0
    return pl.BlockSpec((None, 1, table_BP.shape[1]), index, memory_space=pltpu.SMEM)

  def index(core: Array, j: Array, *_: Any) -> tuple[Array | int, ...]:
    return *layout.place(core * on_core + j), 0, 0

  block = pl.BlockSpec((None, heads, None, rows, line), index)
  in_hbm = [pl.BlockSpec(memory_space=pl.ANY)] * (2 if layout.quantised else 1)
  state = heads * rows
  out = pl.pallas_call(
      functools.partial(_body, layout=layout),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(cores, on_core),
          in_specs=[table(0), table(1), block, *in_hbm], out_specs=block,
          scratch_shapes=[
              pltpu.VMEM((2, per_step, heads, parts, page_size, lanes), pages.dtype),
              # An unused scratch of one register, if there are no scales.
              pltpu.VMEM((2, per_step, heads, 2, page_size) if layout.quantised
                         else (SUBLANES, LANES), jnp.float32),
              pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), jnp.int32),
              pltpu.VMEM((state, LANES), jnp.float32), pltpu.VMEM((state, LANES), jnp.float32),
              pltpu.VMEM((state, line), jnp.float32)]),
      out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'),
                                           disable_bounds_checks=True),
      cost_estimate=_cost(q_BSHE, pages, scales, query_blocks * table_BP.size, keys),
      name='paged_attention', interpret=interpret,
  )(starts_B, counts_B, table_BP[:, None], table_BP[:, None], q, pages,
    *([scales] if layout.quantised else []))
  out = out[:, :, :, :blocks.queries * shape.group, line - width:]
  out = out.reshape(num_rows, shape.num_groups, -1, shape.group, width)[:, :, :num_new]
  return out.transpose(0, 2, 1, 3, 4).reshape(q_BSHE.shape)


def _cost(q_BSHE: Array, pages: Array, scales: Array | None, pages_read: int, keys: int
          ) -> pl.CostEstimate:
  """The work if every row fills its table; of the pool no more than that many pages are read."""
  pools = [pages] if scales is None else [pages, scales]
  page_bytes = sum(x.size // x.shape[1] * x.dtype.itemsize for x in pools)
  return pl.CostEstimate(
      flops=4 * q_BSHE.size * keys, transcendentals=q_BSHE.size // q_BSHE.shape[-1] * keys,
      bytes_accessed=pages_read * page_bytes + 2 * q_BSHE.size * q_BSHE.dtype.itemsize)


def pages_of_step(shape: tuning.Shape, blocks: tuning.Blocks, table_len: int) -> tuple[int, int]:
  """Pages of a step, and of a part of it: a row that ends early in a step pays for some parts.

  Both hold whole lanes of scores, and parts divide the step."""
  whole = LANES // math.gcd(shape.page_size, LANES)
  per_step = round_up(max(1, min(blocks.keys // shape.page_size, table_len)), whole)
  part = next(n for n in range(whole, per_step + 1, whole) if per_step % n == 0
              and (n * shape.page_size >= PART_KEYS or n == per_step))
  return per_step, part


class _Layout(NamedTuple):
  """How work is cut into items."""

  query_blocks: int
  head_blocks: int
  heads: int  # key/value heads of an item
  queries: int  # new tokens of an item
  group: int  # query heads of a key/value head
  width: int  # channels of a head
  part: int  # pages of a part of a masked step
  quantised: bool

  def place(self, item: Array) -> tuple[Array, Array, Array]:
    """An item's row, block of heads and block of queries."""
    of_row = self.head_blocks * self.query_blocks
    rest = jax.lax.rem(item, of_row)
    return (jax.lax.div(item, of_row), jax.lax.div(rest, self.query_blocks),
            jax.lax.rem(rest, self.query_blocks))


class _Extent(NamedTuple):
  """Which keys an item needs."""

  head: Array  # the first of its key/value heads
  first: Array  # position of its first query
  num_keys: Array  # up to the position of its last query; 0 without queries
  num_pages: Array


def _lines(q_BSHE: Array, shape: tuning.Shape, blocks: tuning.Blocks, rows: int,
           line: int) -> Array:
  """Queries as the kernel reads them: f[B, K, blocks of queries, rows, line]."""
  num_rows, num_new, _, width = q_BSHE.shape
  q = jnp.pad(q_BSHE, ((0, 0), (0, -num_new % blocks.queries), (0, 0), (0, line - width)))
  q = q.reshape(num_rows, -1, blocks.queries, shape.num_groups, shape.group, line)
  q = q.transpose(0, 3, 1, 2, 4, 5).reshape(num_rows, shape.num_groups, q.shape[1], -1, line)
  return jnp.pad(q, ((0, 0),) * 3 + ((0, rows - q.shape[3]), (0, 0)))


def _iota(shape: tuple[int, ...], axis: int) -> Array:
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _dot(x: Array, y: Array, contracted: int) -> Array:
  """x y, or x yᵀ where dimension 1 of y is contracted, in float32."""
  precision = 'highest' if y.dtype == jnp.float32 else None
  return jax.lax.dot_general(x, y, (((1,), (contracted,)), ((), ())), precision=precision,
                             preferred_element_type=jnp.float32)


def _lane_sums(x: Array) -> Array:
  """[rows, n · 128] → [rows, 128], whose lanes sum to the row's sum."""
  return functools.reduce(jnp.add, (x[:, i:i + LANES] for i in range(0, x.shape[1], LANES)))


# --- The kernel -------------------------------------------------------------------


def _body(starts_ref: Ref, counts_ref: Ref, table_ref: Ref, next_table_ref: Ref, q_ref: Ref,
          pages_ref: Ref, *refs: Ref, layout: _Layout) -> None:
  scales_ref: Ref = refs[0] if layout.quantised else None
  (out_ref, buffer_ref, scale_buffer_ref, arrived, parity_ref, highest_ref, sum_ref,
   acc_ref) = refs[-8:]
  _, per_step, heads, _, page_size, _ = buffer_ref.shape
  j, on_core = pl.program_id(1), pl.num_programs(1)
  item = pl.program_id(0) * on_core + j
  part_keys = layout.part * page_size
  step_keys, capacity = per_step * page_size, table_ref.shape[1] * page_size

  def extent(item: Array) -> _Extent:
    row, head, block = layout.place(item)
    begin = block * layout.queries
    mine = jnp.clip(counts_ref[row] - begin, 0, layout.queries)
    first = starts_ref[row] + begin
    num_keys = jnp.where(mine > 0, jnp.minimum(first + mine, capacity), 0)
    return _Extent(head * heads, first, num_keys,
                   jax.lax.div(num_keys + page_size - 1, page_size))

  this = extent(item)
  following = extent(jnp.where(j + 1 < on_core, item + 1, item))
  pages_to_come = jnp.where(j + 1 < on_core, following.num_pages, 0)
  steps = jax.lax.div(this.num_pages + per_step - 1, per_step)

  def copies(head: Array | int, slot: Array) -> Callable[[Array | int, Array | int], list[Any]]:
    """What copies page `page` to place n. Addresses are made in two steps, which leaves less to
    do for each page: scalar work is what bounds few heads."""
    pairs = [(pages_ref.at[pl.ds(head, heads)], buffer_ref.at[slot])]
    if layout.quantised:
      pairs.append((scales_ref.at[pl.ds(head, heads)], scale_buffer_ref.at[slot]))
    return lambda page, n: [
        pltpu.make_async_copy(source.at[:, page], target.at[n], arrived.at[slot])
        for source, target in pairs]

  def fetch(head: Array, num_pages: Array, slot: Array, page_of: Callable[[Array], Array]
            ) -> None:
    """Starts the copies of the first so many pages, of those that a step takes."""
    copy_page = copies(head, slot)
    num_pages = jnp.minimum(num_pages, per_step)

    def start(n: Array, _: None) -> None:
      for copy in copy_page(page_of(n), n):
        copy.start()

    def start_some(i: Array, _: None) -> None:
      for n in range(UNROLLED):
        start(i * UNROLLED + n, None)

    unrolled = jax.lax.div(num_pages, UNROLLED)
    jax.lax.fori_loop(0, unrolled, start_some, None)
    jax.lax.fori_loop(unrolled * UNROLLED, num_pages, start, None)

  def fetch_next(step: Array, slot: Array) -> None:
    """The step after this one, which may be the next item's first."""
    own, begin = step + 1 < steps, (step + 1) * per_step
    last = table_ref.shape[1] - 1  # Of both tables an entry is read, and one is taken.
    fetch(jnp.where(own, this.head, following.head),
          jnp.where(own, this.num_pages - begin, pages_to_come), slot,
          lambda n: jnp.where(own, table_ref[0, jnp.minimum(begin + n, last)],
                            next_table_ref[0, n]))

  def wait_for_all(slot: Array) -> None:
    """One wait for the bytes of all the step's copies."""
    for ref in (buffer_ref, scale_buffer_ref)[:1 + layout.quantised]:
      pltpu.make_async_copy(ref.at[slot], ref.at[slot], arrived.at[slot]).wait()

  def wait_for(num_pages: Array, slot: Array) -> None:
    copy_page = copies(0, slot)

    def wait(n: Array, _: None) -> None:
      for copy in copy_page(0, n):
        copy.wait()
    jax.lax.fori_loop(0, jnp.minimum(num_pages, per_step), wait, None)

  def clear(begin: Array, end: Array, num_keys: Array, slot: Array) -> None:
    """Zeroes the values beyond the last key in some pages, which may hold anything: their weights
    are zero, but zero times NaN is NaN."""
    def clear_page(n: Array, _: None) -> None:
      for h in range(heads):
        values = _values_of(buffer_ref, layout.width, slot, n, h)
        live = n * page_size + _iota(values.shape, 0) < num_keys
        # Narrow types have no comparison of their own.
        values[...] = jnp.where(live, values[...].astype(jnp.float32), 0).astype(values.dtype)
    jax.lax.fori_loop(begin, end, clear_page, None)

  def attend(slot: Array, begin: Array | int, num_pages: int, seen: Array | None) -> None:
    _attend(q_ref, buffer_ref, scale_buffer_ref, highest_ref, sum_ref, acc_ref, layout,
            slot, begin, num_pages, seen)

  @pl.when(j == 0)
  def fetch_first() -> None:
    parity_ref[0] = 0
    fetch(this.head, this.num_pages, jnp.int32(0), lambda n: table_ref[0, n])

  highest_ref[...] = jnp.full(highest_ref.shape, -jnp.inf)
  sum_ref[...] = jnp.zeros(sum_ref.shape)
  acc_ref[...] = jnp.zeros(acc_ref.shape)
  parity = parity_ref[0]

  @pl.when(steps == 0)
  def fetch_for_the_next_item() -> None:
    fetch(following.head, pages_to_come, parity, lambda n: next_table_ref[0, n])

  def whole_step(step: Array, _: None) -> None:
    slot = (parity + step) & 1
    fetch_next(step, 1 - slot)
    wait_for_all(slot)
    attend(slot, 0, per_step, None)

  def masked_step(step: Array, _: None) -> None:
    slot = (parity + step) & 1
    fetch_next(step, 1 - slot)
    wait_for(this.num_pages - step * per_step, slot)
    keys_here = jnp.minimum(this.num_keys - step * step_keys, step_keys)
    parts = jax.lax.div(keys_here + part_keys - 1, part_keys)
    clear(jax.lax.div(keys_here, page_size), parts * layout.part, keys_here, slot)
    rows = q_ref.shape[1]
    query = this.first + jax.lax.div(_iota((rows, 1), 0), layout.group)
    last = jnp.minimum(query, this.num_keys - 1) - step * step_keys
    last = jnp.concatenate([last] * heads, 0)

    def masked_part(part: Array, _: None) -> None:
      keys = part * part_keys + _iota((heads * rows, part_keys), 1)
      attend(slot, part * layout.part, layout.part, keys <= last)

    jax.lax.fori_loop(0, parts, masked_part, None)

  seen_by_all = jnp.minimum(jax.lax.div(this.first + 1, step_keys), steps)
  jax.lax.fori_loop(0, seen_by_all, whole_step, None)
  jax.lax.fori_loop(seen_by_all, steps, masked_step, None)
  parity_ref[0] = (parity + steps) & 1
  total = jnp.sum(sum_ref[...], 1, keepdims=True)
  out = acc_ref[...] / jnp.where(total > 0, total, 1)
  out_ref[...] = out.reshape(out_ref.shape).astype(out_ref.dtype)


def _values_of(buffer_ref: Ref, width: int, slot: Array, page: Any, head: int) -> Ref:
  """Where the values of a head lie: part 1 of a page, or in the same lines beside the keys."""
  _, _, _, parts, _, lanes = buffer_ref.shape
  if parts == 2:
    return buffer_ref.at[slot, page, head, 1]
  return buffer_ref.at[slot, page, head, 0, :, pl.ds(lanes - max(width, LANES), max(width, LANES))]


def _attend(q_ref: Ref, buffer_ref: Ref, scale_buffer_ref: Ref, highest_ref: Ref, sum_ref: Ref,
            acc_ref: Ref, layout: _Layout, slot: Array, begin: Array | int, num_pages: int,
            seen: Array | None) -> None:
  """Some pages of the buffer, in the online softmax of all heads together."""
  heads, rows, dtype = layout.heads, q_ref.shape[1], q_ref.dtype
  pages = pl.ds(begin, num_pages)

  def scale_row(head: int, part: int) -> Array:
    """f32[1, keys]."""
    return jnp.concatenate([scale_buffer_ref[slot, begin + n, head, pl.ds(part, 1)]
                            for n in range(num_pages)], 1)

  products = []
  for h in range(heads):
    keys = buffer_ref[slot, pages, h, 0, :, pl.ds(0, q_ref.shape[2])]
    product = _dot(q_ref[h], keys.reshape(-1, q_ref.shape[2]).astype(dtype), 1)
    factor = LOG2_E / math.sqrt(layout.width)  # exp(x) is 2^(x log₂ e).
    products.append(product * (factor * scale_row(h, 0) if layout.quantised else factor))
  scores = jnp.concatenate(products, 0)
  if seen is not None:
    scores = jnp.where(seen, scores, -jnp.inf)
  before = highest_ref[:, :1]
  highest = jnp.maximum(before, jnp.max(scores, 1, keepdims=True))
  decay = jnp.exp2(before - highest)
  weights = jnp.exp2(scores - highest)
  highest_ref[...] = jnp.broadcast_to(highest, highest_ref.shape)
  sum_ref[...] = sum_ref[...] * decay + _lane_sums(weights)
  outs = []
  for h in range(heads):
    values = _values_of(buffer_ref, layout.width, slot, pages, h)[...]
    weight = weights[h * rows:(h + 1) * rows]
    if layout.quantised:
      weight = weight * scale_row(h, 1)
      if seen is not None:  # A scale that was never written may be NaN.
        weight = jnp.where(seen[:rows], weight, 0)
    outs.append(_dot(weight.astype(dtype), values.reshape(-1, values.shape[-1]).astype(dtype), 0))
  acc_ref[...] = acc_ref[...] * decay + jnp.concatenate(outs, 0)
