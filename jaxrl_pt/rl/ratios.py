"""Exponentials of differences of log-probabilities, bounded so that none overflows.

`exp` of more than 88 is ∞ in float32, and a `where` or `clip` behind it does not help: the
gradient of the branch that was not taken is 0 · ∞ = NaN, so that one token costs the batch.
Every log ratio is therefore bounded before its `exp`, to ±20 as TRL and verl do it (e²⁰ = 4.9e8).
Beyond the bound a ratio is constant and its token has no gradient, which PPO's clip gives it on
one side anyway. `beyond` says where that was, so that it can be counted.
"""

import jax.numpy as jnp

from jaxrl_pt.types import Array

LOG_BOUND = 20.0


def bounded(log_ratio: Array) -> Array:
  """f32[...]: the log ratio inside ±LOG_BOUND."""
  return jnp.clip(log_ratio, -LOG_BOUND, LOG_BOUND)


def beyond(log_ratio: Array) -> Array:
  """f32[...]: 1 where `bounded` changes the log ratio, or where it is not a number."""
  return (~(jnp.abs(log_ratio) <= LOG_BOUND)).astype(jnp.float32)
