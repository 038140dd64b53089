"""RLP's reward: what a thought adds to the log-probability of the token that comes next.

    r(c) = log p_θ(x_t | x_<t, c) − log p̄_φ(x_t | x_<t),   φ ← τ φ + (1 − τ) θ

The baseline p̄_φ reads the same text without a thought. The reward is dense and needs no
verifier: where no thought of a group leads to the right token, some still make it likelier.
The advantage is `advantages.leave_one_out`, and the surrogate acts on thought tokens alone.

Source: RLP 2510.01265 (docs/methods/rlp.md).
"""

import chex
import jax
import optax

from jaxrl_pt.types import Array, Params


def information_gain(logp: Array, baseline: Array) -> Array:
  """RLP's reward in nats, f32[N, G]: r = log p_θ(x_t | x_<t, c) − log p̄_φ(x_t | x_<t).

  Args:
    logp: f32[N, G] log-probability of the true token after each thought, under the policy.
    baseline: f32[N] its log-probability without a thought, under the average policy.
  """
  chex.assert_rank([logp, baseline], [2, 1])
  return logp - baseline[:, None]


def average(params: Params, policy: Params, decay: float) -> Params:
  """The average policy after an update of the policy: φ ← τ φ + (1 − τ) θ.

  Args:
    params: φ, the average before.
    policy: θ, the policy's parameters after its update. They have leaves where the average has
      None, which are frozen.
    decay: τ; the paper has 0.999.
  """
  return jax.tree.map(
      lambda mean, now: None if mean is None else optax.incremental_update(now, mean, 1 - decay),
      params, policy, is_leaf=lambda x: x is None)
