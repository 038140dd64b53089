"""Rectification restores the dense cache; rollouts equal a slow loop, and drafts change nothing."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.config import RefreshEvery, RefreshNever, ReSA, Sampler
from jaxrl_pt.errors import UserError
from jaxrl_pt.interop import llama2c
from jaxrl_pt.models import transformer
from jaxrl_pt.nn import sparse_attention
from jaxrl_pt.sampling import groups, policies, resa, resa_attention
from jaxrl_pt.sampling import prefill as prefilling
from jaxrl_pt.types import Prompts
from tests.sampling.sparse_rows import keys_and_values, prefill, sparse_rows

CONFIG = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=8,
                   vocab_size=19, tied_head=False)
MODEL = transformer.build(CONFIG)


def opinionated(params):
  """A random model is near uniform and attends to nothing in particular; this one does."""
  layers = {**params['layers'], 'wq': params['layers']['wq'] * 4,
            'wo': params['layers']['wo'] * 4}
  return {'embed': params['embed'] * 50, 'head': params['head'] * 4, 'layers': layers,
          'final_norm': params['final_norm']}


PARAMS = opinionated(P.init(MODEL.specs, jax.random.key(0)))
BLOCK, ROWS = 4, 3
KEY = jax.random.key(7)


def prompts(lengths=(11, 8, 3), ids=(4, 7, 9), width=11):
  tokens = jax.random.randint(jax.random.key(1), (3, 11), 0, 19)[:, :width]
  return Prompts(tokens, jnp.array(lengths), jnp.array(ids))


dense_prefill = jax.jit(functools.partial(prefilling.prefill, MODEL))
sparse_prefill = jax.jit(functools.partial(prefill, MODEL))


# --- Rectification --------------------------------------------------------------------


@pytest.mark.parametrize('window', [
    1, 32, *(pytest.param(window, marks=pytest.mark.slow) for window in (16, 128))])
def test_after_each_rectification_the_cache_is_the_dense_one(window):
  """Rows at different phases: each has its own length and its own count since the last time."""
  prompt_lens, total = jnp.array([20, 33, 27]), 33 + window + 40
  tokens = jax.random.randint(jax.random.key(2), (ROWS, total), 0, 19)
  hidden, plain = dense_prefill(PARAMS, tokens)
  cache = sparse_rows(CONFIG, ROWS, -(-total // BLOCK), BLOCK)
  settings = ReSA(BLOCK, 0.1, min_blocks=2)
  last, cache = sparse_prefill(PARAMS, cache, tokens[:, :33], prompt_lens)
  np.testing.assert_allclose(last, hidden[jnp.arange(ROWS), prompt_lens - 1], atol=1e-5)

  @jax.jit
  def step(carry, i):
    cache, fresh = carry
    # Row 2 starts two steps late.
    positions = prompt_lens + jnp.where(jnp.arange(ROWS) == 2, i - 2, i)
    active = positions >= prompt_lens
    newest = tokens[jnp.arange(ROWS), positions]
    _, cache = resa.decode(MODEL, PARAMS, settings, cache, newest, positions, active)
    due = active & (positions + 1 - fresh == window)
    at = jnp.minimum(fresh[:, None] + jnp.arange(window), total - 1)
    before = cache
    cache = resa.rectify(MODEL, PARAMS, cache, jnp.take_along_axis(tokens, at, 1), fresh,
                         jnp.where(due, window, 0))
    return (cache, jnp.where(due, positions + 1, fresh)), (before, due, positions + 1)

  carry, num_rectified, was_wrong = (cache, prompt_lens), 0, False
  for i in range(window + 3 if window > 1 else 6):
    carry, (before, due, lengths) = step(carry, i)
    kv, old = (keys_and_values(c, total) for c in (carry[0], before))
    for row in np.flatnonzero(due):
      num_rectified += 1
      part = (slice(None), slice(None), row, slice(None), slice(0, int(lengths[row])))
      expected = jnp.stack([plain.k, plain.v])[part]
      np.testing.assert_allclose(kv[part], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
      was_wrong |= bool(np.abs(old[part] - expected).max() > 1e-3)
    for row in np.flatnonzero(~due):  # The others are left alone, bit for bit.
      np.testing.assert_array_equal(kv[:, :, row], old[:, :, row])
  assert num_rectified >= ROWS - 1 and was_wrong
  cache, fresh = carry
  rows = jnp.arange(ROWS)
  again = jax.jit(resa_attention.describe, static_argnums=5)(
      cache, jnp.arange(2), rows, jnp.zeros(ROWS, jnp.int32), lengths, total)
  for row in range(ROWS):  # Descriptors are those of the keys, exactly.
    used = -(-int(lengths[row]) // BLOCK)
    np.testing.assert_array_equal(cache.bounds[:, row, :, :used], again.bounds[:, row, :, :used])


def test_trailing_windows_of_any_length():
  """Counts below the window's width: each row ends with the dense cache of its own tokens."""
  tokens = jax.random.randint(jax.random.key(3), (ROWS, 24), 0, 19)
  _, plain = dense_prefill(PARAMS, tokens)
  cache = sparse_rows(CONFIG, ROWS, 6, BLOCK)
  starts, counts = jnp.array([16, 10, 13]), jnp.array([7, 0, 1])
  _, cache = sparse_prefill(PARAMS, cache, tokens, starts)
  window = jnp.take_along_axis(tokens, starts[:, None] + jnp.arange(8), 1)
  rectified = jax.jit(functools.partial(resa.rectify, MODEL))(PARAMS, cache, window, starts,
                                                                counts)
  kv, before = keys_and_values(rectified, 24), keys_and_values(cache, 24)
  for row, (start, count) in enumerate(zip(starts, counts)):
    end = int(start + count)
    np.testing.assert_allclose(kv[:, :, row, :, :end],
                               jnp.stack([plain.k, plain.v])[:, :, row, :, :end], atol=1e-5)
    np.testing.assert_array_equal(kv[:, :, row, :, end:], before[:, :, row, :, end:])


