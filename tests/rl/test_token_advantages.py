"""Per-token advantages against hand-worked numbers and loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.rl import advantages
from jaxrl_pt.rl import token_advantages as adv

# The third token of the first response is not the policy's own.
MASK = np.array([[[1, 1, 0, 1], [1, 1, 0, 0]]], np.float32)


def draw(seed=0, shape=(3, 4, 6)):
  """Rewards, values and a mask with holes, one row of it empty."""
  random = np.random.default_rng(seed)
  mask = (random.random(shape) < 0.7).astype(np.float32)
  mask[0, 0] = 0
  return (*random.normal(size=(2, *shape)).astype(np.float32), mask)


def test_terminal_rewards():
  got = adv.terminal_rewards(jnp.array([[2.0, -1.0]]), MASK)
  np.testing.assert_array_equal(got, [[[0, 0, 0, 2], [0, -1, 0, 0]]])
  np.testing.assert_array_equal(adv.terminal_rewards(jnp.array([[2.0, -1.0]]), 0 * MASK), 0)


def test_reward_to_go_by_hand():
  rewards = np.array([[[1, 2, 50, 4], [3, -2, 50, 50]]], np.float32)
  got = adv.reward_to_go(rewards, MASK, 0.5)
  # 1 + 2/2 + 4/4: the masked token takes neither a reward nor a discount.
  np.testing.assert_allclose(got, [[[3, 4, 0, 4], [2, -2, 0, 0]]])


def test_whiten():
  values, _, mask = draw(1)
  got = np.asarray(adv.whiten(values, mask))
  kept = got[mask > 0]
  np.testing.assert_allclose([kept.mean(), kept.std(ddof=1)], [0, 1], atol=1e-5)
  np.testing.assert_array_equal(got[mask == 0], 0)
  # By hand: 1 and 3 have mean 2 and unbiased variance 2.
  np.testing.assert_allclose(adv.whiten(jnp.array([[[1.0, 3.0, 9.0]]]),
                                        jnp.array([[[1.0, 1.0, 0.0]]])),
                             [[[-0.5**0.5, 0.5**0.5, 0]]], rtol=1e-6)


@pytest.mark.parametrize('value', [0.1, 0.7, -4.21, 1 / 3, 12345.67, 1e-20, 3e30])
def test_equal_rewards_of_any_value_are_exactly_no_advantage(value):
  """However many tokens and whatever stands where no token counts; under jit."""
  random = np.random.default_rng(0)
  mask = (random.random((5, 8, 33)) < 0.7).astype(np.float32)
  valid = mask.any(-1).astype(np.float32)
  reward = np.full((5, 8), value, np.float32)
  logp = -random.random(mask.shape).astype(np.float32)
  rewards = adv.terminal_rewards(reward, mask)
  for function in (
      lambda: adv.whiten(jnp.where(mask > 0, jnp.float32(value), jnp.nan), mask),
      lambda: adv.reinforce_plus_plus(rewards, mask, 1.0),
      lambda: adv.reinforce_plus_plus_baseline(reward, mask, valid),
      lambda: adv.whiten(adv.generalised(rewards, 0 * mask, mask, 1.0, 1.0)[0], mask),
      lambda: adv.optimal_token_baseline(rewards, logp, 0 * mask, mask)):
    np.testing.assert_array_equal(jax.jit(function)(), 0)


def test_reinforce_plus_plus_by_hand():
  rewards = adv.terminal_rewards(jnp.array([[1.0, 0.0]]), MASK)
  # Undiscounted: 1, 1, 1 and 0, 0 over five tokens; mean 3/5, squares 3·4/25 + 2·9/25 = 6/5.
  scale = (6 / 5 / 4)**-0.5
  np.testing.assert_allclose(adv.reinforce_plus_plus(rewards, MASK, 1.0),
                             scale * np.array([[[0.4, 0.4, 0, 0.4], [-0.6, -0.6, 0, 0]]]),
                             rtol=1e-5)
  discounted = adv.reinforce_plus_plus(rewards, MASK, 0.5)
  np.testing.assert_allclose(discounted, adv.whiten(jnp.array(
      [[[0.25, 0.5, 0, 1], [0, 0, 0, 0]]]), MASK), rtol=1e-5)


def test_reinforce_plus_plus_baseline_takes_the_group_mean_first():
  reward = jnp.array([[1.0, 0.0], [5.0, 5.0]])
  mask = jnp.ones((2, 2, 3)).at[1, 1].set(0)
  valid = jnp.array([[1.0, 1.0], [1.0, 0.0]])
  got = adv.reinforce_plus_plus_baseline(reward, mask, valid)
  centred = advantages.mean_centred(reward, valid)
  # ½ on three tokens, −½ on three, 0 on three: variance 6 · ¼ / 8.
  np.testing.assert_allclose(got, centred[..., None] * mask / (6 / 4 / 8)**0.5, rtol=1e-5)


def gae_by_loops(rewards, values, mask, gamma, lam):
  """The sum of δ over the tokens that count, as the paper writes it."""
  advantage = np.zeros_like(rewards)
  for n, g in np.ndindex(*rewards.shape[:2]):
    own = np.flatnonzero(mask[n, g])
    value = np.append(values[n, g, own], 0)
    delta = rewards[n, g, own] + gamma * value[1:] - value[:-1]
    for i, t in enumerate(own):
      advantage[n, g, t] = sum((gamma * lam)**k * d for k, d in enumerate(delta[i:]))
  return advantage, (advantage + values) * mask


@pytest.mark.parametrize('gamma, lam', [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.7, 0.0)])
def test_generalised_equals_its_definition(gamma, lam):
  arrays = draw(2)
  for got, expected in zip(adv.generalised(*arrays, gamma, lam),
                           gae_by_loops(*arrays, gamma, lam), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_generalised_by_hand_and_in_its_limits():
  rewards, values = jnp.array([[[0.0, 0.0, 1.0]]]), jnp.array([[[0.5, 0.25, 0.75]]])
  ones = jnp.ones_like(rewards)
  # δ = −0.25, 0.5, 0.25; A = δ + ½ A'.
  got, returns = adv.generalised(rewards, values, ones, 1.0, 0.5)
  np.testing.assert_allclose(got, [[[0.0625, 0.625, 0.25]]])
  np.testing.assert_allclose(returns, [[[0.5625, 0.875, 1.0]]])
  everything, _ = adv.generalised(rewards, values, ones, 0.9, 1.0)
  np.testing.assert_allclose(everything, adv.reward_to_go(rewards, ones, 0.9) - values, rtol=1e-6)
  gradient = jax.grad(lambda v: adv.generalised(rewards, v, ones, 1.0, 0.5)[0].sum())(values)
  np.testing.assert_array_equal(gradient, 0)


def otb_by_loops(rewards, logp, collision, mask):
  """verl's compute_optimal_token_baseline_advantage restated, one time step at a time."""
  num_prompts, num_samples, num_tokens = rewards.shape
  advantage = np.zeros_like(rewards)
  for n in range(num_prompts):
    for t in range(num_tokens):
      alive = [g for g in range(num_samples) if mask[n, g, t]]
      to_go = {g: (rewards[n, g, t:] * mask[n, g, t:]).sum() for g in alive}
      weight = {g: sum((1 - 2 * np.exp(logp[n, g, j]) + collision[n, g, j]) * mask[n, g, j]
                       for j in range(t + 1)) for g in alive}
      for g in alive:
        baseline = sum(to_go[k] * weight[k] for k in alive) / sum(weight.values())
        advantage[n, g, t] = to_go[g] - baseline
  return advantage


