"""Advantages against numbers worked out by hand, slow definitions and their identities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.rl import advantages as adv
from jaxrl_pt.rl import hgpo, mode_choice
from jaxrl_pt.rl import token_advantages as of_tokens

ONES = jnp.ones((1, 4))


def draw(seed=0, shape=(5, 8)):
  random = np.random.default_rng(seed)
  reward = random.normal(size=shape).astype(np.float32)
  lengths = random.integers(1, 30, shape).astype(np.float32)
  valid = (random.random(shape) < 0.8).astype(np.float32)
  return reward, lengths, valid


def test_group_normalised_by_hand():
  # mean 1/4; squared deviations 9/16 + 3/16 = 3/4; unbiased variance 1/4; std 1/2.
  got = adv.group_normalised(jnp.array([[1.0, 0, 0, 0]]), ONES)
  np.testing.assert_allclose(got, [[1.5, -0.5, -0.5, -0.5]], rtol=1e-5)


def test_length_weighted_by_hand():
  # Baseline (1·6 + 0·2 + 1·1 + 0·1) / 10 = 0.7.
  got = adv.length_weighted(jnp.array([[1.0, 0, 1, 0]]), jnp.array([[6.0, 2, 1, 1]]), ONES)
  np.testing.assert_allclose(got, [[0.3, -0.7, 0.3, -0.7]], rtol=1e-6)


def test_mean_centred_and_leave_one_out_by_hand():
  reward = jnp.array([[1.0, 0, 0, 0]])
  np.testing.assert_allclose(adv.mean_centred(reward, ONES), [[0.75, -0.25, -0.25, -0.25]])
  np.testing.assert_allclose(adv.leave_one_out(reward, ONES),
                             [[1, -1 / 3, -1 / 3, -1 / 3]], rtol=1e-6)


def test_length_weighted_leave_one_out_by_hand():
  # Baselines of the others: 1/4, 7/8, 6/9 and 7/9.
  got = adv.length_weighted_leave_one_out(jnp.array([[1.0, 0, 1, 0]]),
                                          jnp.array([[6.0, 2, 1, 1]]), ONES)
  np.testing.assert_allclose(got, [[3 / 4, -7 / 8, 1 / 3, -7 / 9]], rtol=1e-6)


def test_length_weighted_batch_by_hand():
  # (1·3 + 0·1 + 2·2) / 6 over both groups, the last row apart.
  got = adv.length_weighted_batch(jnp.array([[1.0, 0], [2, 9]]), jnp.array([[3.0, 1], [2, 5]]),
                                  jnp.array([[1.0, 1], [1, 0]]))
  np.testing.assert_allclose(got, [[-1 / 6, -7 / 6], [5 / 6, 0]], rtol=1e-6)


def opo_by_loops(reward, lengths, valid):
  """verl's compute_opo_outcome_advantage restated: one weighted mean a prompt."""
  advantage = np.zeros_like(reward)
  for n in range(reward.shape[0]):
    rows = [g for g in range(reward.shape[1]) if valid[n, g]]
    tokens = sum(lengths[n, g] for g in rows)
    for g in rows:
      advantage[n, g] = reward[n, g] - sum(lengths[n, k] * reward[n, k] for k in rows) / tokens
  return advantage


def leave_one_out_by_loops(reward, weights, valid):
  advantage = np.zeros_like(reward)
  for n, g in itertools.product(*map(range, reward.shape)):
    others = [k for k in range(reward.shape[1]) if k != g and valid[n, k]]
    if valid[n, g] and others:
      tokens = sum(weights[n, k] for k in others)
      advantage[n, g] = reward[n, g] - sum(weights[n, k] * reward[n, k] for k in others) / tokens
  return advantage


