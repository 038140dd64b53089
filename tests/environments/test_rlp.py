"""RLP's reward against whole sequences, and that its step learns from thoughts alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.environments import rlp as environment
from jaxrl_pt.models import transformer
from jaxrl_pt.rl import advantages, rlp
from jaxrl_pt.train import fused, optim
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Prompts, RolloutBatch, TrainState

VOCAB, THINK, ANSWER = 11, 9, 10
CONFIG = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8,
                   vocab_size=VOCAB)
MODEL = transformer.build(CONFIG)


def make_params(seed):
  params = P.init(MODEL.specs, jax.random.key(seed))
  return {**params, 'embed': params['embed'] * 20}


THETA, PHI = make_params(0), make_params(1)
NO_KL = cfg.NoKL()
CONTEXTS, TRUTH = [[3, 1, 4], [5, 2], [6, 5, 3, 8]], [7, 1, 2]
PROMPTS = Prompts(jnp.array([[3, 1, 4, THINK, 0], [5, 2, THINK, 0, 0], [6, 5, 3, 8, THINK]]),
                  jnp.array([4, 3, 5]), jnp.arange(3),
                  extras={'continuation': jnp.array([[7], [1], [2]])})
# Ended by the marker at once, after two tokens, and cut off at the budget of three.
THOUGHTS = [[[ANSWER], [1, 2, ANSWER], [3, 4, 5]]] * 3


def log_probability(params, sequence, token):
  tokens = jnp.asarray([sequence])
  positions = jnp.arange(len(sequence))[None]
  hidden = MODEL.apply(params, tokens, positions, jnp.ones_like(positions))
  return float(jax.nn.log_softmax(hidden[0, -1] @ MODEL.head(params))[token])


def test_reward_equals_its_definition_on_whole_sequences():
  tokens, mask = np.zeros((3, 3, 3), np.int32), np.zeros((3, 3, 3), np.float32)
  expected = np.zeros((3, 3))
  for n in range(3):
    for g, thought in enumerate(THOUGHTS[n]):
      tokens[n, g, :len(thought)] = thought
      mask[n, g, :len(thought)] = 1
      words = [t for t in thought if t != ANSWER]
      with_thought = [*CONTEXTS[n], THINK, *words, ANSWER]
      expected[n, g] = (log_probability(THETA, with_thought, TRUTH[n])
                        - log_probability(PHI, CONTEXTS[n], TRUTH[n]))
  thoughts = RolloutBatch.of_one_turn(jnp.asarray(tokens), jnp.asarray(mask),
                                      jnp.zeros((3, 3, 3)), 0)
  got = jax.jit(lambda theta, phi: environment.thought_verdict(
      MODEL, theta, phi, PROMPTS, thoughts, environment.Markers(1, ANSWER)))(THETA, PHI)
  np.testing.assert_allclose(got.reward, expected, atol=1e-4)
  np.testing.assert_array_equal(got.correct, expected > 0)
  baseline = [log_probability(PHI, CONTEXTS[n], TRUTH[n]) for n in range(3)]
  np.testing.assert_allclose(got.parts['baseline'], np.tile(baseline, (3, 1)).T, atol=1e-4)
  np.testing.assert_allclose(got.parts['logp'], expected + got.parts['baseline'], atol=1e-4)
  assert np.abs(expected).max() > 0.1


def test_gain_average_and_advantage_by_hand():
  gain = rlp.information_gain(jnp.log(jnp.array([[0.5, 0.25]])), jnp.log(jnp.array([0.25])))
  np.testing.assert_allclose(gain, [[np.log(2), 0]], atol=1e-6)
  # G/(G − 1) · (r − mean) = 2 · (±ln 2 / 2)
  np.testing.assert_allclose(advantages.leave_one_out(gain, jnp.ones((1, 2))),
                             [[np.log(2), -np.log(2)]], atol=1e-6)
  mixed = rlp.average({'w': jnp.array([1.0])}, {'w': jnp.array([3.0])}, 0.75)
  np.testing.assert_allclose(mixed['w'], [1.5])
  with pytest.raises(AssertionError):
    rlp.information_gain(jnp.zeros((2, 2)), jnp.zeros((2, 2)))


@functools.cache
def compiled_step(kl=NO_KL):
  rollouts = cfg.Rollouts(num_prompts=3, group_size=8, prompt_len=5, response_tokens=2)
  algorithm = cfg.Algorithm(advantage=cfg.RLOO(), surrogate=cfg.PPOClip(),
                            aggregation=cfg.TokenMean(), kl=kl)
  run = cfg.Run(
      seed=0, model=CONFIG, objective=cfg.RPT(
          'unread', rollouts=rollouts, algorithm=algorithm, prediction=cfg.Reason(),
          reward=cfg.InformationGain()),
      data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
      optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.003), weight_decay=0.0),
      train=cfg.Train(num_steps=30, batch_size=4))
  optimizer = optim.make_optimizer(run.optimizer, 30, MODEL.specs)
  state = TrainState(jnp.zeros((), jnp.int32), THETA, optimizer.init(THETA),
                     states.new_method(rollouts, algorithm, CONFIG.d_model, average=THETA))
  verifier = environment.policy_verifier(
      environment.Markers(1, ANSWER), run.objective.reward.decay)
  return jax.jit(fused.make_fused_step(MODEL, optimizer, run, run.objective, verifier)), state


def test_step_raises_the_gain_and_keeps_the_average():
  step, state = compiled_step()
  gains = []
  for i in range(30):
    before = state
    state, metrics, thoughts, verdict = step(state, THETA, PROMPTS)
    gains.append(float(verdict.reward.mean()))
    assert int(state.step) == i + 1
    # Nothing of a response lies beyond the marker that ends the thought.
    ended = np.cumsum(np.asarray(thoughts.tokens) == ANSWER, -1) - (thoughts.tokens == ANSWER)
    np.testing.assert_array_equal(thoughts.in_response, ended == 0)
  want = jax.tree.map(lambda old, new: 0.999 * old + 0.001 * new, before.method.average,
                      state.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.method.average,
               want)
  assert metrics['mismatch'].mean() < 1.001
  np.testing.assert_allclose(
      metrics['reward'].mean(),
      metrics['reward/logp'].mean() - metrics['reward/baseline'].mean(), atol=1e-4)
  assert np.mean(gains[-5:]) > np.mean(gains[:5]) + 0.1


def test_kl_is_to_the_start_policy():
  """In the reward, −β (log π − log π_start) of each token: none where they are the same."""
  plain, state = compiled_step()
  punished, _ = compiled_step(cfg.KLInReward(1.0))
  free = plain(state, THETA, PROMPTS)[1]['grad_norm'].mean()
  same = punished(state, THETA, PROMPTS)[1]['grad_norm'].mean()
  apart = punished(state, PHI, PROMPTS)[1]['grad_norm'].mean()
  np.testing.assert_allclose(same, free, rtol=1e-3)
  assert abs(apart - free) > 0.1 * free


def test_a_gain_that_is_not_finite_leaves_the_whole_state():
  step, state = compiled_step()
  phi = {**PHI, 'embed': PHI['embed'].at[3].set(jnp.nan)}
  broken = dataclasses.replace(
      state, method=dataclasses.replace(state.method, average=phi))
  new, metrics, *_ = step(broken, THETA, PROMPTS)
  assert metrics['nonfinite'].sum == 1
  jax.tree.map(np.testing.assert_array_equal, new, broken)


def test_a_longer_budget_changes_nothing_for_thoughts_that_have_ended():
  short, long = (jax.jit(lambda p, s=s: environment.thought_verdict(
      MODEL, p, PHI, PROMPTS, RolloutBatch.of_one_turn(
          jnp.full((3, 1, s), 4).at[:, :, 1].set(ANSWER),
          jnp.zeros((3, 1, s)).at[:, :, :2].set(1), jnp.zeros((3, 1, s)), 0),
      environment.Markers(1, ANSWER)).reward)(THETA) for s in (2, 5))
  np.testing.assert_allclose(short, long, atol=1e-5)


def test_there_is_no_verdict_outside_the_step():
  verifier = environment.policy_verifier(environment.Markers(1, ANSWER), 0.999)
  assert verifier.stop_ids == (ANSWER,)
  with pytest.raises(TypeError, match='no verdict outside its step'):
    verifier.submit(PROMPTS, None, ())
