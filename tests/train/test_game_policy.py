"""The update of a policy of a game, beside the plain gradient of what it says it does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import game_policy
from jaxrl_pt.models.told import Shape
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.train import game_policy as learning
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states
from jaxrl_pt.types import GameRollouts

SHAPE = Shape(frame=(8, 12), display_rows=2, num_actions=3, stay=1, num_events=2, digits=(3,),
              num_contents=4, view=(1, 3), grid=(2, 0, 4, 4))
CONFIG = cfg.GamePolicy(num_frames=2, channels=(4, 6), hidden=5)
POLICY = game_policy.build(CONFIG, SHAPE)
N, G, S = 2, 3, 4
GAMMA = 0.8
REINFORCE = cfg.Algorithm(advantage=cfg.ReinforcePlusPlus(GAMMA), aggregation=cfg.TokenMean())


def quick(function):
  return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})


def params_of():
  rng = np.random.default_rng(0)
  return P.map_specs(lambda spec: jnp.asarray(0.4 * rng.normal(size=spec.shape), jnp.float32),
                     POLICY.specs)


def rollouts(**changes):
  rng = np.random.default_rng(1)
  counts = np.ones((N, G, S), np.float32)
  counts[1, 2, 2:] = 0  # One game is over after two actions.
  draw = lambda low, high: jnp.asarray(rng.integers(low, high, (N, G, S)), jnp.float32)
  found = GameRollouts(
      frames=jnp.asarray(rng.random((N, G, S + 1, 8, 12, 3)), jnp.float32),
      actions=draw(0, 3).astype(jnp.int32), logp=jnp.zeros((N, G, S)), counts=jnp.asarray(counts),
      rewards=draw(0, 3), true_rewards=draw(0, 2), readable=draw(0, 2), changed=draw(0, 2),
      false=draw(0, 2))
  return dataclasses.replace(found, **changes)


def make_run(algorithm, **train):
  return cfg.Run(0, CONFIG, cfg.Trajectories(cfg.Traveler(), num_frames=S + 1),
                 cfg.GameRL(group_size=G, algorithm=algorithm), cfg.AdamW(cfg.ConstantRate(0.1)),
                 cfg.Train(num_steps=4, batch_size=N, **train))


@functools.cache
def learner(algorithm, accumulation=1):
  """A state before its first step, and the jitted `learn`."""
  run = make_run(algorithm, accumulation=accumulation)
  optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), POLICY.specs)
  value = states.new_value(algorithm.advantage, CONFIG.hidden)
  method = lambda params: states.MethodState({}, value, {}, {})
  abstract = states.abstract_state(POLICY, optimizer, make_mesh(cfg.Mesh()), method)
  state = states.state_of(POLICY, params_of(), optimizer, abstract, method)
  return state, quick(learning.make_learner(POLICY, optimizer, run, algorithm))


def learned(algorithm, played, accumulation=1):
  state, learn = learner(algorithm, accumulation)
  return learn(state, played)


def gradients(state):
  """Adam's first moment after one step is (1 − b1) times the clipped gradient."""
  clip, adam, *_ = state.opt_state
  return adam.mu


def log_policy(params, frames, actions):
  """f32[N · G · S]: log π of each action, from the frame that it answers and the one before it."""
  frames, rows = np.asarray(frames), []
  for n, g, time in np.ndindex(actions.shape):
    rows.append(np.stack([frames[n, g, max(time - 1, 0)], frames[n, g, time]]))
  logp = jax.nn.log_softmax(POLICY.hidden(params, jnp.asarray(np.stack(rows))) @ params['out'])
  return logp[np.arange(len(rows)), np.asarray(actions).reshape(-1)]