def distribution(shape, seed=3):
  """log π of a drawn token and Σ π² of its distribution over five tokens."""
  random = np.random.default_rng(seed)
  logits = jnp.asarray(random.normal(size=(*shape, 5)), jnp.float32)
  tokens = jnp.asarray(random.integers(0, 5, shape))
  logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
  return logits, tokens, np.asarray(logp), np.asarray(jnp.square(jax.nn.softmax(logits)).sum(-1))


def test_optimal_token_baseline_equals_its_loops():
  rewards, _, mask = draw(4)
  _, _, logp, collision = distribution(mask.shape)
  np.testing.assert_allclose(adv.optimal_token_baseline(rewards, logp, collision, mask),
                             otb_by_loops(rewards, logp, collision, mask), rtol=1e-3, atol=1e-5)


def test_optimal_token_baseline_of_equal_scores_is_the_mean():
  reward = jnp.array([[1.0, 0.0, 0.0, 0.0]])
  mask = jnp.ones((1, 4, 3))
  got = adv.optimal_token_baseline(adv.terminal_rewards(reward, mask), jnp.full((1, 4, 3), -2.0),
                                   jnp.full((1, 4, 3), 0.3), mask)
  expected = advantages.mean_centred(reward, jnp.ones((1, 4)))
  np.testing.assert_allclose(got, expected[..., None] * mask, rtol=1e-5)


def test_score_norm_is_that_of_the_logits():
  logits, tokens, logp, collision = distribution((7,))
  z = jax.vmap(jax.grad(lambda x, y: jax.nn.log_softmax(x)[y]))(logits, tokens)
  np.testing.assert_allclose(adv.score_norm(logp, collision), jnp.square(z).sum(-1), rtol=1e-4)
