"""Advantages against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np

from jaxrl_pt.rl import advantages as adv

ONES = jnp.ones((1, 4))


def test_group_normalised_by_hand():
  # mean 1/4; squared deviations 9/16 + 3/16 = 3/4; unbiased variance 1/4; std 1/2.
  got = adv.group_normalised(jnp.array([[1.0, 0, 0, 0]]), ONES)
  np.testing.assert_allclose(got, [[1.5, -0.5, -0.5, -0.5]], rtol=1e-5)


def test_length_weighted_by_hand():
  # Baseline (1·6 + 0·2 + 1·1 + 0·1) / 10 = 0.7.
  got = adv.length_weighted(jnp.array([[1.0, 0, 1, 0]]), jnp.array([[6.0, 2, 1, 1]]), ONES)
  np.testing.assert_allclose(got, [[0.3, -0.7, 0.3, -0.7]], rtol=1e-6)


def test_opo_is_the_mean_baseline_at_equal_lengths():
  reward = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
  got = adv.length_weighted(reward, jnp.full((5, 8), 7.0), jnp.ones((5, 8)))
  np.testing.assert_allclose(got, reward - reward.mean(-1, keepdims=True), atol=1e-6)


def test_equal_rewards_teach_nothing():
  for value in (0.0, 1.0):
    reward = jnp.full((2, 8), value)
    lengths = jnp.arange(1.0, 17).reshape(2, 8)
    np.testing.assert_array_equal(adv.group_normalised(reward, jnp.ones((2, 8))), 0)
    np.testing.assert_array_equal(adv.length_weighted(reward, lengths, jnp.ones((2, 8))), 0)


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
