"""Sparse decoding: the kernels equal their definitions, and those what the paper says.

The kernels run in the TPU interpreter; races_found() is asserted after every one.
"""

from fractions import Fraction
import functools
import logging
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.sparse_decode import DENSE, Selection, api, arg_specs, kernel_tpu, reference
from pallas_kernels.testing import races_found, tpu_interpreter

E = 128
SHORT = settings(max_examples=4, deadline=None, derandomize=True)
PLAIN = settings(max_examples=12, deadline=None, derandomize=True)
# One float32 sum of E (or of the selected keys) in another order; bfloat16 adds the rounding
# of the weights, of relative size 2^-9 each.
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2}


def normal(seed, *shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def cache(seed, lengths, page_size, capacity, num_groups=2, dtype=jnp.float32, head_dim=E):
  """Pages of all rows in random order among some that no row uses, and their descriptors."""
  rows = len(lengths)
  num_pages = rows * capacity + 3
  table = np.random.default_rng(seed).permutation(num_pages)[:rows * capacity]
  table = jnp.asarray(table.reshape(rows, capacity), jnp.int32)
  kv = normal(seed, num_groups, num_pages, 2, page_size, head_dim, dtype=dtype)
  lengths = jnp.asarray(lengths, jnp.int32)
  every = jnp.broadcast_to(jnp.arange(capacity), (rows, capacity))
  return kv, reference.describe_blocks(kv, every, table, lengths), table, lengths


def dense(q, kv, table, lengths):
  """Attention over all tokens, row by row and head by head in float64."""
  rows, heads, head_dim = q.shape
  groups = kv.shape[0]
  out, lse = np.zeros(q.shape), np.full((rows, heads), -np.inf)
  for b in range(rows):
    length = int(lengths[b])
    for h in range(heads if length else 0):
      pages = np.asarray(kv, np.float64)[h * groups // heads, np.asarray(table[b])]
      k, v = (pages[:, i].reshape(-1, head_dim)[:length] for i in (0, 1))
      logits = k @ np.asarray(q[b, h], np.float64) / math.sqrt(head_dim)
      lse[b, h] = np.logaddexp.reduce(logits)
      out[b, h] = np.exp(logits - lse[b, h]) @ v
  return out, lse


def close(got, want, dtype):
  for x, y in zip(got, want):
    np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=TOLERANCE[dtype],
                               atol=TOLERANCE[dtype])


# --- The kernels ------------------------------------------------------------------


@SHORT
@given(st.integers(0, 99), st.integers(1, 3), st.sampled_from([(1, 1), (2, 4), (3, 2)]),
       st.sampled_from([1, 5, 128, 200, 300]), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_scores_equal_the_definition(seed, rows, groups, capacity, dtype):
  num_groups, group = groups
  q = normal(seed, rows, num_groups * group, E, dtype=dtype)
  bounds = normal(seed + 1, rows, num_groups, capacity, 2 * E, dtype=dtype)
  got = kernel_tpu.block_scores(q, bounds, scored_blocks=128, interpret=tpu_interpreter())
  # Both sum products of the same rounded numbers in float32.
  np.testing.assert_allclose(got, reference.block_scores(q, bounds), rtol=2e-5, atol=2e-4)
  assert not races_found()


@pytest.mark.parametrize('layer', [0, 2])
def test_scores_of_one_of_several_layers(layer):
  q, bounds = normal(0, 2, 4, E), normal(1, 3, 2, 2, 130, 2 * E)
  layer = jnp.int32(layer)
  got = kernel_tpu.block_scores(q, bounds, layer, scored_blocks=128, interpret=tpu_interpreter())
  want = kernel_tpu.block_scores(q, bounds[layer], scored_blocks=128, interpret=tpu_interpreter())
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(reference.block_scores(q, bounds, layer),
                                reference.block_scores(q, bounds[layer]))
  assert not races_found()


@settings(SHORT, max_examples=5)
@given(st.data())
def test_selection_equals_the_definition_bit_for_bit(data):
  rows, groups = data.draw(st.sampled_from([(1, 1), (3, 1), (2, 2), (8, 1)]))
  capacity = data.draw(st.sampled_from([1, 7, 128, 300]))
  page_size = 16
  lengths = data.draw(st.lists(st.integers(0, capacity * page_size), min_size=rows,
                               max_size=rows))
  selection = data.draw(st.sampled_from([Selection(0.1, 2), Selection(0.3, 3, 0), DENSE,
                                         Selection(0.05, 16, 2), Selection(0.6, 1)]))
  values = np.array([-np.inf, -3.5, -1e-30, -0.0, 0.0, 1e-30, 0.25, 7, 7, 3e38, np.inf])
  seed = data.draw(st.integers(0, 99))
  scores = np.random.default_rng(seed).choice(values, (rows, groups, capacity))
  scores = jnp.asarray(scores, jnp.float32)
  arguments = scores, jnp.asarray(lengths, jnp.int32), page_size, selection
  got = kernel_tpu.select_blocks(*arguments, interpret=tpu_interpreter())
  for x, y in zip(got, reference.select_blocks(*arguments)):
    np.testing.assert_array_equal(x, y)
  assert not races_found()


@SHORT
@given(st.data())
def test_attention_equals_the_definition(data):
  page_size, capacity = data.draw(st.sampled_from([(16, 6), (16, 5), (32, 3), (64, 2)]))
  dtype = data.draw(st.sampled_from([jnp.float32, jnp.bfloat16]))
  lengths = data.draw(st.lists(st.integers(0, capacity * page_size), min_size=1, max_size=3))
  num_groups, group = data.draw(st.sampled_from([(1, 1), (2, 4), (1, 9)]))
  kv, _, table, lengths = cache(data.draw(st.integers(0, 99)), lengths, page_size, capacity,
                                num_groups, dtype)
  if data.draw(st.booleans()):
    table = jnp.broadcast_to(table[:1], table.shape)  # Rows may share their pages.
  q = normal(5, len(lengths), num_groups * group, E, dtype=dtype)
  scores = normal(6, len(lengths), num_groups, capacity)
  selection = Selection(data.draw(st.sampled_from([0.3, 0.7, 1])), 2,
                        data.draw(st.integers(0, 1)))
  blocks, counts = reference.select_blocks(scores, lengths, page_size, selection)
  arguments = q, kv, blocks, counts, table, lengths
  got = kernel_tpu.sparse_attention(*arguments, attended_keys=data.draw(
      st.sampled_from([16, 64, 1024])), num_cores=data.draw(st.integers(1, 2)),
      interpret=tpu_interpreter())
  close(got, reference.sparse_attention(*arguments), dtype)
  assert not races_found()


@pytest.mark.parametrize('lengths, selection', [
    pytest.param([55], DENSE, marks=pytest.mark.slow), ([96, 0, 33], Selection(0.3, 2))])
def test_a_step_of_kernels_equals_dense_over_what_it_selects(lengths, selection):
  kv, bounds, table, lengths = cache(3, lengths, 16, 6)
  q = normal(4, len(lengths), 8, E)
  interpret = tpu_interpreter()
  scores = kernel_tpu.block_scores(q, bounds, scored_blocks=128, interpret=interpret)
  blocks, counts = kernel_tpu.select_blocks(scores, lengths, 16, selection, interpret=interpret)
  chosen = np.asarray(blocks)
  # Pages that are not selected may hold anything: they are never looked at.
  seen = np.zeros(kv.shape[:2], bool)
  for b, k, n in np.ndindex(chosen.shape):
    seen[k, table[b, chosen[b, k, n]]] |= bool(counts[b])
  poisoned = jnp.where(jnp.asarray(seen)[..., None, None, None], kv, jnp.nan)
  got = kernel_tpu.sparse_attention(q, poisoned, blocks, counts, table, lengths,
                                    attended_keys=32, interpret=interpret)
  assert not races_found()
  close(got, reference.sparse_attention(q, kv, blocks, counts, table, lengths), jnp.float32)
  if selection == DENSE:
    close(got, dense(q, kv, table, lengths), jnp.float32)
  else:
    assert not seen.all()


# --- The definitions --------------------------------------------------------------


@PLAIN
@given(st.lists(st.integers(0, 48), min_size=1, max_size=3), st.integers(0, 99))
def test_all_blocks_are_dense_attention(lengths, seed):
  kv, bounds, table, lengths = cache(seed, lengths, 8, 6, head_dim=8)
  q = normal(seed, len(lengths), 4, 8)
  got = api.sparse_decode(q, kv, bounds, table, lengths, selection=DENSE, generation=None)
  close(got, dense(q, kv, table, lengths), jnp.float32)


@PLAIN
@given(st.integers(0, 99), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_a_blocks_score_bounds_its_keys_where_a_group_is_one_head(seed, dtype):
  kv, bounds, table, lengths = cache(seed, [48, 35], 8, 6, dtype=dtype, head_dim=16)
  q = normal(seed, 2, 2, 16, dtype=dtype)
  scores = np.asarray(reference.block_scores(q, bounds))
  keys = np.float32(kv[:, table, 0])  # [K, B, P, page, E]
  products = np.einsum('bke,kbpse->bkps', np.float32(q), keys)
  within = np.arange(48).reshape(6, 8) < np.asarray(lengths)[:, None, None, None]
  # 16 products summed in two orders.
  assert (products <= scores[..., None] + 1e-4)[np.broadcast_to(within, products.shape)].all()


@pytest.mark.parametrize('select', [
    reference.select_blocks,
    functools.partial(kernel_tpu.select_blocks, interpret=tpu_interpreter())],
    ids=['reference', 'kernel'])
def test_of_equal_scores_the_first_and_the_local_block_win(select):
  """Both zeros are equal, too."""
  scores = jnp.broadcast_to(jnp.where(jnp.arange(40) % 2, 0.0, -0.0), (4, 1, 40))
  lengths = jnp.asarray([1, 16 * 4, 16 * 4 + 1, 16 * 30])
  blocks, counts = select(scores, lengths, 16, Selection(0.1, 2))
  chosen = [blocks[b, 0, :int(counts[b])].tolist() for b in range(4)]
  assert chosen == [[0], [0, 3], [0, 4], [0, 1, 29]]


@PLAIN
@given(st.integers(0, 3000), st.sampled_from(['0.1', '0.05', '0.3', '1']))
def test_the_number_of_blocks_is_exact(num_blocks, active):
  """0.1 · 30 is not 3.0000000000000004."""
  expected = min(num_blocks, max(16, math.ceil(num_blocks * Fraction(active))))
  selection = Selection(float(active))
  assert selection.num_selected(num_blocks) == expected
  assert int(selection.num_selected(jnp.int32(num_blocks))) == expected


def test_log_sum_exp_merges_two_parts():
  kv, _, table, lengths = cache(1, [44, 48], 8, 6, head_dim=8)
  q = normal(2, 2, 4, 8)
  parts = []
  for first in (0, 3):
    blocks = jnp.broadcast_to(jnp.arange(first, first + 3), (2, 2, 3))
    parts.append(reference.sparse_attention(q, kv, blocks, jnp.full(2, 3), table, lengths))
  (out_a, lse_a), (out_b, lse_b) = parts
  lse = jnp.logaddexp(lse_a, lse_b)
  out = out_a * jnp.exp(lse_a - lse)[..., None] + out_b * jnp.exp(lse_b - lse)[..., None]
  close((out, lse), dense(q, kv, table, lengths), jnp.float32)


def test_appended_keys_give_the_descriptors_of_the_cache():
  page_size, capacity, total = 4, 3, 11
  kv, _, table, lengths = cache(7, [total, total - 2], page_size, capacity, head_dim=8)
  bounds = jnp.full((2, 2, capacity, 16), 99.0)  # What blocks held before does not matter.
  for t in range(total):
    positions = jnp.minimum(jnp.asarray([t, t]), lengths - 1)
    pages = table[jnp.arange(2), positions // page_size]
    keys = jnp.moveaxis(kv[:, pages, 0, positions % page_size], 0, 1)
    bounds = api.update_descriptors(bounds, keys, positions, page_size=page_size)
  every = jnp.broadcast_to(jnp.arange(capacity), (2, capacity))
  np.testing.assert_array_equal(bounds, api.describe_blocks(kv, every, table, lengths))


# --- Dispatch, errors, cases --------------------------------------------------------


def test_a_head_width_that_the_kernel_does_not_take_falls_through(caplog):
  dispatch._say_once.cache_clear()
  caplog.set_level(logging.INFO, logger='pallas_kernels')
  kv, bounds, table, lengths = cache(2, [40, 9], 8, 6, head_dim=16)
  q = normal(2, 2, 4, 16)
  blocks, counts = reference.select_blocks(jnp.zeros((2, 2, 6)), lengths, 8, Selection(0.5, 2))
  arguments = q, kv, blocks, counts, table, lengths
  got = api.sparse_attention(*arguments, generation='v5e')
  close(got, reference.sparse_attention(*arguments), jnp.float32)
  np.testing.assert_array_equal(api.block_scores(q, bounds, generation='v5e'),
                                reference.block_scores(q, bounds))
  assert ['sparse_attention: tpu' in caplog.messages[0], 'block_scores: tpu' in
          caplog.messages[1]] == [True, True] and len(caplog.messages) == 2


@pytest.mark.parametrize('change, message', [
    ({'q_BHE': jnp.zeros((2, 3, 16))}, 'no multiple of 2 key/value heads'),
    ({'bounds_BKPD': jnp.zeros((2, 2, 6, 16))}, 'must be \\[B, K, P, 2E\\]'),
    ({'kv_pages_KNSPE': jnp.zeros((2, 9, 1, 8, 16))}, 'must be \\[K, N, 2, page, E\\]'),
    ({'lengths_B': jnp.zeros(3, jnp.int32)}, '3 lengths for scores of 2 rows'),
    ({'page_table_BP': jnp.zeros((1, 6), jnp.int32)}, 'one entry for each of 2 rows'),
    ({'selection': Selection(0.0)}, 'active must be in'),
    ({'selection': Selection(0.1, 1, 2)}, 'local_blocks \\(2\\)')])
def test_what_does_not_fit_is_said(change, message):
  kv, bounds, table, lengths = cache(2, [40, 9], 8, 6, head_dim=16)
  arguments = dict(q_BHE=jnp.zeros((2, 4, 16)), kv_pages_KNSPE=kv, bounds_BKPD=bounds,
                   page_table_BP=table, lengths_B=lengths, selection=Selection())
  with pytest.raises(ValueError, match=message):
    api.sparse_decode(**(arguments | change), generation=None)


@pytest.mark.parametrize('generation', ['v5e', pytest.param('v5p', marks=pytest.mark.slow)])
def test_cases_trace_and_count_what_the_formula_says(generation):
  cases = arg_specs.cases(generation)
  assert len({case.name for case in cases}) == len(cases) == 8
  for case in cases:
    out, lse = jax.eval_shape(case.call.run, *case.call.args)
    assert out.shape == case.call.args[0].shape and lse.shape == out.shape[:2]
    page_size, cells = case.call.args[1].shape[3], case.call.args[1]
    # Of the cache's bytes: 1 / page + p (2506.04108 section 2.3), and n_min at 4K.
    share = case.minimum_bytes / (cells.size * 2)
    blocks = case.call.args[3].shape[1]
    kept = max(math.ceil(blocks / 10), min(16, blocks)) / blocks
    assert share == pytest.approx(1 / page_size + kept, rel=0.01)
    assert case.minimum_bytes <= case.call.cost.hbm_bytes <= 1.25 * case.minimum_bytes