@pytest.mark.parametrize('shape', [(5, 8), (6, 2), (4, 1)])
def test_group_baselines_equal_their_loops(shape):
  reward, lengths, valid = draw(1, shape)
  ones = np.ones_like(lengths)
  for got, expected in (
      (adv.length_weighted(reward, lengths, valid), opo_by_loops(reward, lengths, valid)),
      (adv.mean_centred(reward, valid), opo_by_loops(reward, ones, valid)),
      (adv.leave_one_out(reward, valid), leave_one_out_by_loops(reward, ones, valid)),
      (adv.length_weighted_leave_one_out(reward, lengths, valid),
       leave_one_out_by_loops(reward, lengths, valid))):
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_identities():
  reward, lengths, valid = draw(2)
  everyone = np.ones_like(valid)
  # RLOO = K / (K − 1) × the mean baseline's advantage.
  np.testing.assert_allclose(adv.leave_one_out(reward, everyone),
                             8 / 7 * adv.mean_centred(reward, everyone), rtol=1e-5)
  # At equal lengths OPO is Dr. GRPO and its leave-one-out form is RLOO.
  equal = np.full_like(lengths, 7.0)
  np.testing.assert_allclose(adv.length_weighted(reward, equal, valid),
                             adv.mean_centred(reward, valid), atol=1e-6)
  np.testing.assert_allclose(adv.length_weighted_leave_one_out(reward, equal, valid),
                             adv.leave_one_out(reward, valid), atol=1e-5)
  # One group is the whole batch.
  np.testing.assert_allclose(adv.length_weighted_batch(reward[:1], lengths[:1], valid[:1]),
                             adv.length_weighted(reward[:1], lengths[:1], valid[:1]), atol=1e-6)
  # GRPO is Dr. GRPO over the unbiased standard deviation.
  np.testing.assert_allclose(
      adv.group_normalised(reward, everyone),
      adv.mean_centred(reward, everyone) / (reward.std(-1, ddof=1, keepdims=True) + 1e-6),
      rtol=1e-4)


def test_leave_one_out_leaves_the_expected_gradient_alone():
  # Three responses of a softmax policy p with scores z = e_y − p; all groups of three drawn.
  probability, reward = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 0.5])
  lengths, score = np.array([1.0, 4.0, 9.0]), np.eye(3) - probability
  groups = np.array(list(itertools.product(range(3), repeat=3)))
  weight = probability[groups].prod(-1)
  r, y, ones = jnp.asarray(reward[groups]), jnp.asarray(lengths[groups]), jnp.ones(groups.shape)

  def expectation(advantage):
    return np.einsum('n,nk,nkd->d', weight, advantage, score[groups]) / 3

  truth = (probability * reward) @ score
  np.testing.assert_allclose(expectation(adv.leave_one_out(r, ones)), truth, atol=1e-6)
  np.testing.assert_allclose(expectation(adv.mean_centred(r, ones)), truth * 2 / 3, atol=1e-6)
  np.testing.assert_allclose(expectation(adv.length_weighted_leave_one_out(r, y, ones)), truth,
                             atol=1e-6)
  own = expectation(adv.length_weighted(r, y, ones))  # OPO's sees its own response
  assert own @ truth / np.linalg.norm(own) / np.linalg.norm(truth) < 0.999


def test_equal_rewards_teach_nothing():
  for value in (0.0, 1.0):
    reward = jnp.full((2, 8), value)
    lengths = jnp.arange(1.0, 17).reshape(2, 8)
    np.testing.assert_array_equal(adv.group_normalised(reward, jnp.ones((2, 8))), 0)
    np.testing.assert_array_equal(adv.length_weighted(reward, lengths, jnp.ones((2, 8))), 0)


VALUES = [0.1, 0.7, -4.21, 1 / 3, 12345.67, -1e-3, 1e-20, 3e30]
EVERY = {
    'grpo': lambda reward, lengths, valid: adv.group_normalised(reward, valid),
    'dr_grpo': lambda reward, lengths, valid: adv.mean_centred(reward, valid),
    'rloo': lambda reward, lengths, valid: adv.leave_one_out(reward, valid),
    'opo': adv.length_weighted, 'opo_leave_one_out': adv.length_weighted_leave_one_out,
    'opo_batch': adv.length_weighted_batch}


@pytest.mark.parametrize('name', EVERY)
def test_equal_rewards_of_any_value_are_exactly_no_advantage(name):
  """A mean of equal numbers is off by a rounding, which the standard deviation, being made of
  the same rounding, would bring to the size of a real advantage. Under jit."""
  function = jax.jit(EVERY[name])
  for seed, value in enumerate([*VALUES, *np.arange(-99, 100, 7) / 100]):
    _, lengths, valid = draw(seed, (6, 8))
    for counted in (valid, np.ones_like(valid)):
      reward = np.where(counted > 0, np.float32(value), np.float32(np.nan))
      np.testing.assert_array_equal(function(reward, lengths, counted), 0)
      # The last place of a sum in another order is no signal either.
      near = np.where(lengths > 9, np.nextafter(reward, np.float32(np.inf)), reward)
      np.testing.assert_array_equal(function(near, lengths, counted), 0)


