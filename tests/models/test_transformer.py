"""Properties of the forward: causal, packed ≡ separate, cached ≡ whole, and its sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.nn import quant as quantisers
from tests.shapes import ROOT, STORIES260K, shape

BASE = cfg.Model(num_layers=2, d_model=32, d_ff=64, num_heads=4, num_kv_heads=2, head_dim=8,
                 vocab_size=40)
QUANTS = {
    'plain': cfg.Quant(),
    'weights': cfg.Quant('ternary'),
    'int8': cfg.Quant('ternary', 'int8'),
    'int8_hadamard': cfg.Quant('ternary', 'int8', hadamard=True),
    'int4_hadamard': cfg.Quant('ternary', 'int4', hadamard=True),
    'int4_absmax': cfg.Quant('ternary', 'int4_absmax'),
}
SHAPES = {
    'llama': {},
    'bitnet': dict(activation='relu2', sub_norm=True),
    'one_kv_head': dict(num_kv_heads=1, activation='relu2'),
    'all_kv_heads': dict(num_kv_heads=4, sub_norm=True, tied_head=False),
    'narrow_queries': dict(num_heads=2, head_dim=4, num_kv_heads=1),
    'imported': dict(qkv_bias=True, qk_norm=True, rope=cfg.Llama3Rope(8.0, 1.0, 4.0, 16)),
}
# The cache of these differs from that of others in nothing but what is put into it.
SLOW = 'weights', 'int8_hadamard', 'int4_absmax'
VARIANTS = [*(pytest.param(q, 'bitnet', marks=[pytest.mark.slow] * (q in SLOW)) for q in QUANTS),
            *(('plain', s) for s in SHAPES if s != 'bitnet'), ('int8', 'llama')]


@functools.cache
def make(quant='plain', shape='llama', compute=cfg.Compute()):
  config = dataclasses.replace(BASE, **SHAPES[shape], quant=QUANTS[quant])
  model = transformer.build(config, compute)
  return model, init(model.specs)


def init(specs):
  return jax.jit(lambda key: P.init(specs, key))(jax.random.key(0))


def draw_tokens(rows, length):
  return jax.random.randint(jax.random.key(1), (rows, length), 0, BASE.vocab_size)


def plain_inputs(tokens):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return tokens, positions, jnp.ones_like(tokens)


def assert_close_but_for_flips(actual, expected, quantised):
  """Equal up to float32 rounding; one program's scale may differ from another's in the last
  bit, which moves a value that lies on a rounding boundary by one step of its quantiser, so
  a quantised model may have a few rows (tokens) off by that step, and no more than a few."""
  error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max(-1)
  if quantised:
    assert np.mean(error > 5e-5) <= 0.1 and error.max() < 0.5, error
  else:
    assert error.max() < 5e-5, error.max()


@pytest.mark.parametrize('quant, shape', [('plain', 'llama'), ('int8_hadamard', 'bitnet'),
                                          ('int4_hadamard', 'bitnet')])
def test_causality_by_gradient(quant, shape):
  model, params = make(quant, shape)
  _, positions, segments = plain_inputs(draw_tokens(1, 6))

  def hidden(embeddings):
    # Token t takes row t of the table, so a row's gradient is that position's.
    own = {**params, 'embed': embeddings}
    return model.apply(own, jnp.arange(6)[None], positions, segments)[0]

  embeddings = params['embed'][:6] * 50
  moved = jax.jit(jax.jacobian(lambda e: hidden(e).sum(-1)))(embeddings)  # [T out, T in, D]
  influence = np.abs(moved).sum(-1)
  np.testing.assert_array_equal(np.triu(influence, 1), 0)
  assert (np.tril(influence)[np.tril_indices(6)] > 0).all()


@pytest.mark.parametrize('quant', ['plain', 'int8', 'int4_hadamard'])
def test_packed_documents_equal_separate_ones(quant):
  model, params = make(quant, 'bitnet')
  apply = jax.jit(model.apply)
  tokens = draw_tokens(1, 12)
  lengths = (5, 4)
  positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
  segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3])
  packed = apply(params, tokens, positions, segments)
  start = 0
  for length in lengths:
    # The same program and width: only what shares the row with the document changes.
    alone = jnp.zeros_like(tokens).at[0, :length].set(tokens[0, start:start + length])
    alone_segments = jnp.zeros_like(tokens).at[0, :length].set(1)
    separate = apply(params, alone, jnp.arange(12)[None], alone_segments)
    assert_close_but_for_flips(packed[0, start:start + length], separate[0, :length],
                               quant != 'plain')
    start += length


def test_other_documents_have_no_influence_at_all():
  model, params = make('int8', 'bitnet')
  tokens = draw_tokens(1, 10)
  positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
  segments = jnp.asarray([[1] * 5 + [2] * 5])
  changed = tokens.at[0, :5].set((tokens[0, :5] + 1) % BASE.vocab_size)
  apply = jax.jit(model.apply)
  a, b = apply(params, tokens, positions, segments), apply(params, changed, positions, segments)
  np.testing.assert_array_equal(a[0, 5:], b[0, 5:])
  assert np.abs(a[0, :5] - b[0, :5]).max() > 0.1


@pytest.mark.parametrize('quant, shape', VARIANTS)
def test_cache_equals_full_at_every_position(quant, shape):
  model, params = make(quant, shape)
  tokens, positions, segments = plain_inputs(draw_tokens(2, 16))
  full = jax.jit(model.apply)(params, tokens, positions, segments)
  extend = jax.jit(model.extend)
  hidden, cache = extend(params, tokens[:, :6], positions[:, :6], model.init_cache(2, 16))
  parts = [hidden]
  for i in range(6, 16):
    hidden, cache = extend(params, tokens[:, i:i + 1], positions[:, i:i + 1], cache)
    parts.append(hidden)
  assert_close_but_for_flips(jnp.concatenate(parts, 1), full, quant != 'plain')


def test_rows_of_different_lengths_share_one_cache():
  model, params = make()
  tokens = draw_tokens(2, 8)
  lengths = jnp.asarray([[5], [3]])
  positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
  # Row 1's prompt is right-padded: slots 3… hold garbage until they are written.
  _, cache = model.extend(params, tokens[:, :5], positions[:, :5], model.init_cache(2, 8))
  new = jnp.asarray([[7], [9]])
  hidden, _ = model.extend(params, new, lengths, cache)
  for row, length in enumerate((5, 3)):
    alone = jnp.concatenate([tokens[row, :length], new[row]])[None]
    expected = model.apply(params, *plain_inputs(alone))[0, -1]
    np.testing.assert_allclose(hidden[row, 0], expected, atol=2e-5)


@pytest.mark.parametrize('quant', ['int8', 'int4_hadamard'])
def test_packed_weights_run_through_the_unchanged_forward(quant):
  model, params = make(quant, 'bitnet')
  packed = quantisers.pack(params, lambda path: path[-1].key in transformer.PROJECTIONS)
  assert packed['layers']['wq'].codes.dtype == jnp.int2
  tokens, positions, segments = plain_inputs(draw_tokens(2, 9))
  apply = jax.jit(model.apply)
  assert_close_but_for_flips(apply(packed, tokens, positions, segments),
                             apply(params, tokens, positions, segments), quantised=True)
  extend = jax.jit(model.extend)
  cached, _ = extend(packed, tokens, positions, model.init_cache(2, 9))
  assert_close_but_for_flips(cached, apply(packed, tokens, positions, segments), quantised=True)


@functools.cache
def loss_and_grad(compute, quant='int8'):
  model, params = make(quant, 'bitnet', compute)
  inputs = plain_inputs(draw_tokens(2, 8))

  def loss(params):
    return jnp.square(model.apply(params, *inputs).astype(jnp.float32) @ model.head(params)).mean()

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize('quant', [pytest.param('plain', marks=pytest.mark.slow), 'int8'])
@pytest.mark.parametrize('compute', [
    pytest.param(cfg.Compute(remat='block'), marks=pytest.mark.slow), cfg.Compute(unroll=0),
    cfg.Compute(unroll=2, remat='block')])
def test_remat_and_unrolling_change_nothing(compute, quant):
  value, grads = loss_and_grad(cfg.Compute(), quant)
  other_value, other_grads = loss_and_grad(compute, quant)
  # Quantised, the programs could part at a rounding boundary; at this size and seed none does.
  np.testing.assert_allclose(other_value, value, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads)):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9)


# What is summed and handed on in bfloat16 without quantisers: `test_bfloat16.py`.
@pytest.mark.parametrize('quant', [
    pytest.param('plain', marks=pytest.mark.slow), 'int8_hadamard'])
def test_bfloat16_is_near_float32(quant):
  inputs = plain_inputs(draw_tokens(2, 16))
  model, params = make(quant, 'bitnet')
  low, _ = make(quant, 'bitnet', cfg.Compute(dtype='bfloat16'))
  exact, rough = jax.jit(model.apply)(params, *inputs), jax.jit(low.apply)(params, *inputs)
  assert rough.dtype == jnp.bfloat16 and low.head(params).dtype == jnp.bfloat16
  assert low.init_cache(1, 4).k.dtype == jnp.bfloat16
  # 8 bits of mantissa, 2 layers; quantised, flips of single codes besides: a few percent.
  error = jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact)
  assert float(error) < (0.03 if quant == 'plain' else 0.15)
  grads = jax.jit(jax.grad(
      lambda p: low.apply(p, *inputs).astype(jnp.float32).sum()))(params)
  assert all(g.dtype == jnp.float32 and bool(jnp.isfinite(g).all())
             for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('num_layers', [2, 8])
def test_initial_residual_stream_does_not_grow_with_depth(num_layers):
  config = dataclasses.replace(shape('tiny'), vocab_size=64, num_layers=num_layers)
  model = transformer.build(config)
  params = init(model.specs)
  logits = jax.jit(model.apply)(params, *plain_inputs(draw_tokens(1, 16))) @ model.head(params)
  # A tied head over embeddings of std 0.02: logits of std 0.02 · √D = 0.23.
  assert 0.1 < float(logits.std()) < 0.6


# --- Sizes ----------------------------------------------------------------------


def count_group(specs, group):
  leaves = jax.tree_util.tree_flatten_with_path(specs, is_leaf=P.is_spec)[0]
  return sum(int(np.prod(s.shape)) for path, s in leaves if group(path[-1].key))


def test_bitnet_2b4t_counts():
  specs = transformer.build(shape('bitnet_2b4t')).specs
  assert count_group(specs, lambda n: n == 'embed') == 328_335_360
  assert count_group(specs, lambda n: n.startswith('w')) == 2_084_044_800
  assert count_group(specs, lambda n: n.endswith('norm')) == 440_320
  assert P.count(specs) == 2_412_820_480


def counted_by_hand(c):
  attention = 2 * c.d_model * c.head_dim * (c.num_heads + c.num_kv_heads)
  layer = attention + 3 * c.d_model * c.d_ff + 2 * c.d_model
  layer += (c.num_heads * c.head_dim + c.d_ff) if c.sub_norm else 0
  layer += c.head_dim * (c.num_heads + 2 * c.num_kv_heads) if c.qkv_bias else 0
  return (c.vocab_size * c.d_model * (1 if c.tied_head else 2) + c.num_layers * layer
          + c.d_model)


COUNTS = {
    'tiny': 920_704, 'small': 2_562_624, 'medium': 14_173_568, 'deepseek_7b': 6_910_365_696,
    'qwen2_5_7b': 7_615_616_512, 'qwen2_5_14b': 14_770_033_664,
    'qwen2_5_32b': 32_763_876_352, 'bitnet_2b4t': 2_412_820_480,
    'bitnet_v2_400m': 468_362_240, 'bitnet_v2_1_3b': 1_339_291_648,
    'bitnet_v2_3b': 3_618_000_896, 'bitnet_v2_7b': 6_705_287_168}


@pytest.mark.parametrize('name', [path.stem for path in (ROOT / 'gin/model').glob('*.gin')
                                  if not path.stem.startswith('dit_')])
def test_counts_of_the_shipped_shapes(name):
  actual = P.count(transformer.build(shape(name)).specs)
  assert actual == COUNTS[name] == counted_by_hand(shape(name))


def test_counts_of_a_known_model():
  assert P.count(transformer.build(STORIES260K).specs) == 260_032


def test_init_is_addressed_by_place_and_seed():
  model, params = make()
  init = jax.jit(lambda key: P.init(model.specs, key))  # as `make` draws them
  again, other = init(jax.random.key(0)), init(jax.random.key(1))
  np.testing.assert_array_equal(params['layers']['wq'], again['layers']['wq'])
  assert np.abs(params['layers']['wq'] - other['layers']['wq']).max() > 0.1
  assert np.abs(params['layers']['w_gate'] - params['layers']['w_up']).max() > 0.1
  abstract = P.abstract(model.specs)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
      lambda x: (x.shape, x.dtype), abstract)


def test_what_decays_are_products():
  """Weight decay is left off embeddings and gains of norms (2504.12285 has it so)."""
  config = dataclasses.replace(shape('tiny'), tied_head=False)
  leaves = jax.tree_util.tree_leaves_with_path(transformer.build(config).specs, is_leaf=P.is_spec)
  decayed = {path[-1].key for path, spec in leaves if spec.is_decayed}
  assert decayed == {'wq', 'wk', 'wv', 'wo', 'w_gate', 'w_up', 'w_down', 'head'}
  assert {path[-1].key for path, _ in leaves} - decayed == {
      'embed', 'final_norm', 'attn_norm', 'ffn_norm', 'attn_sub_norm', 'ffn_sub_norm'}
