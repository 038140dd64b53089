"""The two attends and the selection against the kernels' definitions and the plain cache."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.nn import block_selection, paged_attention, sparse_attention
from jaxrl_pt.sampling import resa, resa_attention, resa_bytes
from pallas_kernels.sparse_decode import Selection, select_blocks, sparse_decode
from pallas_kernels.sparse_decode.reference import block_scores
from tests.sampling.sparse_rows import keys_and_values, sparse_rows

CONFIG = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=8,
                   vocab_size=19)
MODEL = transformer.build(CONFIG)
PARAMS = P.init(MODEL.specs, jax.random.key(0))
PARAMS = {**PARAMS, 'embed': PARAMS['embed'] * 25}
BLOCK, ROWS, LENGTH = 4, 3, 46



def new_cache(num_blocks=14, order=None):
  return sparse_rows(CONFIG, ROWS, num_blocks, BLOCK, order)


def sequences():
  tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, 19)
  return tokens, jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)


def dense(rows, starts, counts):
  return resa_attention.dense(MODEL.ops, rows, starts, counts)


def test_dense_in_chunks_equals_the_plain_cache():
  tokens, positions = sequences()
  hidden, plain = MODEL.extend(PARAMS, tokens, positions, MODEL.init_cache(ROWS, LENGTH))
  cache, ends = new_cache(order=0), (21, 22, LENGTH)

  def extend(cache, tokens, positions):
    attend = dense(jnp.arange(ROWS), positions[:, 0], jnp.full(ROWS, tokens.shape[1]))
    return MODEL.extend(PARAMS, tokens, positions, cache, attend)

  for start, end in zip((0, *ends), ends):
    part, cache = jax.jit(extend)(cache, tokens[:, start:end], positions[:, start:end])
    np.testing.assert_allclose(part, hidden[:, start:end], atol=1e-5)
  np.testing.assert_allclose(keys_and_values(cache, LENGTH), jnp.stack([plain.k, plain.v]),
                             atol=1e-5)
  again = describe_all(cache)
  used = slice(0, -(-LENGTH // BLOCK))
  np.testing.assert_array_equal(cache.bounds[:, :, :, used], again.bounds[:, :, :, used])


@jax.jit
def describe_all(cache):
  return resa_attention.describe(cache, jnp.arange(2), jnp.arange(ROWS),
                                 jnp.zeros(ROWS, jnp.int32), jnp.full(ROWS, LENGTH), LENGTH)


@functools.cache
def random_cache():
  cache = new_cache(order=1)
  pages = jax.random.normal(jax.random.key(2), cache.pool.pages.shape)
  cache = cache.replace(pool=cache.pool.replace(pages=pages))
  return describe_all(cache)


@pytest.mark.parametrize('local_blocks', [0, 1])
def test_a_sparse_step_equals_the_kernels_definition(local_blocks, monkeypatch):
  monkeypatch.setattr(sparse_attention, 'COPIED_NUMBERS', 800)
  monkeypatch.setattr(sparse_attention, 'SCORED_NUMBERS', 800)  # Several turns.
  settings = cfg.ReSA(BLOCK, active=0.4, min_blocks=3, local_blocks=local_blocks)
  positions, active = jnp.array([45, 12, 30]), jnp.array([True, True, False])
  keys = jax.random.split(jax.random.key(3), 3)
  q = jax.random.normal(keys[0], (ROWS, 1, 4, 8))
  k, v = (jax.random.normal(key, (ROWS, 1, 2, 8)) for key in keys[1:])
  before = random_cache()
  attend = resa_attention.sparse(MODEL.ops, settings, positions, active)
  out, cache = jax.jit(attend)(q, k, v, before, jnp.int32(1))
  expected, _ = sparse_decode(
      q[:, 0], cache.pool.pages, cache.bounds[1], cache.table + cache.pool.num_pages, positions + 1,
      selection=Selection(0.4, 3, local_blocks), generation=None)
  np.testing.assert_allclose(out[:2, 0], expected[:2], atol=1e-5)
  for row in (0, 1):  # The new entries, the rest unchanged.
    new = keys_and_values(cache, LENGTH)[:, 1, row, :, positions[row]]
    np.testing.assert_array_equal(new, jnp.stack([k[row, 0], v[row, 0]]))
  old, new = keys_and_values(before, LENGTH), keys_and_values(cache, LENGTH)
  np.testing.assert_array_equal(new[:, 0], old[:, 0])
  np.testing.assert_array_equal(new[:, :, 2], old[:, :, 2])  # The inactive row.
  np.testing.assert_array_equal(new[:, 1, 0, :, :45], old[:, 1, 0, :, :45])
  # A new key widens its block's descriptor; a block's first key makes it.
  np.testing.assert_array_equal(cache.bounds[1, 1, :, 3, :8], k[1, 0])
  np.testing.assert_array_equal(cache.bounds[1, 0, :, 11, :8],
                                jnp.maximum(before.bounds[1, 0, :, 11, :8], k[0, 0]))
  np.testing.assert_array_equal(cache.bounds[1, 2], before.bounds[1, 2])


@pytest.mark.parametrize('capacity,selection', [
    (1, Selection(0.1, 16)), (37, Selection(0.1, 5, 0)), (129, Selection(0.5, 16)),
    (300, Selection(0.05, 1)), (40, Selection(1.0, 1))])
def test_selection_equals_the_kernels(capacity, selection):
  ours = jax.jit(lambda s, n: block_selection.select(s, -(-n // 4), selection))
  kernels = jax.jit(functools.partial(select_blocks, page_size=4, selection=selection,
                                        generation=None))
  rng, shape = np.random.default_rng(capacity), (3, 2, capacity)
  for case in range(30):
    scores = rng.integers(-2, 3, shape) * -1.0 if case % 2 else rng.normal(size=shape)  # Ties, −0.
    scores = jnp.asarray(scores, jnp.float32)
    lengths = jnp.asarray(rng.integers(1, 4 * capacity + 1, 3), jnp.int32)
    expected, counts = kernels(scores, lengths)
    blocks, same_counts = ours(scores, lengths)
    np.testing.assert_array_equal(same_counts, counts)
    counted = np.arange(expected.shape[-1]) < np.asarray(counts)[:, None, None]
    np.testing.assert_array_equal(blocks, np.where(counted, expected, capacity))


@pytest.mark.parametrize('group', [1, 2])
def test_a_score_bounds_the_logits_of_its_block(group):
  """Of the group's mean query; so with one query head to a group, of every query."""
  cache, layer = random_cache(), 1
  q = jax.random.normal(jax.random.key(group), (ROWS, 2 * group, 8))
  scores = np.asarray(block_scores(q, cache.bounds[layer]))[:, :, :12]
  k = keys_and_values(cache, LENGTH)[0, layer]
  logits = np.einsum('bkge,bkce->bkgc', q.reshape(ROWS, 2, group, 8), k)

  def highest(logits_c):
    padded = np.pad(logits_c, [(0, 0)] * (logits_c.ndim - 1) + [(0, 2)], constant_values=-np.inf)
    return padded.reshape(*logits_c.shape[:-1], 12, BLOCK).max(-1)

  assert (scores >= highest(logits.mean(2)) - 1e-5).all()
  of_heads = (scores[:, :, None] >= highest(logits) - 1e-5).all()
  assert of_heads == (group == 1)  # Pooled, it bounds no single head.


