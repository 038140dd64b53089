"""Advantages of each token, from the rewards of each token.

Functions take and return f32[N, G, S] arrays unless they say otherwise. A token with `mask` 0 lies
past the end of the response, was not verified, or is not the policy's own: it takes no part and
gets 0, and a reward on it is ignored. Nothing follows the last token that counts, so the value of
its successor is 0. `TABLE`, at the end, says which config type stands for which function.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.rl import advantages
from jaxrl_pt.rl.advantages import Scored
from jaxrl_pt.rl.entry import Entry
from jaxrl_pt.types import Array

EPSILON = 1e-8


def terminal_rewards(reward: Array, mask: Array) -> Array:
  """Puts a response's reward on its last token that counts and 0 elsewhere, f32[N, G, S].

  Args:
    reward: f32[N, G].
    mask: f32[N, G, S] in {0, 1}.
  """
  chex.assert_rank([reward, mask], [2, 3])
  remaining = jnp.cumsum(mask[..., ::-1], -1)[..., ::-1]
  return reward[..., None] * mask * (remaining == 1)


def reward_to_go(rewards: Array, mask: Array, gamma: float) -> Array:
  """The reward to go: G_t = Σ_{s≥t} γ^{s−t} r_s, where s and t number the tokens that count.

  Args:
    rewards: f32[N, G, S] of each token.
    mask: f32[N, G, S] in {0, 1}.
    gamma: discount of each token.

  Returns:
    f32[N, G, S].
  """
  return generalised(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0)[0]


def whiten(values: Array, mask: Array) -> Array:
  """Whitens over all tokens of the batch that count: (v − mean(v)) / √(var(v) + 1e-8).

  The variance is the unbiased one (divisor n − 1), as in verl; equal values become 0.

  Args:
    values: f32[N, G, S].
    mask: f32[N, G, S] in {0, 1}.

  Returns:
    f32[N, G, S].
  """
  chex.assert_rank(values, 3)
  chex.assert_equal_shape([values, mask])
  count = mask.sum()
  # Taken from the largest value on, equal values give exactly 0, as in `advantages`.
  difference = advantages.below_largest(values.reshape(-1), mask.reshape(-1)).reshape(values.shape)
  centred = (difference - (difference * mask).sum() / jnp.maximum(count, 1)) * mask
  variance = jnp.square(centred).sum() / jnp.maximum(count - 1, 1)
  return centred * jax.lax.rsqrt(variance + EPSILON)


def reinforce_plus_plus(rewards: Array, mask: Array, gamma: float) -> Array:
  """REINFORCE++: A_t = Σ_{s≥t} γ^{s−t} r_s, whitened over all tokens of the batch.

  Args:
    rewards: f32[N, G, S] `terminal_rewards`, from which each token's penalty β · KL is taken.
    mask: f32[N, G, S] in {0, 1}.
    gamma: discount of each token.

  Returns:
    f32[N, G, S].

  Source: 2501.03262.
  """
  return whiten(reward_to_go(rewards, mask, gamma), mask)


def reinforce_plus_plus_baseline(reward: Array, mask: Array, valid: Array) -> Array:
  """REINFORCE++ with baseline: A_t = r − the group's mean, whitened over all tokens of the batch.

  Args:
    reward: f32[N, G].
    mask: f32[N, G, S] in {0, 1}; 0 on rows that are not valid.
    valid: f32[N, G] in {0, 1}.

  Returns:
    f32[N, G, S].

  Source: 2501.03262; undiscounted, as in verl.
  """
  chex.assert_rank([reward, mask], [2, 3])
  centred = advantages.mean_centred(reward, valid)
  return whiten(jnp.broadcast_to(centred[..., None], mask.shape), mask)


def generalised(rewards: Array, values: Array, mask: Array, gamma: float, lam: float
                ) -> tuple[Array, Array]:
  """GAE: A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t.

  Tokens that do not count are stepped over: t + 1 is the next one that does. The result is not
  whitened; PPO as verl runs it calls `whiten` on it.

  Args:
    rewards: f32[N, G, S] of each token.
    values: f32[N, G, S] of the state before each token; constants of the gradient.
    mask: f32[N, G, S] in {0, 1}.
    gamma: discount of each token.
    lam: λ; 0 trusts the values, 1 the rewards.

  Returns:
    f32[N, G, S] advantages, and f32[N, G, S] returns A_t + V_t, the targets of the values.

  Source: 1506.02438.
  """
  chex.assert_rank(rewards, 3)
  chex.assert_equal_shape([rewards, values, mask])
  values = jax.lax.stop_gradient(values)

  def step(later: tuple[Array, Array], token: tuple[Array, Array, Array]
           ) -> tuple[tuple[Array, Array], Array]:
    next_advantage, next_value = later
    reward, value, counts = token
    advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
    kept = (jnp.where(counts > 0, advantage, next_advantage),
            jnp.where(counts > 0, value, next_value))
    return kept, advantage * counts

  zeros = jnp.zeros_like(rewards[..., 0])
  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards, values, mask))
  _, advantage = jax.lax.scan(step, (zeros, zeros), tokens, reverse=True)
  advantage = jnp.moveaxis(advantage, 0, -1)
  return advantage, (advantage + values) * mask


def optimal_token_baseline(rewards: Array, logp: Array, collision: Array, mask: Array) -> Array:
  """The optimal token baseline: A_t = G_t − Σ_i G_t W_t / Σ_i W_t.

    W_t = Σ_{j≤t} (1 − 2 π_j + Σ_v π_v²)

  G_t is the undiscounted reward to go and i runs over the group's responses that have a
  token t. W_t is the squared norm of the score of tokens 1 … t with respect to the logits,
  so that no backward pass is needed.

  Args:
    rewards: f32[N, G, S] of each token.
    logp: f32[N, G, S] log π of the tokens drawn.
    collision: f32[N, G, S] Σ_v π_v² of the distribution they were drawn from.
    mask: f32[N, G, S] in {0, 1}.

  Returns:
    f32[N, G, S]; 0 where one response alone reaches t.

  Source: verl's optimal token baseline; `score_norm` is the summand.
  Departs from it in giving a group of one 0 instead of G_t.
  """
  chex.assert_rank(rewards, 3)
  chex.assert_equal_shape([rewards, logp, collision, mask])
  returns = reward_to_go(rewards, mask, 1.0)
  weights = jnp.cumsum(score_norm(logp, collision) * mask, -1) * mask
  total = weights.sum(1, keepdims=True)
  group_last = lambda x: jnp.moveaxis(x, 1, -1)
  difference = jnp.moveaxis(
      advantages.below_largest(group_last(returns), group_last(mask)), -1, 1)
  baseline = (difference * weights).sum(1, keepdims=True) / jnp.where(total > 0, total, 1.0)
  return (difference - baseline) * mask


def score_norm(logp: Array, collision: Array) -> Array:
  """The squared norm of a token's score: ‖∂ log π(y) / ∂ logits‖² = 1 − 2 π(y) + Σ_v π_v².

  Args:
    logp: f32[...] log π(y).
    collision: f32[...] Σ_v π_v², the chance that two draws agree.
  """
  chex.assert_equal_shape([logp, collision])
  return jnp.maximum(1 - 2 * jnp.exp(logp) + collision, 0.0)


# --- By config type ---------------------------------------------------------------


def _reinforce_plus_plus(config: cfg.ReinforcePlusPlus, s: Scored) -> tuple[Array, Array]:
  advantage = reinforce_plus_plus(s.token_rewards, s.mask, config.gamma)
  return advantage, jnp.zeros_like(s.mask)


def _reinforce_plus_plus_baseline(config: Any, s: Scored) -> tuple[Array, Array]:
  del config
  return reinforce_plus_plus_baseline(s.reward, s.mask, s.valid), jnp.zeros_like(s.mask)


def _whitened_gae(config: cfg.GAE, s: Scored) -> tuple[Array, Array]:
  advantage, returns = generalised(s.token_rewards, s.values, s.mask, config.gamma, config.lam)
  return whiten(advantage, s.mask), returns


def _optimal_token_baseline(config: Any, s: Scored) -> tuple[Array, Array]:
  del config
  advantage = optimal_token_baseline(s.token_rewards, s.logp, s.collision, s.mask)
  return advantage, jnp.zeros_like(s.mask)


TABLE: dict[type, Entry[advantages.Compute]] = {
    cfg.ReinforcePlusPlus: Entry(
        _reinforce_plus_plus, 'A_t = Σ_{s≥t} γ^(s−t) (r_s − β kl_s), whitened', '2501.03262',
        'REINFORCE++', 'reinforce_plus_plus'),
    cfg.ReinforcePlusPlusBaseline: Entry(
        _reinforce_plus_plus_baseline, 'A_t = r − mean of the group, whitened', '2501.03262',
        'REINFORCE++, baseline', 'reinforce_plus_plus_baseline'),
    cfg.GAE: Entry(
        _whitened_gae, 'A_t = Σ_l (γλ)^l δ_{t+l}, whitened; δ_t = r_t + γ V_{t+1} − V_t',
        '1506.02438', 'PPO', 'ppo', needs_policy=True),
    cfg.OptimalTokenBaseline: Entry(
        _optimal_token_baseline, 'A_t = G_t − Σ G_t W_t / Σ W_t', 'verl',
        'Optimal token baseline', 'optimal_token_baseline', needs_policy=True),
}
