"""Gated feed-forward layers."""

import jax
import jax.numpy as jnp

from jaxrl_pt.config import Activation
from jaxrl_pt.types import Array


def gated(gate: Array, up: Array, activation: Activation) -> Array:
  """The gated product: SiLU(gate) ⊙ up (2002.05202) or ReLU(gate)² ⊙ up (2504.12285)."""
  if activation == 'swiglu':
    return jax.nn.silu(gate) * up
  return jnp.square(jax.nn.relu(gate)) * up
