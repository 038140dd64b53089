"""From settings to arithmetic: each choice of `config.Algorithm` is one function of `rl`.

A new method is a type in `config`, a function of arrays in `rl` and a line here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.models.logprobs import TokenScores
from jaxrl_pt.rl import (
  advantages,
  corrections,
  kl,
  objectives,
  ratios,
  shaping,
  token_advantages,
)
from jaxrl_pt.types import Array, Rollout, Verdict, Weighted

Metrics = dict[str, Weighted]
_KL: dict[cfg.KLEstimator, Callable[[Array, Array], Array]] = {
    'k1': kl.k1, 'k2': kl.k2, 'k3': kl.k3}


# --- Reward -----------------------------------------------------------------------


def shape_reward(config: cfg.Shaping, verdict: Verdict, lengths: Array, gate: Any
                 ) -> tuple[Array, Any, Metrics]:
  """(f32[N, G] reward with what the length is worth, the gate's new state, metrics).

  Args:
    config: the shaping.
    verdict: of the whole batch.
    lengths: f32[N, G] response tokens.
    gate: `MethodState.gate`.
  """
  reward, correct, valid = verdict.reward, verdict.correct, verdict.valid
  match config:
    case cfg.NoShaping():
      return reward, gate, {}
    case cfg.Overlong(max_tokens=longest, buffer_tokens=buffer):
      bonus = shaping.overlong(lengths, longest, buffer)
    case cfg.Kimi(weight=weight):
      bonus = weight * shaping.kimi(lengths, correct, valid)
    case cfg.ShortRL(slack_tokens=slack, slack_accuracy=slack_accuracy, ema=ema, weight=weight):
      bonus, is_open, gate = shaping.short_rl(
          gate, lengths, correct, valid, slack_tokens=slack, slack_accuracy=slack_accuracy, ema=ema)
      return reward + weight * bonus, gate, {
          'gate_open': Weighted.single(is_open), 'gate_accuracy': Weighted.single(gate),
          'length_reward': Weighted.of(weight * bonus, valid)}
  return reward + bonus, gate, {'length_reward': Weighted.of(bonus, valid)}


def needs_old_policy(config: cfg.Algorithm) -> bool:
  """Whether a forward pass comes before the first update: for a value head, a token's own
  baseline, or a correction of what the sampler drew before several updates."""
  corrected = config.updates > 1 and config.correction != cfg.NoCorrection()
  return corrected or isinstance(config.advantage, cfg.GAE | cfg.OptimalTokenBaseline)


# --- Advantage --------------------------------------------------------------------


def token_advantage(config: cfg.Algorithm, reward: Array, rollout: Rollout, mask: Array,
                    valid: Array, reference_logp: Array, old: TokenScores, values: Array
                    ) -> tuple[Array, Array]:
  """f32[N, G, S] advantages, and the value head's targets (zeros without one).

  Args:
    config: advantage and KL.
    reward: f32[N, G].
    rollout: its logp is read where a KL is in the reward.
    mask: f32[N, G, S] tokens of valid rows.
    valid: f32[N, G].
    reference_logp: f32[N, G, S].
    old, values: of the policy before the update, where `needs_old_policy`.
  """
  rewards = token_advantages.terminal_rewards(reward, mask)
  match config.kl:
    case cfg.KLInReward(coef=coef, estimator=estimator):
      # Beyond a response's end the reference's is garbage.
      reference_logp = jnp.where(mask > 0, reference_logp, rollout.logp)
      rewards -= coef * _KL[estimator](rollout.logp, reference_logp) * mask
      reward = rewards.sum(-1)
  zeros = jnp.zeros_like(mask)
  match config.advantage:
    case cfg.ReinforcePlusPlus(gamma=gamma):
      return token_advantages.reinforce_plus_plus(rewards, mask, gamma), zeros
    case cfg.ReinforcePlusPlusBaseline():
      return token_advantages.reinforce_plus_plus_baseline(reward, mask, valid), zeros
    case cfg.OptimalTokenBaseline():
      return token_advantages.optimal_token_baseline(rewards, old.logp, old.collision, mask), zeros
    case cfg.GAE(gamma=gamma, lam=lam):
      advantage, returns = token_advantages.generalised(rewards, values, mask, gamma, lam)
      return token_advantages.whiten(advantage, mask), returns
    case grouped:
      advantage = _group_advantage(grouped, reward, mask.sum(-1), valid)
      return jnp.broadcast_to(advantage[..., None], mask.shape), zeros


def _group_advantage(config: cfg.Advantage, reward: Array, lengths: Array, valid: Array) -> Array:
  match config:
    case cfg.GRPO():
      return advantages.group_normalised(reward, valid)
    case cfg.DrGRPO():
      return advantages.mean_centred(reward, valid)
    case cfg.RLOO():
      return advantages.leave_one_out(reward, valid)
    case cfg.OPO():
      return advantages.length_weighted(reward, lengths, valid)
    case cfg.OPOLeaveOneOut():
      return advantages.length_weighted_leave_one_out(reward, lengths, valid)
    case cfg.OPOBatch():
      return advantages.length_weighted_batch(reward, lengths, valid)
    case _:
      raise TypeError(f'{type(config).__name__} is no advantage of whole responses')


# --- Loss -------------------------------------------------------------------------


def surrogate(config: cfg.Surrogate, logp: Array, old_logp: Array, advantage: Array, mask: Array
              ) -> objectives.Surrogate:
  """The terms of the loss and which of them a clip has cut; all arrays f32[N, G, S]."""
  match config:
    case cfg.PolicyGradient():
      terms = -jax.lax.stop_gradient(advantage) * logp
      return objectives.Surrogate(terms, jnp.zeros_like(mask), jnp.zeros_like(mask))
    case cfg.PPOClip(low=low, high=high):
      return objectives.ppo_clip(logp, old_logp, advantage, low=low, high=high)
    case cfg.DualClip(low=low, high=high, bound=bound):
      return objectives.dual_clip(logp, old_logp, advantage, low=low, high=high, bound=bound)
    case cfg.GSPO(low=low, high=high):
      return objectives.gspo(logp, old_logp, advantage, mask, low=low, high=high)
    case cfg.CISPO(low=low, high=high):
      return objectives.cispo(logp, old_logp, advantage, low=low, high=high)


def token_weights(config: cfg.Aggregation, mask: Array) -> Array:
  """f32[N, G, S]: what each token's term counts in the loss Σ weights · terms.

  An aggregate is linear in its values, so its weights are its gradient. With them, any slice of
  the rows adds its part to the loss of the whole.
  """
  aggregate: objectives.Aggregate
  match config:
    case cfg.TokenMean():
      aggregate = objectives.token_mean
    case cfg.SequenceMeanTokenSum():
      aggregate = objectives.sequence_mean_token_sum
    case cfg.SequenceMeanTokenMean():
      aggregate = objectives.sequence_mean_token_mean
    case cfg.ConstantDivisor(num_tokens=num_tokens):
      aggregate = objectives.token_sum_over(mask.shape[0] * mask.shape[1] * num_tokens)
  return jax.grad(aggregate)(jnp.zeros_like(mask), mask)


def correction(config: cfg.Correction, logp: Array, sampler_logp: Array, mask: Array) -> Array:
  """f32[N, G, S], constants: what the terms of another policy's tokens weigh."""
  match config:
    case cfg.NoCorrection():
      return mask
    case cfg.TokenTIS(cap=cap):
      return corrections.token_truncated(logp, sampler_logp, mask, cap)
    case cfg.SequenceTIS(cap=cap):
      return corrections.sequence_truncated(logp, sampler_logp, mask, cap)
    case cfg.Rejection(low=low, high=high):
      return corrections.rejected(logp, sampler_logp, mask, low, high)


def beyond(config: cfg.Algorithm, surrogate: objectives.Surrogate, logp: Array, old_logp: Array,
           sampler_logp: Array, reference_logp: Array) -> Array:
  """f32[N, G, S]: 1 on tokens some ratio of which `rl.ratios` had to bound: the surrogate's, the
  correction's or, with k3, that of the reference."""
  found = surrogate.beyond
  if config.correction != cfg.NoCorrection():
    found = jnp.maximum(found, ratios.beyond(old_logp - sampler_logp))
  match config.kl:
    case cfg.KLInLoss(estimator='k3') | cfg.KLInReward(estimator='k3'):
      found = jnp.maximum(found, ratios.beyond(jnp.maximum(reference_logp - logp, 0.0)))
  return found


def kl_terms(config: cfg.KL, logp: Array, reference_logp: Array) -> Array:
  """f32[N, G, S]: coef · KL of each token where it is in the loss, else 0."""
  match config:
    case cfg.KLInLoss(coef=coef, estimator=estimator):
      return coef * _KL[estimator](logp, reference_logp)
    case _:
      return jnp.zeros_like(logp)
