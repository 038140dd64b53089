"""Losses of reinforcement learning, which are to be minimised, and measures of a rollout batch.

A loss with a ratio gives one term a token (`Surrogate`). How the terms become one
number is a function of its own (`Aggregate`), because it decides what a baseline minimises
(docs/methods/opo.md) and is half of what tells GRPO, Dr. GRPO and DAPO apart:

    surrogate = ppo_clip(logp, old_logp, advantage, low=0.2, high=0.28)
    loss = token_mean(surrogate.terms, mask)
    clip_fraction = Weighted.of(surrogate.clipped, mask)

The ratio is ρ_t = π(y_t) / π_old(y_t). The old policy and the advantage are constants of the
gradient. With one update a batch ρ is 1, no clip is active, and every surrogate has the gradient of
`policy_gradient`. log ρ is bounded to ±20 (`ratios`), and a token beyond that has no gradient. A
masked token may hold anything that stays finite in the arithmetic: set its log-probabilities to 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.rl import ratios
from jaxrl_pt.rl.entry import Entry
from jaxrl_pt.types import Array, Weighted

# aggregate(values f32[N, G, S], mask f32[N, G, S]) → f32[]
Aggregate = Callable[[Array, Array], Array]


def token_mean(values: Array, mask: Array) -> Array:
  """The mean over all tokens of the batch that count (DAPO 2503.14476, verl's default)."""
  return (values * mask).sum() / jnp.maximum(mask.sum(), 1.0)


def sequence_mean_token_mean(values: Array, mask: Array) -> Array:
  """The mean over responses of the mean over their tokens (GRPO 2402.03300)."""
  means = (values * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1.0)
  num_responses = (mask.sum(-1) > 0).sum()
  return means.sum() / jnp.maximum(num_responses, 1)


def sequence_mean_token_sum(values: Array, mask: Array) -> Array:
  """The mean over responses of the sum over their tokens (OPO 2505.23585, RLOO 2402.14740).

  The mean is over the responses that have a token that counts; a divisor of `token_sum_over` can
  count every response.
  """
  num_responses = (mask.sum(-1) > 0).sum()
  return (values * mask).sum() / jnp.maximum(num_responses, 1)


def token_sum_over(divisor: float) -> Aggregate:
  """The sum over tokens / a constant, so that no response's length or validity reweights another.

  The number of responses as the divisor gives the mean sequence log-likelihood (OPO 2505.23585);
  that number times the token budget gives Dr. GRPO's normalisation (2503.20783).
  """
  return lambda values, mask: (values * mask).sum() / divisor


def decoupled_modes(alpha: float) -> Aggregate:
  """Thinkless' DeGRPO: mean over responses of α · the mode token's term + the mean of the others'.

  In a plain mean over the tokens of a response the term of the mode's token, which is its first,
  weighs the less the longer the response is.

  Source: 2505.13379, equation 4.
  """
  def aggregate(values: Array, mask: Array) -> Array:
    first = jnp.zeros_like(mask).at[..., 0].set(1.0)
    num_responses = jnp.maximum((mask.sum(-1) > 0).sum(), 1)
    rest = mask * (1 - first)
    means = (values * rest).sum(-1) / jnp.maximum(rest.sum(-1), 1.0)
    return (alpha * (values * mask * first).sum() + means.sum()) / num_responses

  return aggregate


# --- Policy -----------------------------------------------------------------------


class Surrogate(NamedTuple):
  """An objective before aggregation."""

  terms: Array  # f32[N, G, S] terms of the loss; masked tokens hold garbage
  clipped: Array  # f32[N, G, S] 1 where a clip has taken the token's gradient
  beyond: Array  # f32[N, G, S] 1 where the log ratio was bounded before its exponential


def policy_gradient(logp: Array, advantage: Array) -> Surrogate:
  """−sg(A_t) · log π(y_t): the exact on-policy objective.

  Args:
    logp: f32[N, G, S] under the policy being trained.
    advantage: f32[N, G, S]; a constant of the gradient.

  Source: REINFORCE. PPO is the same with one update a batch, where its clip is inert.
  """
  chex.assert_rank(logp, 3)
  chex.assert_equal_shape([logp, advantage])
  zeros = jnp.zeros_like(logp)
  return Surrogate(-jax.lax.stop_gradient(advantage) * logp, zeros, zeros)


def ppo_clip(logp: Array, old_logp: Array, advantage: Array, *, low: float, high: float
             ) -> Surrogate:
  """PPO's clipped surrogate: −min(ρ_t A_t, clip(ρ_t, 1 − low, 1 + high) A_t).

  Args:
    logp: f32[N, G, S] under the policy being trained.
    old_logp: f32[N, G, S] under the policy before the batch's first update.
    advantage: f32[N, G, S].
    low, high: how far ρ may fall and rise. PPO and GRPO have 0.2 and 0.2, DAPO 0.2 and 0.28.

  Source: 1707.06347, equation 7; unequal ranges 2503.14476.
  """
  return _clipped(_log_ratio(logp, old_logp, advantage), advantage, low, high)


def dual_clip(logp: Array, old_logp: Array, advantage: Array, *, low: float, high: float,
              bound: float) -> Surrogate:
  """PPO's clip with a second one: terms of a negative advantage are at most −bound · A_t.

  Args:
    logp, old_logp, advantage, low, high: as in `ppo_clip`.
    bound: a number above 1; verl takes 3 and has this clip on by default.

  Source: 1912.09729, equation 5.
  """
  once = ppo_clip(logp, old_logp, advantage, low=low, high=high)
  ceiling = -bound * jax.lax.stop_gradient(advantage)
  beyond = (advantage < 0) & (once.terms > ceiling)
  return Surrogate(jnp.where(beyond, ceiling, once.terms),
                   jnp.maximum(once.clipped, beyond.astype(jnp.float32)), once.beyond)


def gspo(logp: Array, old_logp: Array, advantage: Array, mask: Array, *, low: float,
         high: float) -> Surrogate:
  """GSPO's clip of the sequence's ratio: −min(s A_t, clip(s, 1 − low, 1 + high) A_t).

    s = exp((1/|y|) Σ_t log ρ_t), the same on each token of a response

  The paper's aggregate is `sequence_mean_token_mean`, with which the equal terms of a response
  count as one.

  Args:
    logp, old_logp, advantage: as in `ppo_clip`.
    mask: f32[N, G, S] 1 on tokens that count.
    low, high: as in `ppo_clip`, but they bound a mean: the paper has 3e-4 and 4e-4.

  Source: 2507.18071, equations 5 and 7.
  """
  log_ratio = jnp.where(mask > 0, _log_ratio(logp, old_logp, advantage), 0.0)
  mean = log_ratio.sum(-1, keepdims=True) / jnp.maximum(mask.sum(-1, keepdims=True), 1.0)
  return _clipped(jnp.broadcast_to(mean, mask.shape), advantage, low, high)


def cispo(logp: Array, old_logp: Array, advantage: Array, *, low: float, high: float
          ) -> Surrogate:
  """CISPO: −sg(clip(ρ_t, 1 − low, 1 + high)) A_t log π(y_t), in which every token has a gradient.

  Args:
    logp, old_logp, advantage: as in `ppo_clip`.
    low, high: bounds of the weight. The paper bounds it from above alone: low = 1.

  Returns:
    `clipped` is 1 where the weight, not the gradient, was cut.

  Source: 2506.13585, equation 4.
  """
  log_ratio = jax.lax.stop_gradient(_log_ratio(logp, old_logp, advantage))
  ratio = jnp.exp(ratios.bounded(log_ratio))
  weight = jnp.clip(ratio, 1 - low, 1 + high)
  clipped = (ratio < 1 - low) | (ratio > 1 + high)
  return Surrogate(-weight * jax.lax.stop_gradient(advantage) * logp,
                   clipped.astype(jnp.float32), ratios.beyond(log_ratio))


def _log_ratio(logp: Array, old_logp: Array, advantage: Array) -> Array:
  chex.assert_rank(logp, 3)
  chex.assert_equal_shape([logp, old_logp, advantage])
  return logp - jax.lax.stop_gradient(old_logp)


def _clipped(log_ratio: Array, advantage: Array, low: float, high: float) -> Surrogate:
  advantage = jax.lax.stop_gradient(advantage)
  ratio = jnp.exp(ratios.bounded(log_ratio))
  plain, bounded = ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage
  # `minimum` would halve the gradient of a tie, and every on-policy token is one.
  clipped = bounded < plain
  return Surrogate(-jnp.where(clipped, bounded, plain), clipped.astype(jnp.float32),
                   ratios.beyond(log_ratio))


# --- Measures ---------------------------------------------------------------------


def sampler_trainer_mismatch(logp: Array, sampler_logp: Array, mask: Array) -> Weighted:
  """The sampler–trainer mismatch: mean exp|log π_train − log π_sampler|, 1 when both agree.

  The mean is over tokens with mask 1. The difference is bounded as `ratios` says, so that the mean
  is finite however far the two are apart.

  Args:
    logp, sampler_logp, mask: f32[N, G, S].
  """
  chex.assert_equal_shape([logp, sampler_logp, mask])
  difference = jnp.where(mask > 0, logp - sampler_logp, 0.0)
  return Weighted.of(jnp.exp(jnp.abs(ratios.bounded(difference))), mask)


def zero_advantage_groups(advantage: Array, valid: Array) -> Weighted:
  """The share of groups that teach nothing, among groups with a valid row.

  Args:
    advantage: f32[N, G].
    valid: f32[N, G].
  """
  chex.assert_rank(advantage, 2)
  chex.assert_equal_shape([advantage, valid])
  # Equal rewards give exactly 0; an advantage below this bound teaches nothing either.
  silent = (jnp.abs(advantage) < 1e-6).all(-1)
  return Weighted.of(silent.astype(jnp.float32), valid.any(-1))


def gradient_variance(advantage: Array, score_norms: Array, mask: Array) -> Weighted:
  """Measures how the gradient of a sum over tokens scatters: E[Σ_t A_t² ‖z_t‖²] over responses.

  This is the second moment of the estimator with respect to the logits, whose scores z_t are
  orthogonal over tokens. It needs no backward pass, bounds the variance from above, and ranks
  baselines as the variance does, because all of them share one mean.

  Args:
    advantage: f32[N, G, S].
    score_norms: f32[N, G, S] from `token_advantages.score_norm`, or ones for OPO's ‖z‖² ∝ |y|.
    mask: f32[N, G, S].

  Source: verl's variance proxy; 2505.23585.
  """
  chex.assert_rank(advantage, 3)
  chex.assert_equal_shape([advantage, score_norms, mask])
  power = (jnp.square(advantage) * score_norms * mask).sum(-1)
  return Weighted.of(power, mask.any(-1))


# --- By config type ---------------------------------------------------------------

# (config, logp, old_logp, advantage, mask) → Surrogate, all arrays f32[N, G, S].
SurrogateOf = Callable[[Any, Array, Array, Array, Array], Surrogate]
# (config, number of responses) → how their tokens become one number.
AggregateOf = Callable[[Any, int], Aggregate]

SURROGATES: dict[type, Entry[SurrogateOf]] = {
    cfg.PolicyGradient: Entry(
        lambda c, logp, old_logp, advantage, mask: policy_gradient(logp, advantage),
        'A log π', ''),
    cfg.PPOClip: Entry(
        lambda c, logp, old_logp, advantage, mask: ppo_clip(
            logp, old_logp, advantage, low=c.low, high=c.high),
        'min(ρA, clip(ρ)A)', '1707.06347'),
    cfg.DualClip: Entry(
        lambda c, logp, old_logp, advantage, mask: dual_clip(
            logp, old_logp, advantage, low=c.low, high=c.high, bound=c.bound),
        'min(ρA, clip(ρ)A), at least bound · A where A < 0', '1912.09729'),
    cfg.GSPO: Entry(
        lambda c, logp, old_logp, advantage, mask: gspo(
            logp, old_logp, advantage, mask, low=c.low, high=c.high),
        'min(sA, clip(s)A), s = exp(mean_t log ρ_t)', '2507.18071', 'GSPO', 'gspo'),
    cfg.CISPO: Entry(
        lambda c, logp, old_logp, advantage, mask: cispo(
            logp, old_logp, advantage, low=c.low, high=c.high),
        'sg(clip(ρ)) A log π', '2506.13585', 'CISPO', 'cispo'),
}
AGGREGATIONS: dict[type, Entry[AggregateOf]] = {
    cfg.TokenMean: Entry(lambda c, n: token_mean, 'Σ over tokens / tokens', '2503.14476'),
    cfg.SequenceMeanTokenSum: Entry(
        lambda c, n: sequence_mean_token_sum, 'mean of the sums of responses', '2505.23585'),
    cfg.SequenceMeanTokenMean: Entry(
        lambda c, n: sequence_mean_token_mean, 'mean of the means of responses', '2402.03300'),
    cfg.ConstantDivisor: Entry(
        lambda c, n: token_sum_over(n * c.num_tokens), 'Σ over tokens / token budget',
        '2503.20783'),
    cfg.DecoupledModes: Entry(
        lambda c, n: decoupled_modes(c.alpha),
        'mean of α · mode token + mean of the other tokens', '2505.13379'),
}