# --- Generation -----------------------------------------------------------------------

DRAW = dict(sampler=Sampler(0.9, top_p=0.95), num_samples=2, num_tokens=14, stop_ids=(15,))


@functools.cache
def generator(settings=groups.DENSE, slots=groups.ALL_SLOTS, **changed):
  return jax.jit(functools.partial(groups.generate, MODEL, sparse=settings, slots=slots, version=3,
                                   **{**DRAW, **changed}))


def assert_same(rollout, expected):
  np.testing.assert_array_equal(rollout.tokens, expected.tokens)
  np.testing.assert_array_equal(rollout.in_response, expected.in_response)
  np.testing.assert_array_equal(rollout.sampled, expected.sampled)
  np.testing.assert_allclose(rollout.logp, expected.logp, atol=2e-5)
  np.testing.assert_array_equal(rollout.version, expected.version)
  assert (rollout.version == 3).all()


def test_all_blocks_reproduce_dense_decoding():
  rollout = generator(ReSA(BLOCK, active=1.0, min_blocks=1, refresh=RefreshEvery(5)))(
      PARAMS, prompts(), KEY)
  assert_same(rollout, generator()(PARAMS, prompts(), KEY))
  lengths = rollout.lengths()
  assert lengths.min() < 14 <= lengths.max()  # Some stopped and some did not.


SPARSE = ReSA(BLOCK, 0.1, min_blocks=1, refresh=RefreshEvery(4))


def test_rollouts_equal_a_slow_loop():
  """One row at a time, a step at a time, rectified by hand."""
  rollout, dense = (generator(s)(PARAMS, prompts(), KEY) for s in (SPARSE, cfg.Dense()))
  assert np.abs(np.asarray(rollout.logp - dense.logp)).max() > 1e-3  # It is sparse.
  head = MODEL.head(PARAMS)
  step = jax.jit(functools.partial(resa.decode, MODEL, resa=SPARSE))
  rectify = jax.jit(functools.partial(resa.rectify, MODEL))
  keys = policies.sample_keys(KEY, prompts().ids, 2)
  for n, g in ((0, 1), (1, 0), (2, 1)):
    length = int(prompts().lengths[n])
    cache = sparse_rows(CONFIG, 1, 7, BLOCK)
    hidden, cache = sparse_prefill(PARAMS, cache, prompts().tokens[n:n + 1], jnp.array([length]))
    drawn = []
    for i in range(14):
      key = jax.random.fold_in(keys[2 * n + g], length + i)
      token, logp = policies.draw(key[None], policies.filtered_logits(
          hidden @ head, DRAW['sampler']))
      drawn.append(int(token[0]))
      np.testing.assert_allclose(rollout.logp[n, g, i], logp[0], atol=2e-5)
      if drawn[-1] == 15:
        break
      hidden, cache = step(PARAMS, cache=cache, tokens_B=token, positions_B=jnp.array([length + i]),
                           active_B=jnp.array([True]))
      if len(drawn) % 4 == 0:
        start = jnp.array([length + len(drawn) - 4])
        cache = rectify(PARAMS, cache, jnp.array([drawn[-4:]]), start, jnp.array([4]))
    np.testing.assert_array_equal(rollout.tokens[n, g, :len(drawn)], drawn)
    assert int(rollout.lengths()[n, g]) == len(drawn)


