"""The step as one program, on RPT: against plain forms, and that it learns."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling import policies
from jaxrl_pt.token_bytes import token_table
from jaxrl_pt.train import fused, optim, scores, update
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Array, Prompts, RolloutBatch, TrainBatch, TrainState
from jaxrl_pt.verifiers import next_token as verifier

VOCAB = 13
CONFIG = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8,
                   vocab_size=VOCAB, activation='relu2', sub_norm=True)
MODEL = transformer.build(CONFIG)
PARAMS = P.init(MODEL.specs, jax.random.key(0))
PARAMS = {**PARAMS, 'embed': PARAMS['embed'] * 20}
TOKEN_BYTES = [b'', *(bytes([96 + i]) for i in range(1, VOCAB - 1)), b'ab']
TABLE = token_table(TOKEN_BYTES, VOCAB)
VERIFY = verifier.device_verifier(TABLE)

CONTEXTS = [[3, 1, 4, 1], [9, 2], [6, 5, 3, 5, 8], [11]]
TRUTH = [[1, 2, 3, 4], [7, 7, 0], [12, 5, 6, 1], [4]]


def make_prompts(width=4, prompt_len=6):
  def pad(rows, length):
    return jnp.asarray([r + [0] * (length - len(r)) for r in rows], jnp.int32)

  def count(rows):
    return jnp.asarray([len(r) for r in rows], jnp.int32)

  return Prompts(pad(CONTEXTS, prompt_len), count(CONTEXTS),
                 jnp.arange(len(CONTEXTS), dtype=jnp.int32), extras={
                     'continuation': pad(TRUTH, width), 'continuation_lengths': count(TRUTH)})


def make_run(method, learning_rate=0.01):
  return cfg.Run(
      seed=1, model=CONFIG, objective=method,
      data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
      optimizer=cfg.AdamW(schedule=cfg.ConstantRate(learning_rate), weight_decay=0.0),
      train=cfg.Train(num_steps=40, batch_size=4))


# --- The learner equals the plain form ------------------------------------------


class Trajectory(NamedTuple):
  """Responses with an advantage for each token."""

  prompts: Prompts
  rollouts: RolloutBatch
  advantage: Array  # f32[N, G, S]


def plain_loss(params, trajectory, sampler):
  """Every response as a sequence of its own through `apply`, token by token."""
  prompts, rollouts = trajectory.prompts, trajectory.rollouts
  n, g, s = rollouts.tokens.shape
  contexts = np.asarray(prompts.tokens)
  lengths, drawn = np.asarray(prompts.lengths), np.asarray(rollouts.tokens)
  rows = np.zeros((n * g, contexts.shape[1] + s), np.int32)
  for i in range(n):
    for j in range(g):
      sequence = [*contexts[i, :lengths[i]], *drawn[i, j]]
      rows[i * g + j, :len(sequence)] = sequence
  positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
  hidden = MODEL.apply(params, jnp.asarray(rows), positions, jnp.ones_like(positions))
  index = np.repeat(lengths, g)[:, None] - 1 + np.arange(s)
  logits = jnp.take_along_axis(hidden, index[..., None], axis=1) @ MODEL.head(params)
  filtered = policies.learner_logits(logits.reshape(n, g, s, -1), rollouts.tokens, sampler)
  logp = jnp.take_along_axis(jax.nn.log_softmax(filtered), rollouts.tokens[..., None], -1)[..., 0]
  return -(trajectory.advantage * logp * rollouts.sampled).sum() / (n * g), logp


@pytest.mark.parametrize('num_tokens, sampler, chunk', [
    (3, cfg.Sampler(0.8, top_k=9), 7), (1, cfg.Sampler(), 0)])
def test_learner_equals_whole_sequences(num_tokens, sampler, chunk):
  rng = np.random.default_rng(0)
  shape = (4, 3, num_tokens)
  length = rng.integers(1, num_tokens + 1, shape[:2])
  rollouts = RolloutBatch.of_one_turn(
      jnp.asarray(rng.integers(0, VOCAB, shape), jnp.int32),
      jnp.asarray(np.arange(num_tokens) < length[..., None], jnp.float32), jnp.zeros(shape), 0)
  trajectory = Trajectory(make_prompts(), rollouts, jnp.asarray(rng.normal(size=shape)))
  weights = rollouts.sampled / (4 * 3)
  batch = TrainBatch(
      trajectory.prompts, rollouts.tokens, rollouts.sampled, *[jnp.zeros(shape)] * 3,
      trajectory.advantage, jnp.zeros(shape), weights)
  loss = update.make_loss(MODEL, sampler, cfg.Algorithm(), chunk)

  def grouped(params):
    found = scores.response_scores(MODEL, params, trajectory.prompts, rollouts.tokens, sampler)
    return loss((params, {}), batch)[0], found.logp

  plain = functools.partial(plain_loss, trajectory=trajectory, sampler=sampler)
  (got, got_logp), got_grad = jax.jit(jax.value_and_grad(grouped, has_aux=True))(PARAMS)
  (want, want_logp), want_grad = jax.jit(jax.value_and_grad(plain, has_aux=True))(PARAMS)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(got_logp * rollouts.sampled, want_logp * rollouts.sampled, atol=1e-4)
  for a, b in zip(jax.tree.leaves(got_grad), jax.tree.leaves(want_grad), strict=True):
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


# --- The whole step -------------------------------------------------------------

METHOD = cfg.RPT('unused', rollouts=cfg.Rollouts(
    num_prompts=4, group_size=16, prompt_len=6, response_tokens=2,
    sampler=cfg.Sampler(0.9, top_k=12)))


@functools.cache
def compiled_step():
  run = make_run(METHOD)
  optimizer = optim.make_optimizer(run.optimizer, run.train.num_steps, MODEL.specs)
  step = jax.jit(fused.make_fused_step(MODEL, optimizer, run, METHOD, VERIFY, stop_ids=(0,)))
  kept = states.new_method(METHOD.rollouts, METHOD.algorithm, CONFIG.d_model)
  return step, TrainState(jnp.zeros((), jnp.int32), PARAMS, optimizer.init(PARAMS), kept)


def test_reward_rises_and_sampler_and_trainer_agree():
  step, state = compiled_step()
  rewards = []
  for i in range(40):
    state, metrics, *_ = step(state, PARAMS, make_prompts())
    assert int(state.step) == i + 1
    rewards.append(float(metrics['reward'].mean()))
    assert 1 <= float(metrics['mismatch'].mean()) < 1.001
    assert float(metrics['nonfinite'].mean()) == 0
    assert float(metrics['grad_norm'].mean()) >= 0
  assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.3
  assert metrics['reward'].count == 64
  assert metrics['accuracy'].mean() == metrics['reward'].mean()
  assert 1 <= float(metrics['response_length'].mean()) <= 2
  assert metrics['zero_advantage_groups'].count == 4
  np.testing.assert_allclose(metrics['learning_rate'].mean(), 0.01, rtol=1e-6)


def test_same_state_gives_the_same_step_and_another_step_other_noise():
  step, state = compiled_step()
  first, second = (step(state, PARAMS, make_prompts()) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  later, *_ = step(state.replace(step=jnp.asarray(5, jnp.int32)), PARAMS, make_prompts())
  assert (later.params['embed'] != first[0].params['embed']).any()


def test_a_step_that_is_not_finite_changes_nothing():
  step, state = compiled_step()
  layers = {**PARAMS['layers'], 'wo': PARAMS['layers']['wo'].at[1, 0, 0].set(jnp.inf)}
  broken = state.replace(params={**PARAMS, 'layers': layers})
  after, metrics, *_ = step(broken, PARAMS, make_prompts())
  assert float(metrics['nonfinite'].mean()) == 1
  jax.tree.map(np.testing.assert_array_equal, after, broken)
