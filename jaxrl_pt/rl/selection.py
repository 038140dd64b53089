"""Which groups of responses are worth learning from."""

import chex
import jax.numpy as jnp

from jaxrl_pt.types import Array


def informative_groups(correct: Array, valid: Array) -> Array:
  """DAPO's dynamic sampling keeps a group iff 0 < #correct < #responses among its valid rows.

  Args:
    correct: f32[N, G] in {0, 1}.
    valid: f32[N, G] in {0, 1}.

  Returns:
    f32[N] in {0, 1}.

  Source: 2503.14476, equation 11.
  """
  chex.assert_rank(correct, 2)
  chex.assert_equal_shape([correct, valid])
  num_correct = (correct * valid).sum(-1)
  return ((num_correct > 0) & (num_correct < valid.sum(-1))).astype(jnp.float32)