def test_the_gradient_is_that_of_rewards_to_go():
  """REINFORCE++ without its whitening would be this; with it, shifted and scaled."""
  played = rollouts()
  counts, rewards = np.asarray(played.counts), np.asarray(played.rewards)
  to_go = np.zeros((N, G, S))
  for time in reversed(range(S)):
    later = to_go[..., time + 1] if time + 1 < S else 0.0
    to_go[..., time] = (rewards[..., time] + GAMMA * later) * counts[..., time]
  counted = to_go[counts > 0]
  advantage = (to_go - counted.mean()) / np.sqrt(counted.var(ddof=1) + 1e-8) * counts

  def loss(params):
    logp = log_policy(params, played.frames, played.actions)
    return -(advantage.reshape(-1) * logp).sum() / counts.sum()

  state, metrics = learned(REINFORCE, played)
  want = quick(jax.grad(loss))(params_of())
  scale = min(1.0, 1.0 / float(optim.global_norm(want)))
  for a, b in zip(jax.tree.leaves(gradients(state)), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a / 0.1, scale * b, rtol=2e-3, atol=1e-5)
  assert int(state.step) == 1
  assert float(metrics['reward'].mean()) == pytest.approx((rewards * counts).sum() / (N * G))
  assert float(metrics['true_reward'].mean()) == pytest.approx(
      float(played.true_rewards.sum()) / (N * G))
  assert float(metrics['unreadable'].mean()) == pytest.approx(
      1 - (np.asarray(played.readable) * counts).sum() / counts.sum())
  wrong = np.asarray(played.false) * np.asarray(played.changed)
  assert float(metrics['false_events'].mean()) == pytest.approx(
      wrong.sum() / np.asarray(played.changed).sum())


def test_what_comes_after_the_end_changes_nothing():
  played = rollouts()
  over = played.counts == 0
  other = dataclasses.replace(
      played, rewards=jnp.where(over, 77.0, played.rewards),
      actions=jnp.where(over, 2 - played.actions, played.actions))
  for a, b in zip(*(jax.tree.leaves(gradients(learned(REINFORCE, one)[0]))
                    for one in (played, other)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize('parts', [{'advantage': cfg.GAE()}, {'advantage': cfg.GRPO()},
                                   {'advantage': cfg.OptimalTokenBaseline()},
                                   {'surrogate': cfg.GSPO(), 'advantage': cfg.RLOO()}], ids=str)
def test_micro_batches_change_nothing_and_minibatches_are_updates(parts):
  algorithm = cfg.Algorithm(**parts)
  (whole, metrics), (sliced, others) = (learned(algorithm, rollouts(), accumulation=number)
                                        for number in (1, 2))
  for a, b in zip(jax.tree.leaves(gradients(whole)), jax.tree.leaves(gradients(sliced)),
                  strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
  assert metrics.keys() == others.keys()
  several = dataclasses.replace(
      algorithm, minibatches=2, epochs=2,
      surrogate=algorithm.surrogate if 'surrogate' in parts else cfg.PPOClip())
  state, metrics = learned(several, rollouts())
  assert int(state.opt_state[1].count) == 4 and int(state.step) == 1
  assert float(metrics['loss'].count) == 4


def test_a_loss_that_is_not_finite_leaves_everything_alone():
  state, metrics = learned(REINFORCE,
                           rollouts(frames=jnp.full((N, G, S + 1, 8, 12, 3), jnp.nan)))
  assert float(metrics['nonfinite'].sum) == 1 and int(state.step) == 0
  jax.tree.map(np.testing.assert_array_equal, state.params, params_of())


def test_a_new_policy_draws_all_actions_alike():
  params = P.init(POLICY.specs, jax.random.key(0))
  hidden = quick(POLICY.hidden)(params, rollouts().frames[0, :, :2])
  assert hidden.shape == (G, 5) and np.abs(hidden).max() > 0
  np.testing.assert_array_equal(hidden @ POLICY.head(params), 0)
  assert POLICY.multiply_adds == (9 * 6 * 4 * 4 * 6) + (9 * 4 * 6 * 2 * 3) + 36 * 5 + 5 * 3
