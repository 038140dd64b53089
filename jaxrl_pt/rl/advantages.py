"""Advantages: functions from a group's rewards to how much better each response was.

Each function takes f32[N, G] arrays and returns f32[N, G]; advantages of single tokens are in
`token_advantages`. A row with `valid` 0 was not verified: it takes no part in a baseline and gets
advantage 0. The only valid row of a group gets 0 too, except under the whole batch's baseline.
`TABLE`, at the end, says which config type stands for which function.

Equal rewards give exactly 0, whatever their value, because a baseline is a mean of how far rewards
lie below the largest, and not of the rewards themselves. The mean of equal numbers can be off by a
rounding, which a normalised advantage would divide by its own size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.rl.entry import Entry
from jaxrl_pt.types import Array

EPSILON = 1e-6
# Rewards count as equal if they differ by less than this share of their size, which is four units
# in the last place.
SAME = 4 * float(np.finfo(np.float32).eps)


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
  centred = _centred(reward, valid, valid)
  degrees = jnp.maximum(valid.sum(-1, keepdims=True) - 1, 1)
  std = jnp.sqrt(jnp.square(centred).sum(-1, keepdims=True) / degrees)
  return centred / (std + EPSILON)


def mean_centred(reward: Array, valid: Array) -> Array:
  """Dr. GRPO's advantage: A_i = r_i − mean(r) over the valid rows of the group.

  Args:
    reward: f32[N, G].
    valid: f32[N, G] in {0, 1}.

  Returns:
    f32[N, G].

  Source: 2503.20783.
  """
  chex.assert_rank(reward, 2)
  chex.assert_equal_shape([reward, valid])
  return _centred(reward, valid, valid)


def leave_one_out(reward: Array, valid: Array) -> Array:
  """RLOO's advantage: A_i = r_i − Σ_{j≠i} r_j / (G − 1), which is G/(G − 1) · (r_i − mean(r)).

  RLP writes its advantage in the second form. G counts the valid rows of the group.

  Args:
    reward: f32[N, G].
    valid: f32[N, G] in {0, 1}.

  Returns:
    f32[N, G].

  Source: 2402.14740; RLP 2510.01265.
  """
  num_valid = valid.sum(-1, keepdims=True)
  return mean_centred(reward, valid) * num_valid / jnp.maximum(num_valid - 1, 1)


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
  return _centred(reward, lengths * valid, valid)


def length_weighted_leave_one_out(reward: Array, lengths: Array, valid: Array) -> Array:
  """OPO without its own response in the baseline: A_i = r_i − Σ_{j≠i} |y_j| r_j / Σ_{j≠i} |y_j|.

  A baseline that does not see its response leaves the expectation of the gradient alone. OPO's
  baseline, which does, shifts the gradient's direction a little where lengths differ.

  Args:
    reward: f32[N, G].
    lengths: f32[N, G] response tokens, the stop token included.
    valid: f32[N, G] in {0, 1}.

  Returns:
    f32[N, G]; 0 where no other valid row has a token.

  Departs from the paper, whose baseline includes the response itself (2505.23585).
  """
  chex.assert_rank(reward, 2)
  chex.assert_equal_shape([reward, lengths, valid])
  weights = lengths * valid
  # With Σ of all responses: r_i − b_i = (r_i − b) · Σ_j |y_j| / Σ_{j≠i} |y_j|.
  total = weights.sum(-1, keepdims=True)
  others = total - weights
  scale = jnp.where(others > 0, total / jnp.where(others > 0, others, 1.0), 0.0)
  return length_weighted(reward, lengths, valid) * scale


def length_weighted_batch(reward: Array, lengths: Array, valid: Array) -> Array:
  """OPO over all valid rows of the batch: A_i = r_i − Σ_j |y_j| r_j / Σ_j |y_j|.

  OPO's code offers this baseline for REINFORCE++. It is one number for all prompts, so groups may
  hold a single response.

  Args:
    reward: f32[N, G].
    lengths: f32[N, G] response tokens, the stop token included.
    valid: f32[N, G] in {0, 1}.

  Returns:
    f32[N, G].

  Source: the code of 2505.23585.
  """
  chex.assert_rank(reward, 2)
  chex.assert_equal_shape([reward, lengths, valid])
  flat = [x.reshape(1, -1) for x in (reward, lengths, valid)]
  return length_weighted(*flat).reshape(reward.shape)


def below_largest(values: Array, counts: Array) -> Array:
  """How far each value lies below the largest of its last axis, and 0 where it equals that one.

  Values are equal if they differ by at most 4 units in the last place, since the parts of two
  rewards may have been added up in different orders. An entry with `counts` 0 takes no part and
  gets 0, whatever it holds.

  Args:
    values, counts: f[..., R].

  Returns:
    f[..., R], at most 0.
  """
  there = counts > 0
  largest = jnp.where(there, values, -jnp.inf).max(-1, keepdims=True)
  difference = jnp.where(there, values - largest, 0.0)
  size = jnp.where(there, jnp.maximum(jnp.abs(values), jnp.abs(largest)), 0.0)
  # A NaN fails this comparison and so stays a NaN, for which the learner skips the step.
  return jnp.where(jnp.abs(difference) <= SAME * size, 0.0, difference)


def _centred(reward: Array, weights: Array, valid: Array) -> Array:
  """r_i − Σ_j w_j r_j / Σ_j w_j of valid rows, f32[N, G]; exactly 0 where rewards are equal."""
  difference = below_largest(reward, valid)
  total = weights.sum(-1, keepdims=True)
  mean = (difference * weights).sum(-1, keepdims=True) / jnp.where(total > 0, total, 1.0)
  return (difference - mean) * valid


# --- By config type ---------------------------------------------------------------


class Scored(NamedTuple):
  """A batch as advantages see it. A KL in the reward has been taken off both rewards.

  logp, collision and values are of the policy before the update, and zeros unless the entry
  `needs_policy`; values are the value head's.
  """

  reward: Array  # f32[N, G]
  lengths: Array  # f32[N, G] response tokens, the one that ends it included
  valid: Array  # f32[N, G] in {0, 1}
  token_rewards: Array  # f32[N, G, S]
  mask: Array  # f32[N, G, S] 1 on tokens that are learned from
  logp: Array  # f32[N, G, S]
  collision: Array  # f32[N, G, S] Σ_v π_v²
  values: Array  # f32[N, G, S]
  mode: Any = ()  # i32[N, G] in {THINK, NO_THINK, NO_MODE}; () in a run without modes


# (config, scored) → f32[N, G, S] advantages, and f32[N, G, S] targets of the value head.
Compute = Callable[[Any, Scored], tuple[Array, Array]]


def _of_responses(advantage: Callable[[Scored], Array]) -> Compute:
  """The advantage of a response on each of its tokens."""
  def compute(config: Any, scored: Scored) -> tuple[Array, Array]:
    del config
    value = advantage(scored)
    return (jnp.broadcast_to(value[..., None], scored.mask.shape), jnp.zeros_like(scored.mask))

  return compute


TABLE: dict[type, Entry[Compute]] = {
    cfg.GRPO: Entry(_of_responses(lambda s: group_normalised(s.reward, s.valid)),
                    'A = (r − mean) / std', '2402.03300', 'GRPO', 'grpo'),
    cfg.DrGRPO: Entry(_of_responses(lambda s: mean_centred(s.reward, s.valid)),
                      'A = r − mean', '2503.20783', 'Dr. GRPO', 'dr_grpo'),
    cfg.RLOO: Entry(_of_responses(lambda s: leave_one_out(s.reward, s.valid)),
                    'A_i = r_i − mean of the other r_j', '2402.14740', 'RLOO', 'rloo'),
    cfg.OPO: Entry(_of_responses(lambda s: length_weighted(s.reward, s.lengths, s.valid)),
                   'A = r − Σ|y|r / Σ|y|', '2505.23585', 'OPO', 'opo'),
    cfg.OPOLeaveOneOut: Entry(
        _of_responses(lambda s: length_weighted_leave_one_out(s.reward, s.lengths, s.valid)),
        'A_i = r_i − Σ_{j≠i}|y_j|r_j / Σ_{j≠i}|y_j|', '2505.23585', 'OPO, leave one out',
        'opo_leave_one_out'),
    cfg.OPOBatch: Entry(
        _of_responses(lambda s: length_weighted_batch(s.reward, s.lengths, s.valid)),
        'A = r − Σ|y|r / Σ|y| over all groups', '2505.23585', 'OPO, whole batch', 'opo_batch'),
}
