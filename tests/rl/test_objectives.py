"""Objectives against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.rl import objectives as obj

LOGP = jnp.array([[[-1.0, -2.0], [-3.0, -9.0]]])
ADVANTAGE = jnp.array([[[1.0, 1.0], [-2.0, -2.0]]])
MASK = jnp.array([[[1.0, 1.0], [1.0, 0.0]]])


@pytest.mark.parametrize('aggregate, expected', [
    # Token terms −A·logp: 1, 2 and −6.
    (obj.token_mean, (1 + 2 - 6) / 3),
    (obj.sequence_mean_token_mean, (1.5 - 6) / 2),
    (obj.token_sum_over(2.0), (1 + 2 - 6) / 2),
])
def test_policy_gradient_by_hand(aggregate, expected):
  got = obj.policy_gradient(LOGP, ADVANTAGE, MASK, aggregate)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_gradient_reaches_masked_tokens_alone_and_never_the_advantage():
  def loss(logp, advantage):
    return obj.policy_gradient(logp, advantage, MASK, obj.token_sum_over(2.0))

  by_logp, by_advantage = jax.grad(loss, (0, 1))(LOGP, ADVANTAGE)
  np.testing.assert_allclose(by_logp, [[[-0.5, -0.5], [1.0, 0.0]]])
  np.testing.assert_array_equal(by_advantage, 0)


def test_wrong_shapes_are_refused():
  with pytest.raises(AssertionError):
    obj.policy_gradient(LOGP, ADVANTAGE[..., 0], MASK, obj.token_mean)


def test_gap():
  sampler = LOGP + jnp.array([[[jnp.log(2.0), -jnp.log(3.0)], [0.0, -jnp.inf]]])
  gap = obj.trainer_sampler_gap(LOGP, sampler, MASK)
  np.testing.assert_allclose(gap.mean(), (2 + 3 + 1) / 3, rtol=1e-6)
  np.testing.assert_allclose(obj.trainer_sampler_gap(LOGP, LOGP, MASK).mean(), 1)


def test_zero_advantage_groups():
  advantage = jnp.array([[0.0, 0.0], [1.0, -1.0], [0.0, 0.0], [1e-8, -1e-8]])
  valid = jnp.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
  silent = obj.zero_advantage_groups(advantage, valid)
  assert (float(silent.sum), float(silent.count)) == (2, 3)
