"""The learner's replay of sparse decoding against the sampler and against a slow definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.config import RefreshEvery, RefreshNever, ReSA, Sampler
from jaxrl_pt.models import transformer
from jaxrl_pt.nn import attention, block_selection
from jaxrl_pt.sampling import groups, policies, prefill, resa_replay
from jaxrl_pt.train import fused, optim, scores
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Prompts, TrainState, Verdict

CONFIG = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=8,
                   vocab_size=19, tied_head=False)
MODEL = transformer.build(CONFIG)
BLOCK, NUM_TOKENS, STOP = 4, 14, 15
SAMPLER = Sampler(0.9, top_p=0.95)


def opinionated(params):
  """A random model attends to nothing in particular; in this one it matters what is read."""
  layers = {**params['layers'], 'wq': params['layers']['wq'] * 4,
            'wo': params['layers']['wo'] * 4}
  return {'embed': params['embed'] * 50, 'head': params['head'] * 4, 'layers': layers,
          'final_norm': params['final_norm']}


PARAMS = opinionated(P.init(MODEL.specs, jax.random.key(0)))
LENGTHS = (11, 8, 3)
PROMPTS = Prompts(jax.random.randint(jax.random.key(1), (3, 11), 0, 19), jnp.array(LENGTHS),
                  jnp.array([4, 7, 9]))


def settings(refresh):
  return ReSA(BLOCK, 0.1, min_blocks=2, refresh=refresh, replay=True)


@functools.cache
def rollout(refresh):
  return jax.jit(functools.partial(
      groups.generate, MODEL, sampler=SAMPLER, sparse=settings(refresh), num_samples=2,
      num_tokens=NUM_TOKENS, stop_ids=(STOP,)))(PARAMS, PROMPTS, jax.random.key(7))


def mismatch(drawn, logp):
  """max exp|log π_train − log π_sampler| − 1 over drawn tokens."""
  return float((np.expm1(np.abs(logp - drawn.logp)) * drawn.sampled).max())


# The last chunk is whole or not; chunks of one token; a chunk longer than the response; no chunk.
@pytest.mark.parametrize('refresh', [
    RefreshEvery(4), *(pytest.param(refresh, marks=pytest.mark.slow) for refresh in (
        *map(RefreshEvery, (1, 5, 13, 40)), RefreshNever()))], ids=str)
def test_the_learner_computes_the_policy_of_the_sampler(refresh):
  drawn = rollout(refresh)
  logp = lambda rollouts: scores.response_scores(
      MODEL, PARAMS, PROMPTS, rollouts.tokens, SAMPLER, selected=rollouts.selected).logp
  replayed, dense = jax.jit(lambda r: (logp(r), logp(r.replace(selected=()))))(drawn)
  assert mismatch(drawn, replayed) < 1e-5
  assert mismatch(drawn, dense) > 1e-2  # Blocks were left out, and it matters.
  lengths = np.asarray(drawn.lengths())
  assert lengths.min() < NUM_TOKENS and lengths.max() == NUM_TOKENS


def test_what_is_recorded():
  """n of the M blocks of each drawn token's context, the newest always; none of the first token."""
  drawn = rollout(RefreshEvery(4))
  bits = np.asarray(block_selection.unpacked(drawn.selected.bits))
  assert bits.shape[:6] == (3, 2, NUM_TOKENS, 2, 2, 32) and not bits[:, :, 0].any()
  for n, length in enumerate(LENGTHS):
    for s in range(1, NUM_TOKENS):
      num_blocks = -(-(length + s) // BLOCK)
      for g in range(2):
        read = bits[n, g, s]
        if s > int(drawn.lengths()[n, g]):  # Its response has ended.
          assert not read.any()
        elif s < int(drawn.lengths()[n, g]):
          assert (read.sum(-1) == min(2, num_blocks)).all() and not read[..., num_blocks:].any()
          assert read[..., num_blocks - 1].all()


def test_bits_of_lists():
  blocks = jnp.array([[0, 5, 31], [32, 69, 70], [70, 70, 71]])
  bits = block_selection.packed(blocks, 70)
  assert bits.shape == (3, 3)
  expected = [[0, 5, 31], [32, 69], []]
  assert [np.flatnonzero(row).tolist() for row in block_selection.unpacked(bits)] == expected


# --- Slow definition --------------------------------------------------------------------


@jax.jit
def slow_extend(params, cache, tokens_T, start, seen_LKTP):
  """Feeds some tokens to one array of keys and values [L, k or v, position, K, E] under a mask."""
  def attend(q, k, v, cache, layer):
    cache = jax.lax.dynamic_update_slice(cache, jnp.concatenate([k, v])[None],
                                         (layer, 0, start, 0, 0))
    outs = []
    for head in range(2):
      k, v = (cache[layer, i, None, :, head:head + 1] for i in (0, 1))
      outs.append(attention.attention(q[:, :, 2 * head:2 * head + 2], k, v,
                                      seen_LKTP[layer, head][None]))
    return jnp.concatenate(outs, 2), cache

  positions = start + jnp.arange(len(tokens_T))
  hidden, cache = MODEL.extend(params, tokens_T[None], positions[None], cache, attend)
  return hidden[0, -1], cache


def slow_logp(params, drawn, n, g, window):
  """One token at a time, rectified after every `window`; it attends to the recorded blocks."""
  length, num_drawn = LENGTHS[n], int(drawn.in_response[n, g].sum())
  tokens = np.concatenate([PROMPTS.tokens[n, :length], drawn.tokens[n, g, :num_drawn]])
  is_read = np.asarray(block_selection.unpacked(drawn.selected.bits[n, g]))  # [S, L, K, blocks]
  places = np.arange(len(tokens))

  def extend(cache, start, end, read=True):
    seen = np.broadcast_to(places <= np.arange(start, end)[:, None],
                           (2, 2, end - start, len(tokens)))
    return slow_extend(params, cache, tokens[start:end], start, seen & read)

  cache = jnp.zeros((2, 2, len(tokens), 2, 8))
  for i in range(length):
    hidden, cache = extend(cache, i, i + 1)
  hiddens = [hidden]
  for step in range(1, num_drawn):
    read = is_read[step][:, :, None, places // BLOCK]
    hidden, cache = extend(cache, length + step - 1, length + step, read)
    hiddens.append(hidden)
    if step % window == 0:
      _, cache = extend(cache, length + step - window, length + step)
  return slow_scores(params, jnp.stack(hiddens), tokens[length:])


@jax.jit
def slow_scores(params, hidden, tokens):
  logits = policies.learner_logits(hidden @ MODEL.head(params), tokens, SAMPLER)
  return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], 1)[:, 0]


