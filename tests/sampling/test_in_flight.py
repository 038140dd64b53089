"""The sampler that is in flight over several steps, against the on-policy one and a slow replay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import kv_cache, transformer
from jaxrl_pt.rl import tables
from jaxrl_pt.sampling import groups, in_flight, policies
from jaxrl_pt.sampling.admission import FILLED
from jaxrl_pt.sampling.state import RUNNING
from jaxrl_pt.train import scores
from jaxrl_pt.types import Prompts

VOCAB, STOP, SEED = 19, 12, 3
CONFIG = cfg.Model(num_layers=1, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8,
                   vocab_size=VOCAB)
MODEL = transformer.build(CONFIG)
NUM_PROMPTS, GROUP, PROMPT, RESPONSE, STEPS = 2, 3, 6, 16, 6


def rollouts_config(staleness, slots, **fields):
  return cfg.Rollouts(NUM_PROMPTS, GROUP, PROMPT, RESPONSE, mode=cfg.InFlight(staleness),
                      slots=slots, **fields)


# A document goes through the model in one piece, and so under one version.
FEW = cfg.Slots(slots=13, page_size=4, prefill_chunk=8, prefill_tokens=8)
CONFIGS = {
    'few_slots': rollouts_config(2, FEW),
    'a_slot_for_each': rollouts_config(1, cfg.Slots(page_size=8)),
    'few_pages': rollouts_config(3, dataclasses.replace(FEW, slots=3, num_pages=12, kv='int8')),
    'look_up': rollouts_config(2, dataclasses.replace(FEW, drafts=cfg.PromptLookup(2, 1))),
    'self_drafts': rollouts_config(1, dataclasses.replace(FEW, drafts=cfg.SparseDrafts(
        2, cfg.ReSA(block=4, min_blocks=1, local_blocks=1, refresh=cfg.RefreshNever()))))}
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != 'few_slots']


@functools.cache
def params_of(version):
  """Parameters far enough apart that a token of another version shows."""
  start, change = (P.init(MODEL.specs, jax.random.key(seed)) for seed in (0, 1 + version))
  params = jax.tree.map(lambda a, b: a + 0.3 * b, start, change)
  return {**params, 'embed': params['embed'] * 20}


@functools.cache
def prompts_of(batch):
  random = np.random.default_rng(batch)
  tokens = random.integers(0, VOCAB, (NUM_PROMPTS, PROMPT))
  # In every third batch a prompt stands twice, which then has further samples.
  ids = [batch, batch if batch % 3 == 0 else batch + 50]
  return Prompts(jnp.asarray(tokens, jnp.int32),
                 jnp.asarray(random.integers(1, PROMPT + 1, NUM_PROMPTS), jnp.int32),
                 jnp.asarray(ids, jnp.int32))


@functools.cache
def programs(name):
  config = CONFIGS[name]
  return list(map(jax.jit, in_flight.make_sampler(MODEL, SEED, config, (STOP,))))


def steps(name, params, first=0, sampler=None):
  """Yields (batch, what was drawn) for each step."""
  enqueue, draw = programs(name)
  sampler = jax.jit(lambda: in_flight.init(MODEL, CONFIGS[name]))() if sampler is None else sampler
  for batch in range(first, STEPS):
    for number in in_flight.entering(CONFIGS[name], batch):
      sampler = enqueue(sampler, prompts_of(number), jnp.asarray(number))
    drawn = draw(params(batch), sampler, jnp.asarray(batch), jnp.asarray(batch))
    sampler = drawn.in_flight
    yield batch, drawn


@functools.cache
def run(name):
  """All steps under parameters that change with every step."""
  return [drawn for _, drawn in steps(name, params_of)]


@pytest.mark.parametrize('name', ['few_slots', *OTHERS])
def test_constant_parameters_draw_what_the_on_policy_sampler_draws(name):
  kv = CONFIGS[name].slots.kv
  config = dataclasses.replace(CONFIGS[name], mode=cfg.OnPolicy(), slots=cfg.Slots(kv=kv))
  sample = jax.jit(groups.make_sampler(MODEL, SEED, config, (STOP,)))
  carried = 0
  for batch, drawn in steps(name, lambda _: params_of(0)):
    whole = sample(params_of(0), prompts_of(batch), jnp.asarray(batch), jnp.asarray(0))
    for field in ('tokens', 'in_response', 'sampled', 'turn'):
      np.testing.assert_array_equal(getattr(drawn.rollouts, field), getattr(whole, field))
    np.testing.assert_allclose(drawn.rollouts.logp, whole.logp, atol=2e-5)
    carried += float(drawn.metrics['carried_responses'].sum)
  assert carried > 0 or name == 'a_slot_for_each'


def replayed(name, batch, n, g):
  """logp of each token of a response, and the token that its noise draws, one token at a time.

  Every token goes through the model under the parameters of the step in which that happened.
  """
  rollouts, prompts = run(name)[batch].rollouts, prompts_of(batch)
  row = (batch % in_flight.num_batches(CONFIGS[name])) * NUM_PROMPTS + n
  is_filled = [bool((s.in_flight.slots.places.state[0, row] == FILLED)
                    & (s.in_flight.slots.places.content[0, row] == batch + 1)) for s in run(name)]
  filled_in = is_filled.index(True)
  length, count = int(prompts.lengths[n]), int(rollouts.in_response[n, g].sum())
  cache = MODEL.init_cache(1, PROMPT + RESPONSE)
  _, cache = extend(params_of(filled_in), prompts.tokens[n][None], jnp.arange(PROMPT)[None], cache)
  key = jax.random.fold_in(jax.random.key(SEED), batch)
  sample = g + GROUP * int((prompts.ids[:n] == prompts.ids[n]).sum())
  for part in (prompts.ids[n], sample):
    key = jax.random.fold_in(key, part)
  newest, logps, tokens = prompts.tokens[n, length - 1], [], []
  for i in range(count):
    fed, newest = newest, rollouts.tokens[n, g, i]
    token, logp, cache = draw_one(params_of(int(rollouts.version[n, g, i])), fed, newest, key,
                                  length + i, cache)
    tokens.append(int(token))
    logps.append(float(logp))
  return tokens, logps


@jax.jit
def draw_one(params, fed, newest, key, position, cache):
  """The token that the noise draws at a position, and the logp there of the newest one."""
  hidden, cache = extend(params, fed[None, None], jnp.full((1, 1), position - 1), cache)
  logits = hidden[0, 0] @ MODEL.head(params)
  token = policies.draw(jax.random.fold_in(key, position), logits).token
  return token, jax.nn.log_softmax(logits)[newest], cache


@jax.jit
def extend(params, tokens, positions, cache):
  return MODEL.extend(params, tokens, positions, cache, kv_cache.dense(positions))


@functools.cache
def mixed(name):
  """The places (batch, n, g) of responses that several versions have drawn."""
  return [(batch, n, g) for batch, drawn in enumerate(run(name)) for n in range(NUM_PROMPTS)
          for g in range(GROUP)
          if len({int(v) for v in drawn.rollouts.version[n, g][drawn.rollouts.sampled[n, g] > 0]})
          > 1]


def test_every_token_was_drawn_by_its_version():
  assert len(mixed('few_slots')) >= 5
  for batch, n, g in mixed('few_slots')[:5]:
    rollouts = run('few_slots')[batch].rollouts
    tokens, logps = replayed('few_slots', batch, n, g)
    np.testing.assert_array_equal(rollouts.tokens[n, g, :len(tokens)], tokens)
    np.testing.assert_allclose(rollouts.logp[n, g, :len(tokens)], logps, atol=5e-5)


def test_importance_weights_under_mixed_versions_equal_a_hand_computation():
  """min(π_now / π_drawn, cap), where each token's π_drawn is that of the version that drew it."""
  batches = [b for b, _, _ in mixed('few_slots')]
  batch = max(set(batches), key=batches.count)
  rollouts, prompts, now = run('few_slots')[batch].rollouts, prompts_of(batch), params_of(batch)
  found = jax.jit(functools.partial(scores.response_scores, MODEL, sampler=cfg.Sampler()))(
      now, prompts, rollouts.tokens)
  correction = cfg.TokenTIS(1.5)
  weights = tables.CORRECTIONS[cfg.TokenTIS].compute(correction, found.logp, rollouts.logp,
                                                     rollouts.sampled)
  by_hand = []
  for n, g in [(n, g) for b, n, g in mixed('few_slots') if b == batch]:
    _, drawn = replayed('few_slots', batch, n, g)
    length, count = int(prompts.lengths[n]), len(drawn)
    text = [*prompts.tokens[n, :length].tolist(), *rollouts.tokens[n, g, :count].tolist()]
    padded = np.array([text + [0] * (PROMPT + RESPONSE - len(text))])
    logits = apply(now, padded)
    for i, logp in enumerate(drawn):
      z = np.asarray(logits[length + i - 1], np.float64)
      log_now = z[text[length + i]] - np.log(np.exp(z - z.max()).sum()) - z.max()
      by_hand.append(min(np.exp(log_now - logp), 1.5))
      np.testing.assert_allclose(weights[n, g, i], by_hand[-1], rtol=1e-3)
  assert min(by_hand) < 0.7 and 0.7 < np.median(by_hand) < 1.5 and max(by_hand) == 1.5


