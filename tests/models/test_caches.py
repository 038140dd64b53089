"""Every cache gives what the whole forward gives, at every position."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import kv_cache, paged_cache, transformer
from jaxrl_pt.nn import kv_quant
from jaxrl_pt.nn import quant as quantisers

B, T = 3, 11
QUANTS = {'plain': cfg.Quant(), 'int8': cfg.Quant('ternary', 'int8'),
          'int4_hadamard': cfg.Quant('ternary', 'int4', True)}
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 32)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))


@functools.lru_cache
def make(quant, style, packed=False):
  shape = {'llama': dict(num_heads=4, num_kv_heads=2),
           'bitnet': dict(num_heads=2, num_kv_heads=1, activation='relu2', sub_norm=True)}[style]
  config = cfg.Model(num_layers=2, d_model=32, d_ff=64, head_dim=16, vocab_size=32,
                     quant=QUANTS[quant], **shape)
  model = transformer.build(config)
  params = P.init(model.specs, jax.random.key(0))
  whole = jax.jit(model.apply)(params, TOKENS, POSITIONS, jnp.ones_like(TOKENS))
  if packed:
    params = quantisers.pack(params, lambda path: path[-1].key in transformer.PROJECTIONS)
  return model, params, whole


def by_slots(model, params, chunks):
  cache, outs = model.init_cache(B, T + 2), []
  extend = jax.jit(model.extend)
  for start, end in chunks:
    hidden, cache = extend(params, TOKENS[:, start:end], POSITIONS[:, start:end], cache)
    outs.append(hidden)
  return jnp.concatenate(outs, 1)


def by_pages(model, params, chunks, kv='model', page=4):
  """Pages of the rows lie mixed up in the pool."""
  per_row = -(-T // page)
  order = np.random.default_rng(0).permutation(np.arange(1, 1 + B * per_row))
  table = jnp.asarray(order.reshape(B, per_row))
  cache = model.init_pages(1 + B * per_row, page, kv)

  @jax.jit
  def extend(params, tokens, positions, cache):
    starts, counts = positions[:, 0], jnp.full(B, tokens.shape[1])
    return model.extend(params, tokens, positions, cache,
                        paged_cache.paged(model.ops, table, starts, counts))

  outs = []
  for start, end in chunks:
    hidden, cache = extend(params, TOKENS[:, start:end], POSITIONS[:, start:end], cache)
    outs.append(hidden)
  return jnp.concatenate(outs, 1)


CHUNKS = {'prefill and single tokens': [(0, 5), *((i, i + 1) for i in range(5, T))],
          'chunks': [(0, 3), (3, 7), (7, T)]}


@pytest.mark.parametrize('cached', [by_slots, by_pages])
@pytest.mark.parametrize('quant, chunks, style', [
    pytest.param(quant, chunks, style, marks=[pytest.mark.slow] * (quant == slow))
    # Each quantiser in one way at least, and each way with two.
    for chunks, style, slow in (('prefill and single tokens', 'llama', 'int4_hadamard'),
                                ('chunks', 'bitnet', 'int8')) for quant in QUANTS])
def test_equals_the_whole_forward(cached, chunks, style, quant):
  model, params, whole = make(quant, style)
  assert_close(cached(model, params, CHUNKS[chunks]), whole, quant)


@pytest.mark.parametrize('cached', [by_slots, by_pages])
def test_equals_it_on_packed_weights(cached):
  model, params, whole = make('int8', 'bitnet', packed=True)
  assert_close(cached(model, params, CHUNKS['chunks']), whole, 'int8')


def assert_close(actual, expected, quant):
  error = np.abs(np.asarray(actual - expected))
  if quant == 'plain':
    assert error.max() < 2e-5
  else:  # A rounding can flip a code, whose effect is that of the code.
    assert np.median(error) < 2e-5 and (error > 1e-3).mean() < 0.1 and error.max() < 0.5


@pytest.mark.parametrize('style', ['llama', 'bitnet'])
def test_int8_pages_err_by_their_rounding(style):
  model, params, whole = make('plain', style)
  error = by_pages(model, params, CHUNKS['chunks'], 'int8') - whole
  relative = float(jnp.linalg.norm(error) / jnp.linalg.norm(whole))
  assert 1e-4 < relative < 0.02  # 1/254 of each vector's largest entry, at most


def as_stored_in_slots(model, params, chunks, kv):
  """The definition: a contiguous cache that is given keys and values as a reader gets them."""
  cache, outs = model.init_cache(B, T + 2), []

  @jax.jit
  def extend(params, tokens, positions, cache):
    def attend(q, k, v, cache, layer):
      k, v = (kv_quant.as_stored(x, positions, kv) for x in (k, v))
      return kv_cache.dense(positions)(q, k, v, cache, layer)

    return model.extend(params, tokens, positions, cache, attend)

  for start, end in chunks:
    hidden, cache = extend(params, TOKENS[:, start:end], POSITIONS[:, start:end], cache)
    outs.append(hidden)
  return jnp.concatenate(outs, 1)


@pytest.mark.parametrize('kv, chunks, page', [
    ('int8', 'chunks', 4), ('int4', 'chunks', 4), ('int4', 'prefill and single tokens', 1),
    ('int3', 'prefill and single tokens', 4)])
def test_quantised_pages_equal_what_is_quantised_and_put_into_slots(kv, chunks, page):
  model, params, whole = make('plain', 'llama')
  got = by_pages(model, params, CHUNKS[chunks], kv, page)
  np.testing.assert_allclose(got, as_stored_in_slots(model, params, CHUNKS[chunks], kv),
                             atol=2e-5)
  assert float(jnp.abs(got - whole).max()) > {'int8': 1e-4, 'int4': 0.01, 'int3': 0.02}[kv]


def test_padding_writes_to_nobodys_page():
  model, params, _ = make('plain', 'llama')
  cache = model.init_pages(4, 4, 'model')
  positions = jnp.arange(6)[None]
  table = jnp.array([[2, 3]])
  _, cache = model.extend(params, TOKENS[:1, :6], positions, cache,
                          paged_cache.paged(model.ops, table, jnp.array([0]), jnp.array([5])))
  pages = np.asarray(cache.pages).reshape(-1, model.config.num_layers, 4, *cache.pages.shape[2:])
  assert (pages[:, :, 1] == 0).all() and (pages[:, :, 3, :, 1:] == 0).all()
  assert (pages[:, :, 3, :, 0] != 0).any() and (pages[:, :, 0] != 0).any()
