"""Paged attention: the kernel equals its definition, and that attention row by row.

The kernel runs in the TPU interpreter; races_found() is asserted after every run. Whatever no live
query sees is NaN: slots of pages, pages of nobody, scales.
"""

import logging
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.nn.paged_attention import paged_attention as blocked
from pallas_kernels import dispatch
from pallas_kernels.paged_attention import api, arg_specs, kernel_tpu, reference, tuning
from pallas_kernels.paged_attention.tuning import Blocks
from pallas_kernels.testing import races_found, tpu_interpreter

# Float32 sums in another order; bfloat16 rounds weights and results, 2^-9 of each at the most.
TOLERANCE = {'float32': 2e-6, 'int8': 2e-6, 'bfloat16': 1e-2}


def arguments(starts, counts, num_new=1, heads=4, groups=2, width=128, page=16, table_len=4,
              pages='float32', beside=False, seed=0):
  """Pages in random order, of which only what a live query sees is a number."""
  draw, rows = np.random.default_rng(seed), len(starts)
  pool = rows * table_len + 2
  table = draw.permutation(pool)[:rows * table_len].reshape(rows, table_len)
  shape = (groups, pool, page, 2 * width) if beside else (groups, pool, 2, page, width)
  seen = np.zeros((pool, page), bool)
  for row, start, count in zip(table, starts, counts, strict=True):
    for position in range(start + count if count else 0):
      seen[row[position // page], position % page] = True
  scales = None
  if pages == 'int8':
    data = jnp.asarray(draw.integers(-127, 128, shape), jnp.int8)
    scales = draw.uniform(1e-3, 0.02, (groups, pool, 2, page))
    scales = jnp.asarray(np.where(seen[:, None], scales, np.nan), jnp.float32)
  else:
    where = seen[..., None] if beside else seen[:, None, :, None]
    data = jnp.asarray(np.where(where, draw.normal(size=shape), np.nan), pages)
  q = jnp.asarray(draw.normal(size=(rows, num_new, heads, width)),
                  'float32' if pages == 'int8' else pages)
  numbers = (jnp.asarray(x, jnp.int32) for x in (table, starts, counts))
  return q, data, scales, *numbers


def row_by_row(q, pages, scales, table, starts, counts):
  """In float64, one query after another; padding is 0."""
  q, table, starts, counts = (np.asarray(x) for x in (np.float64(q), table, starts, counts))
  pages = np.float64(pages)
  if pages.ndim == 4:
    pages = np.stack(np.split(pages, 2, -1), 2)
  if scales is not None:
    pages = pages * np.float64(scales)[..., None]
  out, group = np.zeros(q.shape), q.shape[2] // pages.shape[0]
  for b, s, h in np.ndindex(q.shape[:3]):
    if s < counts[b]:
      end = starts[b] + s + 1
      k, v = pages[h // group, table[b]].swapaxes(0, 1).reshape(2, -1, q.shape[3])[:, :end]
      weights = np.exp(k @ q[b, s, h] / math.sqrt(q.shape[3]))
      out[b, s, h] = weights @ v / weights.sum()
  return out


def live(out, counts):
  """Results of tokens; those of padding as 0, if they are numbers."""
  assert np.isfinite(np.float32(out)).all()
  return np.where(np.arange(out.shape[1])[:, None, None] < np.asarray(counts)[:, None, None, None],
                  np.float32(out), 0)


def check_kernel(args, blocks, dtype, num_cores=1):
  got = kernel_tpu.paged_attention(*args, blocks=blocks, num_cores=num_cores,
                                   interpret=tpu_interpreter())
  assert got.shape == args[0].shape and got.dtype == args[0].dtype
  np.testing.assert_allclose(live(got, args[-1]), np.float32(reference.paged_attention(*args)),
                             atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
  assert (np.asarray(got)[np.asarray(args[-1]) == 0] == 0).all()
  assert not races_found()


# --- The kernel -------------------------------------------------------------------


def test_decoding_with_idle_rows():
  """A whole step and a part of the next, a step of two parts, a row that ends with a step; idle
  rows first, between and last; heads in two items, items on two cores."""
  args = arguments([0, 600, 0, 0, 299, 511, 3], [0, 1, 0, 1, 1, 1, 0], page=64, table_len=10)
  check_kernel(args, Blocks(512, 1, 1), 'float32', num_cores=2)


@pytest.mark.slow
def test_a_chunk_in_blocks_of_queries():
  """Whole steps, steps of several parts, diagonals; padding; a row of a block's first query."""
  args = arguments([700, 5, 250], [11, 6, 9], num_new=11, groups=1, page=64, table_len=12,
                   pages='bfloat16')
  check_kernel(args, Blocks(512, 8, 1), 'bfloat16')


def test_a_chunk_of_int8_pages():
  """Blocks of queries with a whole step and with a diagonal in two; padding, an empty block."""
  args = arguments([126, 3], [5, 2], num_new=5, heads=2, groups=1, page=128, table_len=2,
                   pages='int8')
  check_kernel(args, Blocks(128, 3, 1), 'int8')


@pytest.mark.slow
def test_keys_beside_values_in_narrow_heads():
  args = arguments([140, 0, 30], [1, 0, 1], width=64, table_len=9, beside=True)
  check_kernel(args, Blocks(128, 1, 2), 'float32')


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
  pick = lambda *values: data.draw(st.sampled_from(values))
  pages = pick('float32', 'bfloat16', 'int8')
  page = 128 if pages == 'int8' else pick(16, 32, 48, 128)
  groups, num_new, width = pick(1, 2, 4), pick(1, 2, 7), pick(64, 128)
  table_len = data.draw(st.integers(1, 700 // page))
  rows = data.draw(st.integers(1, 3))
  counts = [data.draw(st.integers(0, num_new)) for _ in range(rows)]
  starts = [data.draw(st.integers(0, page * table_len - max(count, 1))) for count in counts]
  args = arguments(starts, counts, num_new, groups * pick(1, 3), groups, width, page, table_len,
                   pages, beside=width < 128 or pick(False, True), seed=rows)
  check_kernel(args, Blocks(pick(128, 512), pick(1, 2, 7), math.gcd(groups, pick(1, 2, 4))),
               pages, pick(1, 2))


# --- The definitions --------------------------------------------------------------


@pytest.mark.parametrize('kind', [{}, {'beside': True}, {'pages': 'int8'}],
                         ids=['keys, then values', 'keys beside values', 'int8'])
def test_the_definition_is_attention_row_by_row(kind):
  args = arguments([13, 0, 0, 6], [3, 2, 0, 1], num_new=3, width=8, page=4, **kind)
  np.testing.assert_allclose(reference.paged_attention(*args), row_by_row(*args), atol=2e-6)


@pytest.mark.parametrize('pages', ['float32', 'int8'])
def test_the_definition_by_xla_equals_it(pages):
  args = arguments([13, 0, 0, 70], [3, 2, 0, 1], num_new=3, width=8, page=4, table_len=20,
                   pages=pages)
  zeros = [None if x is None else jnp.nan_to_num(x) for x in args[1:3]]
  got = jax.jit(blocked)(args[0], *zeros, *args[3:])
  np.testing.assert_allclose(live(got, args[-1]), row_by_row(*args), atol=2e-6)


# --- Dispatch, errors, cases --------------------------------------------------------


@pytest.mark.parametrize('shape, reason', [
    ({'head_dim': 64}, '64 channels a line'), ({'page_size': 8}, 'bfloat16 pages of 8'),
    ({'pages': 'int8', 'page_size': 32}, 'int8 pages of 32 tokens'), ({}, '')])
def test_what_the_kernel_takes(shape, reason):
  taken = tuning.Shape(1, 2, 2, 128, 16, 'bfloat16', False)
  if reason:
    with pytest.raises(NotImplementedError, match=reason):
      kernel_tpu.check(taken._replace(**shape))
  else:
    kernel_tpu.check(taken)
    kernel_tpu.check(taken._replace(head_dim=64, beside=True))


def test_what_it_does_not_take_falls_through(caplog):
  dispatch._say_once.cache_clear()
  caplog.set_level(logging.INFO, logger='pallas_kernels')
  args = arguments([13, 0, 0, 6], [3, 2, 0, 1], num_new=3, width=8, page=4)
  np.testing.assert_array_equal(api.paged_attention(*args, generation='v5e'),
                                reference.paged_attention(*args))
  with pytest.raises(NotImplementedError, match='8 channels'):
    api.check(*args[:2])
  assert len(caplog.messages) == 1 and '8 channels a line' in caplog.messages[0]


@pytest.mark.parametrize('change, message', [
    ({'q_BSHE': jnp.zeros((2, 1, 3, 16))}, '3 query heads do not share 2'),
    ({'q_BSHE': jnp.zeros((2, 4, 16))}, r'q must be f\[B, S, H, E\]'),
    ({'pages': jnp.zeros((2, 9, 3, 8, 16))}, r'pages must be \[K, N, 2, page, 16\]'),
    ({'pages': jnp.zeros((2, 9, 8, 16))}, r'or \[K, N, page, 32\]'),
    ({'pages': jnp.zeros((2, 9, 2, 8, 16), jnp.int8)}, 'int8 pages without scales'),
    ({'scales': jnp.zeros((2, 9, 2, 8))}, 'float32 pages with scales'),
    ({'pages': jnp.zeros((2, 9, 2, 8, 16), jnp.int8), 'scales': jnp.zeros((2, 9, 2, 4))},
     r'scales must be float32\[2, 9, 2, 8\]'),
    ({'table_BP': jnp.zeros((3, 6), jnp.int32)}, r'table must be \[2, P\]'),
    ({'starts_B': jnp.zeros(3, jnp.int32)}, r'starts must be \[2\]'),
    ({'counts_B': jnp.zeros(2)}, 'counts must be int32')])
def test_what_does_not_fit_is_said(change, message):
  names = 'q_BSHE', 'pages', 'scales', 'table_BP', 'starts_B', 'counts_B'
  args = dict(zip(names, arguments([3, 9], [1, 1], width=16, page=8), strict=True))
  with pytest.raises(ValueError, match=message):
    api.paged_attention(**(args | change), generation=None)


def test_cases_count_what_must_move():
  cases = arg_specs.cases('v5e')
  assert len({case.name for case in cases}) == len(cases)
  for case in cases:
    q, pages, *_ = case.call.args
    cells = pages.size * pages.dtype.itemsize * (
        1 + 2 * 4 / 256 if pages.dtype == jnp.int8 else 1)  # Two scales for 256 numbers.
    assert cells + 2 * q.size * 2 < case.minimum_bytes < 1.01 * cells + 2 * q.size * 2
    if q.shape[1] == 1:
      assert case.minimum_bytes < case.call.cost.hbm_bytes <= 1.01 * case.minimum_bytes
  jax.eval_shape(cases[0].call.run, *cases[0].call.args)


def test_trips_are_those_of_the_loops():
  """8192 tokens: steps of 2048 keys without a mask, or with one in the last, of 8 parts of 256;
  the last block of 64 queries ends with the step, the others leave 1, 2 and 3 pages of 64."""
  shape = tuning.Shape(1, 2, 5, 128, 64, 'bfloat16', False)
  assert arg_specs._trips(shape, Blocks(2048, 1, 2)) == (0, 0, 0, 0, 8, 0, 4, 0, 0, 0, 0, 0, 0)
  shape = shape._replace(num_new=256)
  assert arg_specs._trips(shape, Blocks(2048, 64, 2)) == (0, 0, 0, 0, 8, 0, 3, 8, 0, 32, 2, 8, 1)


def test_default_blocks_divide_what_they_cut():
  for num_new in (1, 5, 64, 256, 512):
    for groups, group in ((1, 1), (5, 4), (8, 5), (32, 1), (1, 71)):
      for pages in ('int8', 'bfloat16', 'float32'):
        shape = tuning.Shape(num_new, groups, group, 128, 128, pages, False)
        blocks = tuning.default(shape)
        assert groups % blocks.heads == 0 and 1 <= blocks.queries <= num_new
        rows = kernel_tpu.round_up(blocks.queries * group, 8) * blocks.heads
        assert rows <= 256 or blocks.heads == 1 and rows <= 2 * 256
        step, part = kernel_tpu.pages_of_step(shape, blocks, 64)
        assert step % part == 0 and part * shape.page_size % kernel_tpu.LANES == 0
