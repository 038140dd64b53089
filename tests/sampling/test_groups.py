"""`groups.generate` against a slow loop that runs the whole model for every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.config import Sampler
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling import groups, policies
from jaxrl_pt.types import Prompts

VOCAB = 19
CONFIG = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8,
                   vocab_size=VOCAB, activation='relu2', sub_norm=True)
MODEL = transformer.build(CONFIG)
PARAMS = P.init(MODEL.specs, jax.random.key(0))
# A random model is near uniform; a larger embedding (tied head) makes it have opinions.
PARAMS = {**PARAMS, 'embed': PARAMS['embed'] * 25}
KEY = jax.random.key(7)
TOKENS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7], [11]]


def make_prompts(token_lists, ids=None, prompt_len=8, junk=0):
  n = len(token_lists)
  tokens = np.full((n, prompt_len), junk, np.int32)
  for row, values in zip(tokens, token_lists):
    row[:len(values)] = values
  lengths = np.array([len(v) for v in token_lists], np.int32)
  ids = np.arange(n, dtype=np.int32) if ids is None else np.asarray(ids, np.int32)
  return Prompts(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(ids))


STOP = 12


@functools.lru_cache
def compiled(sampler, num_samples, num_tokens, stop_ids):
  return jax.jit(functools.partial(
      groups.generate, MODEL, sampler=sampler, num_samples=num_samples, num_tokens=num_tokens,
      stop_ids=stop_ids, version=5))


def generate(prompts, sampler=Sampler(), num_samples=3, num_tokens=6, stop_ids=(STOP,)):
  return compiled(sampler, num_samples, num_tokens, stop_ids)(PARAMS, prompts, KEY)


@jax.jit
def _logits(tokens_1T):
  length = tokens_1T.shape[1]
  hidden = MODEL.apply(PARAMS, tokens_1T, jnp.arange(length)[None], jnp.ones_like(tokens_1T))
  return hidden[0] @ MODEL.head(PARAMS)


def logits_after(tokens, length=16):
  """Logits of the next token from one whole `apply`; causality makes the padding inert."""
  return _logits(np.array([tokens + [0] * (length - len(tokens))], np.int32))[len(tokens) - 1]


@functools.partial(jax.jit, static_argnums=3)
def slow_draw(key, position, logits, sampler):
  filtered = policies.filtered_logits(logits, sampler)
  token = policies.draw(jax.random.fold_in(key, position), filtered).token
  return token, jax.nn.log_softmax(filtered)[token]


def slow_response(tokens, prompt_id, sample, sampler, num_tokens, stop_ids):
  key = jax.random.fold_in(jax.random.fold_in(KEY, np.uint32(prompt_id % 2**32)), sample)
  tokens, start, logps = list(tokens), len(tokens), []
  for _ in range(num_tokens):
    token, logp = slow_draw(key, len(tokens), logits_after(tokens), sampler)
    token = int(token)
    logps.append(float(logp))
    tokens.append(token)
    if token in stop_ids:
      break
  return tokens[start:], logps


@pytest.mark.parametrize('sampler', [Sampler(), Sampler(0.0), Sampler(0.9, top_k=7, top_p=0.8)])
def test_equals_a_whole_forward_per_token(sampler):
  ids = [8, -3, 2**31 - 1, 0]
  rollout = generate(make_prompts(TOKENS, ids=ids), sampler)
  lengths = set()
  for n, (prompt, prompt_id) in enumerate(zip(TOKENS, ids)):
    for g in range(3):
      tokens, logps = slow_response(prompt, prompt_id, g, sampler, 6, (STOP,))
      count = len(tokens)
      lengths.add(count)
      np.testing.assert_array_equal(rollout.tokens[n, g, :count], tokens)
      np.testing.assert_allclose(rollout.logp[n, g, :count], logps, atol=2e-5)
      np.testing.assert_array_equal(rollout.in_response[n, g], np.arange(6) < count)
      np.testing.assert_array_equal(rollout.tokens[n, g, count:], STOP)
      np.testing.assert_array_equal(rollout.logp[n, g, count:], 0)
  assert rollout.version.shape == (4, 3, 6) and (rollout.version == 5).all()
  assert (rollout.turn == 0).all()
  np.testing.assert_array_equal(rollout.sampled, rollout.in_response)
  if sampler == Sampler():
    assert len(lengths) > 1  # Some responses stopped and some did not: both were compared.


@functools.cache
def drawn_in(slots, suffix):
  """What is drawn for eight prompts, which end in the suffix."""
  prompts = make_prompts([*TOKENS, *TOKENS])
  if suffix:
    prompts = dataclasses.replace(prompts, suffix=jnp.array([suffix] * 8, jnp.int32))
  return jax.jit(functools.partial(
      groups.generate, MODEL, slots=slots, sampler=Sampler(), num_samples=3, num_tokens=9,
      stop_ids=(STOP,)))(PARAMS, prompts, KEY)


@pytest.mark.parametrize('slots', [
    cfg.Slots(slots=1, page_size=4), cfg.Slots(slots=5, page_size=1, prefill_chunk=3),
    cfg.Slots(slots=3, page_size=4, num_pages=10, prefill_tokens=4), cfg.Slots(page_size=2)],
    ids=lambda s: f'{s.slots}slots{s.page_size}page{s.num_pages}pages')
@pytest.mark.parametrize('suffix', [(), (4, 2)])
def test_slots_and_pages_do_not_matter(slots, suffix):
  """Of 24 responses few at a time, even in a pool that holds hardly one of them."""
  whole, refilled = drawn_in(cfg.Slots(), suffix), drawn_in(slots, suffix)
  np.testing.assert_array_equal(refilled.tokens, whole.tokens)
  np.testing.assert_array_equal(refilled.in_response, whole.in_response)
  np.testing.assert_allclose(refilled.logp, whole.logp, atol=1e-5)


def test_a_pool_that_holds_one_response_is_enough_and_a_smaller_one_is_refused():
  prompts, asked = make_prompts(TOKENS), dict(sampler=Sampler(), num_samples=2, num_tokens=9)
  draw = lambda slots: jax.jit(functools.partial(groups.generate, MODEL, slots=slots, **asked))(
      PARAMS, prompts, KEY)
  least = 1 + 2 + 4  # The page of nobody; 8 tokens of a prompt; 9 of a response, and one in part.
  slots = cfg.Slots(slots=3, page_size=4, num_pages=least)
  np.testing.assert_array_equal(draw(slots).tokens, draw(cfg.Slots()).tokens)
  with pytest.raises(UserError, match='Slots.num_pages = 6 cannot hold one response of 9 tokens '
                                      'to a prompt of 8: set it to at least 7, or to 0'):
    draw(dataclasses.replace(slots, num_pages=least - 1))


def test_order_batch_and_padding_do_not_matter():
  whole = generate(make_prompts(TOKENS))
  order = np.array([2, 0, 3, 1])
  shuffled = generate(make_prompts([TOKENS[i] for i in order], ids=order))
  np.testing.assert_array_equal(shuffled.tokens, whole.tokens[order])
  wider = generate(make_prompts(TOKENS, prompt_len=11, junk=17))
  np.testing.assert_array_equal(wider.tokens, whole.tokens)
  np.testing.assert_allclose(wider.logp, whole.logp, atol=1e-5)
  for n, prompt in enumerate(TOKENS):
    alone = generate(make_prompts([prompt], ids=[n], prompt_len=9))
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[n])


def test_samples_of_a_group_and_prompts_with_other_ids_differ():
  same = make_prompts([TOKENS[0]] * 3, ids=[4, 4, 5])
  rollout = generate(same)
  np.testing.assert_array_equal(rollout.tokens[0], rollout.tokens[1])
  assert (rollout.tokens[0] != rollout.tokens[2]).any()
  assert (rollout.tokens[0, 0] != rollout.tokens[0, 1]).any()


def test_frequencies_match_the_probabilities():
  sampler, draws = Sampler(0.9, top_k=7, top_p=0.8), 20_000
  rollout = generate(make_prompts([TOKENS[0]]), sampler, num_samples=draws, num_tokens=1)
  more_tokens = generate(make_prompts(TOKENS), sampler)
  np.testing.assert_array_equal(rollout.tokens[0, :3, 0], more_tokens.tokens[0, :, 0])
  p = np.asarray(jax.nn.softmax(policies.filtered_logits(logits_after(TOKENS[0]), sampler)))
  counts = np.bincount(np.asarray(rollout.tokens).ravel(), minlength=VOCAB)
  # Five standard deviations of a binomial count for each token.
  assert (np.abs(counts - draws * p) <= 5 * np.sqrt(draws * p * (1 - p)) + 1e-3).all()
  assert set(np.flatnonzero(counts)) == set(np.flatnonzero(p > 0))
  assert 1 < (counts > 0).sum() <= 7
  np.testing.assert_allclose(np.exp(rollout.logp.ravel()), p[rollout.tokens.ravel()], rtol=1e-4)


def test_the_loop_ends_when_every_row_has_stopped():
  """With a greedy row and its first token as the stop token nothing is left to decode."""
  first = int(generate(make_prompts([TOKENS[0]]), Sampler(0.0)).tokens[0, 0, 0])
  calls = []

  def extend(params, tokens, *rest):
    jax.debug.callback(lambda: calls.append(tokens.shape[1]))
    return MODEL.extend(params, tokens, *rest)

  run = jax.jit(functools.partial(
      groups.generate, MODEL._replace(extend=extend), sampler=Sampler(0.0), num_samples=2,
      num_tokens=6, stop_ids=(first,)))
  rollout = jax.block_until_ready(run(PARAMS, make_prompts([TOKENS[0]]), KEY))
  jax.effects_barrier()
  assert calls == [8, 1]  # The prefill, and the step that draws the first token.
  np.testing.assert_array_equal(rollout.in_response[0], [[1, 0, 0, 0, 0, 0]] * 2)
  assert int(rollout.tokens[0, 0, 0]) == first


@pytest.mark.parametrize('suffix', [(), (4, 4, 2)])
def test_a_lone_row_equals_its_row_in_a_batch(suffix):
  """One slot has the layers' weights apart."""
  draw = jax.jit(functools.partial(groups.generate, MODEL, sampler=Sampler(), num_samples=1,
                                     num_tokens=9, stop_ids=(STOP,)))

  def ask(which):
    prompts = make_prompts([TOKENS[i] for i in which], ids=which)
    return dataclasses.replace(prompts, suffix=jnp.array([suffix] * len(which), jnp.int32)
                               if suffix else ())

  whole = draw(PARAMS, ask([0, 1, 2, 3]), KEY)
  for n in range(4):
    alone = draw(PARAMS, ask([n]), KEY)
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[n])
    np.testing.assert_allclose(alone.logp[0], whole.logp[n], atol=1e-5)


@pytest.mark.parametrize('sampler', [Sampler(), Sampler(0.0)])
def test_any_of_several_stop_tokens_ends_a_response(sampler):
  """Each of them ends some response, and the plain loop draws the same."""
  stops = tuple(int(t) for t in np.unique(np.asarray(generate(
      make_prompts(TOKENS), sampler, stop_ids=()).tokens[:, :, 1:4]))[:6])
  prompts = make_prompts(TOKENS)
  rollout, ended = generate(prompts, sampler, stop_ids=stops), set()
  for n, prompt in enumerate(TOKENS):
    for g in range(3):
      tokens, logps = slow_response(prompt, int(prompts.ids[n]), g, sampler, 6, stops)
      count = int(rollout.in_response[n, g].sum())
      assert rollout.tokens[n, g, :count].tolist() == tokens
      np.testing.assert_allclose(rollout.logp[n, g, :count], logps, atol=1e-5)
      np.testing.assert_array_equal(rollout.tokens[n, g, count:], stops[0])
      ended |= {tokens[-1]} & set(stops)
  assert len(ended) >= 2
