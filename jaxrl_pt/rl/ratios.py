"""Exponentials of differences of log-probabilities, bounded so that none overflows.

`exp` of more than 88 is ∞ in float32, and a `where` or `clip` behind it does not help: the
gradient of the branch that was not taken is 0 · ∞ = NaN, so that one token costs the batch.
Every log ratio is therefore bounded before its `exp`, to ±20 as TRL and verl do it (e²⁰ = 4.9e8).
Beyond the bound a ratio is constant, so its token has no gradient; PPO's clip takes the gradient on
one side anyway. `beyond` marks such tokens, so that they can be counted.
"""

import jax.numpy as jnp

from jaxrl_pt.types import Array

LOG_BOUND = 20.0


def bounded(log_ratio: Array) -> Array:
  """The log ratio clipped to ±LOG_BOUND, f32[...]."""
  return jnp.clip(log_ratio, -LOG_BOUND, LOG_BOUND)


def beyond(log_ratio: Array) -> Array:
  """1 where `bounded` changes the log ratio or the ratio is not a number, else 0; f32[...]."""
  return (~(jnp.abs(log_ratio) <= LOG_BOUND)).astype(jnp.float32)
