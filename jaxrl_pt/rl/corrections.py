"""Weights for responses that were drawn by another policy than the one being trained.

Each function compares the trainer's log-probabilities with the sampler's and returns f32[N, G, S]
weights that multiply the terms of a loss. They are constants of the gradient, 1 where trainer and
sampler agree and 0 where `mask` is 0. The ratio is ρ_t = π_train(y_t) / π_sampler(y_t). Its
logarithm, or the sum of logarithms in a sequence's weight, is bounded as `ratios` says, so that no
cap, however large, lets a weight overflow.

Source: verl's rollout correction; truncation as in IMPALA (1802.01561).
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.rl import ratios
from jaxrl_pt.rl.entry import Entry
from jaxrl_pt.types import Array


def token_truncated(logp: Array, sampler_logp: Array, mask: Array, cap: float) -> Array:
  """Weighs each token by sg(min(ρ_t, cap)).

  The variance is small, and the weight is biased, because it leaves out the ratios of the
  response's other tokens.

  Args:
    logp, sampler_logp, mask: f32[N, G, S].
    cap: the largest weight, at least 1.

  Returns:
    f32[N, G, S].
  """
  return _truncated(_log_ratio(logp, sampler_logp, mask), cap) * mask


def sequence_truncated(logp: Array, sampler_logp: Array, mask: Array, cap: float) -> Array:
  """Weighs every token of a response by sg(min(Π_t ρ_t, cap)), which is unbiased but for the cap.

  Args:
    logp, sampler_logp, mask: f32[N, G, S].
    cap: the largest weight, at least 1.

  Returns:
    f32[N, G, S].
  """
  return _truncated(_log_ratio(logp, sampler_logp, mask).sum(-1, keepdims=True), cap) * mask


def rejected(logp: Array, sampler_logp: Array, mask: Array, low: float, high: float) -> Array:
  """Weighs responses with low ≤ exp(mean_t log ρ_t) ≤ high by 1 and all others by 0.

  Args:
    logp, sampler_logp, mask: f32[N, G, S].
    low, high: bounds of the geometric mean of a response's ratios.

  Returns:
    f32[N, G, S] in {0, 1}.
  """
  log_ratio = _log_ratio(logp, sampler_logp, mask).sum(-1, keepdims=True)
  mean = log_ratio / jnp.maximum(mask.sum(-1, keepdims=True), 1.0)
  # The round-off of equal log-probabilities must not reject a response at a bound of 1.
  kept = (mean >= jnp.log(low) - 1e-6) & (mean <= jnp.log(high) + 1e-6)
  return kept * mask


def _truncated(log_ratio: Array, cap: float) -> Array:
  return jnp.minimum(jnp.exp(ratios.bounded(log_ratio)), cap)


def _log_ratio(logp: Array, sampler_logp: Array, mask: Array) -> Array:
  """log ρ_t, f32[N, G, S]; 0 on masked tokens, whatever they hold."""
  chex.assert_rank(logp, 3)
  chex.assert_equal_shape([logp, sampler_logp, mask])
  return jax.lax.stop_gradient(jnp.where(mask > 0, logp - sampler_logp, 0.0))


# --- By config type ---------------------------------------------------------------

# (config, logp, sampler_logp, mask) → f32[N, G, S], as all functions above.
Compute = Callable[[Any, Array, Array, Array], Array]

TABLE: dict[type, Entry[Compute]] = {
    cfg.NoCorrection: Entry(lambda c, logp, sampler_logp, mask: mask, '1', ''),
    cfg.TokenTIS: Entry(
        lambda c, logp, sampler_logp, mask: token_truncated(logp, sampler_logp, mask, c.cap),
        'terms times min(ρ_t, cap)',
        '1802.01561', 'One step off-policy', 'one_step_off'),
    cfg.SequenceTIS: Entry(
        lambda c, logp, sampler_logp, mask: sequence_truncated(logp, sampler_logp, mask, c.cap),
        'terms times min(Π_t ρ_t, cap)', 'verl'),
    cfg.Rejection: Entry(
        lambda c, logp, sampler_logp, mask: rejected(logp, sampler_logp, mask, c.low, c.high),
        'responses with low ≤ exp(mean_t log ρ_t) ≤ high', 'verl'),
}