@jax.jit
def apply(params, tokens):
  positions = jnp.arange(tokens.shape[1])[None]
  return MODEL.apply(params, tokens, positions, jnp.ones_like(tokens))[0] @ MODEL.head(params)


@pytest.mark.parametrize('name', ['few_slots', OTHERS[0]])
def test_no_token_is_older_than_the_bound(name):
  most, bound = 0, CONFIGS[name].mode.staleness
  for batch, drawn in enumerate(run(name)):
    sampled = np.asarray(drawn.rollouts.sampled) > 0
    behind = (batch - np.asarray(drawn.rollouts.version))[sampled]
    assert behind.min() >= 0 and behind.max() <= bound
    most = max(most, behind.max())
    metrics = {key: float(value.mean()) for key, value in drawn.metrics.items()}
    np.testing.assert_allclose(metrics['versions_behind'], behind.mean(), rtol=1e-6)
    assert metrics['most_versions_behind'] == behind.max()
    assert 0 <= metrics['slot_occupancy'] <= 1
  assert most == bound


def test_every_token_counts_once_and_nothing_leaks():
  drawn_tokens = sum(float(d.metrics['drawn_tokens'].sum) for d in run('few_slots'))
  sampled = sum(float(d.rollouts.sampled.sum()) for d in run('few_slots'))
  last = run('few_slots')[-1].in_flight
  count = np.asarray(last.slots.responses.count).reshape(-1, NUM_PROMPTS * GROUP)
  under_way = count[[b % len(count) for b in range(STEPS, STEPS + len(count) - 1)]].sum()
  assert drawn_tokens == sampled + under_way
  places = last.slots.places
  held = sum((np.asarray(table) != 0).sum() for table in (places.pages, places.table))
  assert int(places.holders.sum()) == held + 1  # The one of page 0.