@pytest.mark.parametrize('slots', [
    cfg.Slots(slots=2, prefill_chunk=3),
    pytest.param(cfg.Slots(slots=4, num_pages=16, prefill_tokens=4), marks=pytest.mark.slow),
    pytest.param(cfg.Slots(slots=1), marks=pytest.mark.slow)],
    ids=lambda s: f'{s.slots}slots{s.num_pages}pages')
def test_slots_that_are_refilled_draw_the_same(slots):
  settings = ReSA(BLOCK, 0.1, min_blocks=1, refresh=RefreshEvery(4), replay=True)
  whole, refilled = (generator(settings, s)(PARAMS, prompts(), KEY) for s in (cfg.Slots(), slots))
  assert_same(refilled, whole)
  words = whole.selected.bits.shape[-1]  # Tables may have different lengths.
  drawn = np.asarray(whole.sampled)[..., None, None, None] > 0
  np.testing.assert_array_equal(np.where(drawn, refilled.selected.bits[..., :words], 0),
                                np.where(drawn, whole.selected.bits, 0))


def test_documents_and_suffixes_are_read_as_prompts():
  """Three prompts of one document with a suffix each draw what they draw alone."""
  document = jax.random.randint(jax.random.key(1), (1, 11), 0, 19)
  suffix, lengths, ids = jnp.array([[3, 5]]), np.array([11, 6, 2]), jnp.array([4, 7, 9])
  shared = Prompts(document, jnp.array(lengths), ids, suffix)
  alone = np.zeros((3, 13), np.int32)
  for row, length in zip(alone, lengths):
    row[:length + 2] = [*document[0, :length], *suffix[0]]
  draw = generator(SPARSE)
  assert_same(draw(PARAMS, shared, KEY),
              draw(PARAMS, Prompts(jnp.asarray(alone), jnp.array(lengths + 2), ids), KEY))


# --- Drafts ---------------------------------------------------------------------------

LOOKUP, SELF = cfg.PromptLookup(3, ngram=1), cfg.SparseDrafts(3, ReSA(BLOCK, 0.1, min_blocks=1))


@pytest.mark.parametrize('drafts, slots, sampler', [
    (LOOKUP, 0, Sampler(0.9, top_p=0.95)), (SELF, 2, Sampler(0.9, top_p=0.95)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (LOOKUP, 2, Sampler(0.0)), (SELF, 0, Sampler(0.0)), (LOOKUP, 1, Sampler())))],
    ids=str)
def test_drafts_draw_the_very_tokens_of_dense_decoding(drafts, slots, sampler):
  expected = generator(sampler=sampler)(PARAMS, prompts(), KEY)
  drafting = cfg.Slots(slots=slots, drafts=drafts)
  assert_same(generator(slots=drafting, sampler=sampler)(PARAMS, prompts(), KEY), expected)


@pytest.mark.parametrize('settings', [
    dict(active=0.0), dict(active=1.5), dict(active=float('nan')), dict(block=0),
    dict(local_blocks=17), dict(min_blocks=0), dict(refresh=32)])
def test_bad_settings_say_what_to_write(settings):
  with pytest.raises(UserError, match=rf'ReSA\.{next(iter(settings))} = .*expected'):
    ReSA(**settings)
  with pytest.raises(UserError, match=r'RefreshEvery\.tokens = 0'):
    RefreshEvery(0)


# --- Real weights ---------------------------------------------------------------------

WEIGHTS = Path(__file__).parents[3] / 'shared' / 'data' / 'weights-stories260k'


@pytest.fixture(scope='module')
def stories():
  if not WEIGHTS.exists():
    pytest.skip(f'{WEIGHTS.name} is not in ../shared/data: nothing to compare with')
  config, params = llama2c.load_model(WEIGHTS / 'stories260K.bin')
  return transformer.build(config), params


