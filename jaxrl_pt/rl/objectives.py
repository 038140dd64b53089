"""Objectives and measures of a rollout: arrays in, a scalar out.

How token terms become one number is a function of its own (`Aggregate`), because it
decides what a baseline minimises (specs/opo.md 2.4) and is half of what tells GRPO,
Dr. GRPO and DAPO apart.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array, Weighted

# aggregate(values f32[N, G, S], mask f32[N, G, S]) → f32[]
Aggregate = Callable[[Array, Array], Array]


def token_mean(values: Array, mask: Array) -> Array:
  """Σ over tokens / number of tokens in the batch (DAPO 2503.14476, verl's default)."""
  return (values * mask).sum() / jnp.maximum(mask.sum(), 1.0)


def sequence_mean_token_mean(values: Array, mask: Array) -> Array:
  """Mean over responses of the mean over their tokens (GRPO 2402.03300)."""
  means = (values * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1.0)
  num_responses = (mask.sum(-1) > 0).sum()
  return means.sum() / jnp.maximum(num_responses, 1)


def token_sum_over(divisor: float) -> Aggregate:
  """Σ over tokens / a constant, so no response's length or validity reweights another.

  The number of responses gives the mean sequence log-likelihood (OPO 2505.23585), the
  token budget Dr. GRPO's normalisation (2503.20783).
  """
  return lambda values, mask: (values * mask).sum() / divisor


def policy_gradient(logp: Array, advantage: Array, mask: Array, aggregate: Aggregate) -> Array:
  """The exact on-policy loss: aggregate of −sg(A_t) · log π(y_t).

  Args:
    logp: f32[N, G, S] under the policy being trained.
    advantage: f32[N, G, S]; a constant of the gradient.
    mask: f32[N, G, S] 1 on tokens that count.
    aggregate: how tokens become one number.

  Returns:
    f32[].

  Source: REINFORCE; one update per batch, where PPO's ratio is 1 and its clip inert.
  """
  chex.assert_rank(logp, 3)
  chex.assert_equal_shape([logp, advantage, mask])
  return aggregate(-jax.lax.stop_gradient(advantage) * logp, mask)


def trainer_sampler_gap(logp: Array, sampler_logp: Array, mask: Array) -> Weighted:
  """mean exp|log π_train − log π_sampler| over the masked tokens; 1 when they agree.

  Args:
    logp, sampler_logp, mask: f32[N, G, S].
  """
  chex.assert_equal_shape([logp, sampler_logp, mask])
  difference = jnp.where(mask > 0, logp - sampler_logp, 0.0)
  return Weighted.of(jnp.exp(jnp.abs(difference)), mask)


def zero_advantage_groups(advantage: Array, valid: Array) -> Weighted:
  """The share of groups that teach nothing, among groups with a valid row.

  Args:
    advantage: f32[N, G].
    valid: f32[N, G].
  """
  chex.assert_rank(advantage, 2)
  chex.assert_equal_shape([advantage, valid])
  # Round-off of a baseline of equal rewards is not a signal.
  silent = (jnp.abs(advantage) < 1e-6).all(-1)
  return Weighted.of(silent.astype(jnp.float32), valid.any(-1))