@pytest.mark.parametrize('num_rows', [1, 3])
def test_a_step_copies_no_cache(num_rows):
  """The compiled step has no copy of anything as large as the pages."""
  cache = sparse_rows(CONFIG, num_rows, 300, BLOCK)
  tokens, rows = jnp.zeros((num_rows, 8), jnp.int32), jnp.arange(num_rows)
  first = jnp.full(num_rows, 1000)

  def sparse(cache):
    return resa.decode(MODEL, PARAMS, cfg.ReSA(BLOCK), cache, tokens[:, 0], first, rows >= 0,
                       rows == 0)[1]

  def rectified(cache):
    return resa.rectify(MODEL, PARAMS, cache, tokens, first, jnp.full(num_rows, 8))

  for step in (sparse, rectified):
    text = jax.jit(step, donate_argnums=0).lower(cache).compile().as_text()
    sizes = [np.prod([int(n) for n in shape.split(',')])
             for shape in re.findall(r'= f32\[([\d,]+)\]\S* copy\(', text)]
    assert max(sizes, default=0) < cache.pool.pages.size / 4, step


@pytest.mark.slow
def test_bytes_read_equal_the_formula(monkeypatch):
  """With several turns of each loop and a table longer than the rows."""
  table_len, length, active = 100, 333, 0.3
  monkeypatch.setattr(sparse_attention, 'COPIED_NUMBERS', 4000)
  monkeypatch.setattr(sparse_attention, 'SCORED_NUMBERS', 4000)
  monkeypatch.setattr(paged_attention, 'MOST_TURNS', 5)
  monkeypatch.setattr(resa, 'RECTIFIED_TOKENS', 16)
  monkeypatch.setattr(resa_bytes, 'RECTIFIED_TOKENS', 16)
  settings = cfg.ReSA(BLOCK, active, min_blocks=3, refresh=cfg.RefreshEvery(8))
  cache = new_cache(table_len)
  tokens, ones = jnp.zeros((ROWS, 8), jnp.int32), jnp.ones(ROWS, jnp.int32)
  sizes = cache.bounds.size, cache.pool.pages.size
  step = lambda c: resa.decode(MODEL, PARAMS, settings, c, tokens[:, 0], ones * (length - 1),
                               ones > 0)
  refresh = lambda c: resa.rectify(MODEL, PARAMS, c, tokens, ones * (length - 8), ones * 8)
  expected = resa_bytes.attention_bytes(CONFIG, settings, ROWS, length, table_len, 4)
  assert resa_bytes.count_reads(step, (cache,), sizes) == [expected.descriptors, expected.pages]
  assert resa_bytes.count_reads(refresh, (cache,), sizes) == [0, expected.rectification]