def story(model, params, settings, num_tokens, sampler, num_samples=1):
  bos = Prompts(jnp.full((1, 1), llama2c.BOS), jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32))
  return jax.jit(functools.partial(
      groups.generate, model, sampler=sampler, sparse=settings, num_samples=num_samples,
      num_tokens=num_tokens))(params, bos, KEY)


def dense_nll(model, params, tokens_GS):
  """Nats per token of texts under the dense model."""
  whole = jnp.pad(tokens_GS, ((0, 0), (1, 0)), constant_values=llama2c.BOS)
  hidden = model.apply(params, whole[:, :-1],
                       jnp.broadcast_to(jnp.arange(whole.shape[1] - 1), tokens_GS.shape),
                       jnp.ones_like(tokens_GS))
  logp = jax.nn.log_softmax(hidden @ model.head(params))
  return float(-jnp.take_along_axis(logp, tokens_GS[..., None], -1).mean())


def test_greedy_text_of_real_weights(stories):
  model, params = stories
  text = (WEIGHTS / 'stories260K.md').read_text(encoding='utf-8')
  tokenizer = llama2c.load_tokenizer(WEIGHTS / 'tok512.bin')
  rollout = story(model, params, ReSA(8, 1.0, refresh=RefreshEvery(16)), 120, Sampler(0.0))
  written = tokenizer.decode(np.asarray(rollout.tokens[0, 0]).tolist())
  assert written[:150] in text and len(written) > 200


@pytest.mark.slow
def test_sampled_text_of_real_weights_stays_likely(stories):
  """A quarter of the blocks of 8 tokens: the dense model finds the text about as likely."""
  model, params = stories
  nlls = {}
  for name, settings in (('dense', ReSA(8, 1.0)),
                         ('resa', ReSA(8, 0.25, min_blocks=4, refresh=RefreshEvery(16))),
                         ('blind', ReSA(8, 0.01, min_blocks=1, refresh=RefreshNever()))):
    rollout = story(model, params, settings, 128, Sampler(0.8), num_samples=16)
    nlls[name] = dense_nll(model, params, rollout.tokens[0])
  assert nlls['dense'] < 1.2 and abs(nlls['resa'] - nlls['dense']) < 0.15, nlls
  assert nlls['blind'] > nlls['dense'] + 0.3, nlls


@pytest.mark.slow
def test_controls_are_detectably_worse(stories):
  """Random blocks, stale descriptors and no local block, by their KL from dense decoding."""
  model, params = stories
  settings = ReSA(4, 0.1, min_blocks=4)
  tokens = story(model, params, ReSA(8, 1.0), 241, Sampler(0.8), num_samples=8).tokens[0]
  num_rows, start = 8, 200
  cache = sparse_rows(model.config, num_rows, 62, 4)
  _, cache = prefill(model, params, cache, tokens, jnp.full(num_rows, start))
  rows = jnp.arange(num_rows)

  def random_scores(q, bounds):
    key = jax.random.fold_in(KEY, jax.lax.bitcast_convert_type(q.sum(), jnp.int32))
    return jax.random.normal(key, bounds.shape[:3])

  def logits(cache, attend_at):
    def step(cache, i):
      positions = jnp.full(num_rows, i)
      hidden, cache = model.extend(params, tokens[:, i][:, None], positions[:, None], cache,
                                   attend_at(positions))
      return cache, jax.nn.log_softmax(hidden[:, 0] @ model.head(params))
    return jax.jit(lambda c: jax.lax.scan(step, c, start + jnp.arange(40))[1])(cache)

  def use(settings, **options):
    ops = model.ops._replace(sparse=functools.partial(sparse_attention.sparse_attention, **options))
    return lambda at: resa_attention.sparse(ops, settings, at, rows >= 0)

  every = logits(cache, use(ReSA(4, 1.0)))
  divergence = lambda other: float((jnp.exp(every) * (every - other)).sum(-1).mean())
  kl = divergence(logits(cache, use(settings)))
  stale = cache.replace(bounds=jnp.roll(cache.bounds, 17, axis=3))
  controls = {
      'random blocks': logits(cache, use(settings, scores=random_scores)),
      'stale descriptors': logits(stale, use(settings)),
      'no local block': logits(cache, use(ReSA(4, 0.1, 4, local_blocks=0)))}
  kls = {name: divergence(values) for name, values in controls.items()}
  assert kls['random blocks'] > 2 * kl and kls['stale descriptors'] > 1.5 * kl, (kl, kls)
  assert kls['no local block'] > kl, (kl, kls)
