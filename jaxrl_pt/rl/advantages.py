"""Advantages: functions from a group's rewards to how much better each response was.

All take f32[N, G] arrays and return f32[N, G]. Rows with `valid` 0 (not judged) take no
part in a baseline and get advantage 0; a group of one valid row gets 0 too.
"""

import chex
import jax.numpy as jnp

from jaxrl_pt.types import Array

EPSILON = 1e-6


def group_normalised(reward: Array, valid: Array) -> Array:
  """GRPO's advantage: A = (r − mean(r)) / (std(r) + 1e-6) over the valid rows of the group.

  The standard deviation is the unbiased one (divisor n − 1), as verl computes it; the
  paper leaves it open.

  Args:
    reward: f32[N, G].
    valid: f32[N, G] in {0, 1}.

  Returns:
    f32[N, G].

  Source: 2402.03300.
  """
  chex.assert_rank(reward, 2)
  chex.assert_equal_shape([reward, valid])
  centred = (reward - _mean(reward, valid)) * valid
  degrees = jnp.maximum(valid.sum(-1, keepdims=True) - 1, 1)
  std = jnp.sqrt(jnp.square(centred).sum(-1, keepdims=True) / degrees)
  return centred / (std + EPSILON)


def length_weighted(reward: Array, lengths: Array, valid: Array) -> Array:
  """OPO's advantage: A_i = r_i − Σ_j |y_j| r_j / Σ_j |y_j| over the valid rows of the group.

  The baseline minimises the variance of a *sum* over tokens when squared score norms grow
  with length: pair it with a sum or a constant divisor, not with a mean per sequence.

  Args:
    reward: f32[N, G].
    lengths: f32[N, G] response tokens, the stop token included.
    valid: f32[N, G] in {0, 1}.

  Returns:
    f32[N, G].

  Source: 2505.23585.
  """
  chex.assert_rank(reward, 2)
  chex.assert_equal_shape([reward, lengths, valid])
  return (reward - _mean(reward, lengths * valid)) * valid


def _mean(values: Array, weights: Array) -> Array:
  """f32[N, 1]: weighted mean of each group, 0 where all weights are 0."""
  total = weights.sum(-1, keepdims=True)
  return (values * weights).sum(-1, keepdims=True) / jnp.where(total > 0, total, 1.0)
