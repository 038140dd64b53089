"""From a model's logits to the distribution that tokens are drawn from.

Temperature, then top-k, then top-p, as settings of `config.Sampler`. The learner uses
the same functions, so that sampler and trainer speak of the same distribution.
"""

import jax
import jax.numpy as jnp

from jaxrl_pt.config import Sampler
from jaxrl_pt.types import Array

# Finite, so that 0 · log 0 stays 0 in entropies and gradients.
MASKED = -1e30


def filtered_logits(logits: Array, sampler: Sampler) -> Array:
  """Logits whose softmax is the distribution drawn from.

    z / temperature on the support, −1e30 elsewhere; temperature 0 keeps the first argmax

  Args:
    logits: f[..., V].
    sampler: top_k keeps the k largest and what ties with the k-th; top_p keeps, of what is
      left, the smallest set of likeliest tokens whose mass reaches p, and its ties.

  Returns:
    f32[..., V].

  Source: nucleus sampling 1904.09751.
  """
  scaled = _scaled(logits, sampler)
  return jnp.where(_support(scaled, sampler), scaled, MASKED)


def learner_logits(logits: Array, tokens: Array, sampler: Sampler) -> Array:
  """`filtered_logits` whose support always holds the token that was drawn.

  The learner recomputes the logits in another order of summation. A drawn token at the
  edge of the support could so fall out of it and get log-probability −1e30.

  Args:
    logits: f[..., V].
    tokens: i32[...] drawn tokens; leading dimensions broadcast with those of logits.
    sampler: as the tokens were drawn.

  Returns:
    f32[..., V].
  """
  scaled = _scaled(logits, sampler)
  if sampler.temperature > 0 and sampler.top_k == 0 and sampler.top_p == 1:
    return scaled
  drawn = jnp.arange(logits.shape[-1]) == tokens[..., None]
  return jnp.where(_support(scaled, sampler) | drawn, scaled, MASKED)


def _scaled(logits: Array, sampler: Sampler) -> Array:
  logits = logits.astype(jnp.float32)
  return logits / sampler.temperature if sampler.temperature > 0 else logits


def _support(scaled: Array, sampler: Sampler) -> Array:
  """bool[..., V]: which tokens can be drawn. A constant for differentiation."""
  scaled = jax.lax.stop_gradient(scaled)
  vocab_size = scaled.shape[-1]
  if sampler.temperature == 0:
    return jnp.arange(vocab_size) == scaled.argmax(-1, keepdims=True)
  keep = jnp.ones(scaled.shape, bool)
  if 0 < sampler.top_k < vocab_size:
    keep = scaled >= jax.lax.top_k(scaled, sampler.top_k)[0][..., -1:]
  if sampler.top_p < 1:
    probabilities = jax.nn.softmax(jnp.where(keep, scaled, MASKED), -1)
    descending = jnp.sort(probabilities, -1, descending=True)
    mass_before = jnp.cumsum(descending, -1) - descending
    least = jnp.where(mass_before < sampler.top_p, descending, 1.0).min(-1, keepdims=True)
    keep &= probabilities >= least
  return keep