def test_bytes_come_close_to_the_papers_model():
  model = cfg.Model(num_layers=2, d_model=256, d_ff=512, num_heads=8, num_kv_heads=2,
                    head_dim=64, vocab_size=1024)
  settings, length = cfg.ReSA(), 2**18 - 100
  exact = resa_bytes.attention_bytes(model, settings, 1, length, 2**14, 4).per_token(32)
  modelled = resa_bytes.modelled_bytes(model, settings, length, 4)
  dense = resa_bytes.dense_bytes(model, length, 4)
  assert dense == 2 * 2 * 2 * 64 * length * 4
  np.testing.assert_allclose(modelled / dense, 1 / 16 + 0.1 + 1 / 32, rtol=1e-3)
  # The model counts what the last layer attends to in a rectification, which nobody reads.
  unread = dense / model.num_layers / 32
  assert 1 <= (exact + unread) / modelled < 1.1
  assert exact < modelled


def test_a_rows_blocks_are_described_when_it_joins(monkeypatch):
  monkeypatch.setattr(resa_attention, 'FEW_ROWS', 1)
  monkeypatch.setattr(resa_attention, 'DESCRIBED_TOKENS', 3 * BLOCK)  # Several turns.
  before = random_cache()
  blank = before.replace(bounds=jnp.full_like(before.bounds, 7.0))
  joined = jax.jit(resa_attention.describe_rows)(
      blank, jnp.array([True, False, True]), jnp.array([LENGTH, LENGTH, 9]))
  np.testing.assert_array_equal(joined.bounds[:, 0, :, :12], before.bounds[:, 0, :, :12])
  np.testing.assert_array_equal(joined.bounds[:, 2, :, :2], before.bounds[:, 2, :, :2])
  k = keys_and_values(before, 9)[0, :, 2, :, 8]  # The third block has one token so far.
  np.testing.assert_array_equal(joined.bounds[:, 2, :, 2], jnp.concatenate([k, k], -1))
  for untouched in (joined.bounds[:, 1], joined.bounds[:, 0, :, 12:], joined.bounds[:, 2, :, 3:]):
    assert (untouched == 7).all()


def test_rows_in_their_prompt_read_everything(monkeypatch):
  monkeypatch.setattr(resa_attention, 'FEW_ROWS', 2)
  positions, active = jnp.array([45, 33, 20]), jnp.array([True, True, True])
  q, k, v = (jax.random.normal(jax.random.key(i), (ROWS, 1, heads, 8))
             for i, heads in enumerate((4, 2, 2)))
  read = lambda in_prompt: jax.jit(resa_attention.sparse(
      MODEL.ops, cfg.ReSA(BLOCK, 0.1, min_blocks=1), positions, active, in_prompt))(
          q, k, v, resa_attention.noting(random_cache()), jnp.int32(1))
  mixed, cache = read(jnp.array([True, False, True]))
  every, _ = jax.jit(dense(jnp.arange(ROWS), positions, jnp.ones(ROWS, jnp.int32)))(
      q, k, v, random_cache(), jnp.int32(1))
  sparsely, _ = read(jnp.zeros(ROWS, bool))
  for row, expected in enumerate((every, sparsely, every)):
    np.testing.assert_allclose(mixed[row], expected[row], atol=1e-6)
    assert (np.abs(every[row] - sparsely[row]) > 1e-3).any()
    assert (cache.selected[1, row] != 0).all() == (row == 1)