def test_a_batch_is_under_way_before_it_begins():
  """What the last batch in its rows has left must not look like its own end."""
  number, before = STEPS + CONFIGS['few_slots'].mode.staleness, run('few_slots')[-1].in_flight
  after = programs('few_slots')[0](before, prompts_of(number), jnp.asarray(number))
  size = NUM_PROMPTS * GROUP
  rows = slice(number % 3 * size, (number % 3 + 1) * size)
  assert (before.slots.responses.finish[0, rows] != RUNNING).all()
  assert (after.slots.responses.finish[0, rows] == RUNNING).all()
  assert (after.slots.responses.count[0, rows] == 0).all()


def test_a_checkpoint_in_the_middle_changes_no_bit(tmp_path):
  """The sampler goes through Orbax between any two steps."""
  whole = run('few_slots')
  for stop in (1, 4):  # Before the first batches have all begun, and with all parts taken.
    path = tmp_path / str(stop)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, whole[stop - 1].in_flight)
      checkpointer.wait_until_finished()
      restored = checkpointer.restore(path, jax.eval_shape(
          lambda: in_flight.init(MODEL, CONFIGS['few_slots'])))
    for batch, drawn in steps('few_slots', params_of, stop, restored):
      for a, b in zip(jax.tree.leaves(drawn), jax.tree.leaves(whole[batch]), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