@pytest.mark.parametrize('name', EVERY)
def test_a_reward_that_is_not_a_number_is_not_hidden(name):
  reward = jnp.array([[1.0, jnp.nan, 0.0, 1.0]])
  assert np.isnan(EVERY[name](reward, ONES, ONES)).any()
  hidden = EVERY[name](reward, ONES, ONES.at[0, 1].set(0))
  assert np.isfinite(hidden).all()


def test_a_small_difference_is_an_advantage():
  got = adv.group_normalised(jnp.array([[0.7, 0.7, 0.7, 0.7001]]), ONES)
  np.testing.assert_allclose(got, [[-0.49, -0.49, -0.49, 1.47]], rtol=2e-2)


def test_invalid_rows_take_no_part():
  reward = jnp.array([[1.0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 1, 1]])
  lengths = jnp.array([[1.0, 3, 5, 9], [2, 2, 2, 2], [1, 1, 1, 1]])
  valid = jnp.array([[1.0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
  # Group 0 without its last row: mean 1/3, variance (4/9 + 1/9 + 1/9) / 2 = 1/3.
  root = 3**0.5
  np.testing.assert_allclose(
      adv.group_normalised(reward, valid),
      [[2 / 3 * root, -root / 3, -root / 3, 0], [0] * 4, [0] * 4], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
      adv.length_weighted(reward, lengths, valid),
      [[8 / 9, -1 / 9, -1 / 9, 0], [0] * 4, [0] * 4], rtol=1e-6)
  # What the invalid rows hold does not matter.
  other = jnp.where(valid > 0, reward, 99.0)
  np.testing.assert_array_equal(adv.group_normalised(other, valid),
                                adv.group_normalised(reward, valid))


# --- By config type ---------------------------------------------------------------

# The advantage of each config type, written out: of a response (f32[N, G]) or of its tokens. The
# tests of the table (test_tables.py) go through it.
PLAIN = {
    cfg.GRPO(): lambda s: adv.group_normalised(s.reward, s.valid),
    cfg.DrGRPO(): lambda s: adv.mean_centred(s.reward, s.valid),
    cfg.RLOO(): lambda s: adv.leave_one_out(s.reward, s.valid),
    cfg.OPO(): lambda s: adv.length_weighted(s.reward, s.lengths, s.valid),
    cfg.OPOLeaveOneOut(): lambda s: adv.length_weighted_leave_one_out(
        s.reward, s.lengths, s.valid),
    cfg.OPOBatch(): lambda s: adv.length_weighted_batch(s.reward, s.lengths, s.valid),
    cfg.ReinforcePlusPlus(0.9): lambda s: of_tokens.reinforce_plus_plus(
        s.token_rewards, s.mask, 0.9),
    cfg.ReinforcePlusPlusBaseline(): lambda s: of_tokens.reinforce_plus_plus_baseline(
        s.reward, s.mask, s.valid),
    cfg.GAE(0.9, 0.8): lambda s: of_tokens.whiten(of_tokens.generalised(
        s.token_rewards, s.values, s.mask, 0.9, 0.8)[0], s.mask),
    cfg.OptimalTokenBaseline(): lambda s: of_tokens.optimal_token_baseline(
        s.token_rewards, s.logp, s.collision, s.mask),
    cfg.HGPO(): lambda s: hgpo.hgpo(cfg.HGPO(), s)[0],
    cfg.Thinkless(): lambda s: mode_choice.thinkless(
        s.reward, s.mode, s.valid, 0.5)[..., None] * s.mask,
    cfg.AdaptThink(): lambda s: mode_choice.adapt_think(
        s.reward, s.mode, s.valid, 0.05)[..., None] * s.mask,
    cfg.ModeEfficiency(0.0): lambda s: mode_choice.mode_efficiency(
        s.reward, s.mode, s.valid)[0][..., None] * s.mask}
