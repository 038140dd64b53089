"""Estimators of KL(π ‖ π_ref) from tokens that π drew, one term a token.

As a penalty in the reward (a constant of the gradient) k1 is unbiased and so is k3, which
scatters less near the reference. In the loss their *gradients* tell them apart, not their
values: that of k1 is 0 in expectation, that of k2 is the gradient of KL(π ‖ π_ref), that of
k3 the gradient of KL(π_ref ‖ π). All f32[N, G, S] → f32[N, G, S]. k3 alone has an exponential,
whose exponent is bounded from above as `ratios` says.

Source: J. Schulman, Approximating KL divergence, 2020.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp

from jaxrl_pt.config import KLEstimator
from jaxrl_pt.rl import ratios
from jaxrl_pt.types import Array


def k1(logp: Array, reference_logp: Array) -> Array:
  """log π − log π_ref: unbiased, of either sign. Do not put it in a loss."""
  chex.assert_equal_shape([logp, reference_logp])
  return logp - reference_logp


def k2(logp: Array, reference_logp: Array) -> Array:
  """(log π − log π_ref)² / 2: biased in value, right in gradient."""
  return jnp.square(k1(logp, reference_logp)) / 2


def k3(logp: Array, reference_logp: Array) -> Array:
  """e^u − u − 1 with u = min(log π_ref − log π, 20): never negative, unbiased below the bound
  (GRPO 2402.03300). Below, e^u vanishes by itself and the gradient stays what it is."""
  u = jnp.minimum(-k1(logp, reference_logp), ratios.LOG_BOUND)
  return jnp.expm1(u) - u


ESTIMATORS: dict[KLEstimator, Callable[[Array, Array], Array]] = {'k1': k1, 'k2': k2, 'k3': k3}
