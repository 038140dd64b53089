"""From settings to arithmetic: each choice of `config.Algorithm` is one function of `rl`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.rl import advantages, objectives
from jaxrl_pt.types import Array, Verdict, Weighted

Metrics = dict[str, Weighted]


def shape_reward(shaping: cfg.Shaping, verdict: Verdict, lengths: Array, gate: Any
                 ) -> tuple[Array, Any, Metrics]:
  """(f32[N, G] shaped reward, the gate's new state, metrics)."""
  match shaping:
    case cfg.NoShaping():
      return verdict.reward, gate, {}
    case _:
      raise NotImplementedError


def token_advantage(method: cfg.Algorithm, reward: Array, sampler_logp: Array,
                    reference_logp: Array, mask: Array, valid: Array, values: Array
                    ) -> tuple[Array, Array]:
  """f32[N, G, S] advantages, and the value head's targets (zeros without one)."""
  match method.advantage:
    case cfg.GRPO():
      advantage = advantages.group_normalised(reward, valid)
    case cfg.OPO():
      advantage = advantages.length_weighted(reward, mask.sum(-1), valid)
    case _:
      raise NotImplementedError
  return jnp.broadcast_to(advantage[..., None], mask.shape), jnp.zeros_like(mask)


def surrogate_loss(surrogate: cfg.Surrogate, logp: Array, old_logp: Array, advantage: Array,
                   mask: Array, aggregate: objectives.Aggregate) -> tuple[Array, Metrics]:
  """f32[] and the share of tokens whose gradient a clip has taken."""
  match surrogate:
    case cfg.PolicyGradient():
      return objectives.policy_gradient(logp, advantage, mask, aggregate), {}
    case _:
      raise NotImplementedError


def token_weights(aggregation: cfg.Aggregation, mask: Array) -> Array:
  """f32[N, G, S]: what each token's term counts, an aggregate being linear in its values."""
  num_responses = mask.shape[0] * mask.shape[1]
  match aggregation:
    case cfg.TokenMean():
      aggregate: Callable[[Array, Array], Array] = objectives.token_mean
    case cfg.SequenceMeanTokenSum():
      aggregate = objectives.token_sum_over(num_responses)
    case cfg.SequenceMeanTokenMean():
      aggregate = objectives.sequence_mean_token_mean
    case cfg.ConstantDivisor(num_tokens=num_tokens):
      aggregate = objectives.token_sum_over(num_responses * num_tokens)
  return jax.grad(aggregate)(jnp.zeros_like(mask), mask)


def correction_weights(correction: cfg.Correction, logp: Array, sampler_logp: Array,
                       mask: Array) -> Array:
  """f32[N, G, S], constants: what a term drawn by another policy weighs."""
  match correction:
    case cfg.NoCorrection():
      return jnp.ones_like(mask)
    case _:
      raise NotImplementedError


def kl_loss(kl: cfg.KL, logp: Array, reference_logp: Array, weights: Array) -> Array:
  """f32[]: coef · Σ weights · KL of each token, 0 unless it is in the loss."""
  match kl:
    case cfg.KLInLoss():
      raise NotImplementedError
    case _:
      return jnp.zeros(())