@functools.cache
def slow_gradient():
  drawn = jax.tree.map(np.asarray, rollout(RefreshEvery(4)))
  n, g = 2, 0
  assert drawn.lengths()[n, g] == NUM_TOKENS
  weights = jax.random.normal(jax.random.key(2), (NUM_TOKENS,))

  def loss(params):
    logp = slow_logp(params, drawn, n, g, 4)
    return (weights * logp).sum(), logp

  return (n, g), weights, jax.value_and_grad(loss, has_aux=True)(PARAMS)


@pytest.mark.parametrize('prefilled, at_once', [
    (False, 'one'), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (True, 'one'), (False, 'many'), (True, 'many')))])
def test_value_and_gradient_equal_the_slow_definition(prefilled, at_once, monkeypatch):
  drawn = rollout(RefreshEvery(4))
  if at_once == 'one':
    monkeypatch.setattr(resa_replay, 'QUERIES_AT_ONCE', 8)
  (n, g), weights, ((_, expected_logp), expected) = slow_gradient()

  def loss(params):
    shared = prefill.prefill(MODEL, params, PROMPTS.tokens) if prefilled else None
    hidden = resa_replay.response_hidden(MODEL, params, PROMPTS, drawn.tokens, drawn.selected,
                                         shared)
    logp = scores.of_hidden(MODEL, params, hidden, drawn.tokens, SAMPLER, 0).logp[n, g]
    return (weights * logp).sum(), logp

  (_, logp), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
  np.testing.assert_allclose(logp, expected_logp, atol=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()) + 1e-7)


# --- A step of reinforcement learning ---------------------------------------------------


@pytest.mark.parametrize('replay', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_step_draws_sparsely_and_learns_from_the_policy_that_drew(replay):
  sparse = dataclasses.replace(settings(RefreshEvery(4)), replay=replay)
  rollouts = cfg.Rollouts(3, 2, 11, NUM_TOKENS, SAMPLER, sparse=sparse)
  algorithm = cfg.Algorithm(correction=cfg.TokenTIS())
  run = cfg.Run(
      seed=1, model=CONFIG, objective=cfg.RPT('unused', rollouts=rollouts, algorithm=algorithm),
      data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
      optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.01)),
      train=cfg.Train(num_steps=4, batch_size=3, accumulation=3))
  optimizer = optim.make_optimizer(run.optimizer, 4, MODEL.specs)

  def verify(prompts, drawn):
    reward = (drawn.tokens % 2).mean(-1)
    return Verdict(reward, jnp.ones_like(reward), reward)

  step = jax.jit(fused.make_fused_step(MODEL, optimizer, run, run.objective, verify, (STOP,)))
  _, metrics, drawn, _ = step(
      TrainState(jnp.zeros((), jnp.int32), PARAMS, optimizer.init(PARAMS),
                 states.new_method(rollouts, algorithm, CONFIG.d_model)), PARAMS, PROMPTS)
  gap = float(metrics['mismatch'].mean()) - 1
  assert float(metrics['grad_norm'].mean()) > 0
  if replay:
    assert 0 <= gap < 1e-5 and abs(float(metrics['correction'].mean()) - 1) < 1e-5
  else:
    assert gap > 1e-2 and drawn.selected == ()
    assert float(metrics['correction'].mean()) < 1 - 1e-3
