"""Estimators of KL(π ‖ π_ref), the reference policy's divergence, from tokens that π drew.

Each function takes log-probabilities f32[N, G, S] and returns one term a token, f32[N, G, S]. As a
penalty in the reward, where they are constants of the gradient, k1 and k3 are unbiased, and k3
scatters less where π is near π_ref. In the loss it is their *gradients* that count: the expected
gradient of k1 is 0, that of k2 is the gradient of KL(π ‖ π_ref), and that of k3 is the gradient of
KL(π_ref ‖ π). Only k3 has an exponential, whose exponent is bounded from above as `ratios` says.

Source: J. Schulman, Approximating KL divergence, 2020.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp

from jaxrl_pt.config import KLEstimator
from jaxrl_pt.rl import ratios
from jaxrl_pt.types import Array


def k1(logp: Array, reference_logp: Array) -> Array:
  """k1 = log π − log π_ref is unbiased and takes either sign. Do not put it in a loss."""
  chex.assert_equal_shape([logp, reference_logp])
  return logp - reference_logp


def k2(logp: Array, reference_logp: Array) -> Array:
  """k2 = (log π − log π_ref)² / 2 is biased in value, and its gradient is that of the KL."""
  return jnp.square(k1(logp, reference_logp)) / 2


def k3(logp: Array, reference_logp: Array) -> Array:
  """k3 = e^u − u − 1 with u = min(log π_ref − log π, 20), GRPO's estimator (2402.03300).

  It is never negative, and unbiased as long as u stays under the bound. A very negative u needs no
  bound, because e^u then vanishes by itself.
  """
  u = jnp.minimum(-k1(logp, reference_logp), ratios.LOG_BOUND)
  return jnp.expm1(u) - u


ESTIMATORS: dict[KLEstimator, Callable[[Array, Array], Array]] = {'k1': k1, 'k2': k2, 'k3': k3}
