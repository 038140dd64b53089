"""Other ways than HGPO to learn when to think: comparators, in the same harness.

All of them take the modes of a group's responses (`types.RolloutBatch.mode`) and differ in what the
token of the mode earns. A response whose mode is NO_MODE takes part like one that thinks, since it
has no right to what is paid for being short.
"""

import chex
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.rl import advantages
from jaxrl_pt.rl.advantages import Scored
from jaxrl_pt.rl.entry import Entry
from jaxrl_pt.types import NO_THINK, THINK, Array


def thinkless(reward: Array, mode: Array, valid: Array, think_cost: float) -> Array:
  """Thinkless: A = r' − mean(r') with r' = r − γ · max(r, 0) on responses that think.

  Args:
    reward: f32[N, G].
    mode: i32[N, G] in {THINK, NO_THINK, NO_MODE}.
    valid: f32[N, G] in {0, 1}.
    think_cost: γ, the share of a reward that thinking costs.

  Returns:
    f32[N, G].

  Source: 2505.13379, section 3.2.
  Departs from the paper in taking the verifier's reward where it takes −1 for a wrong answer.
  """
  chex.assert_rank([reward, mode, valid], 2)
  cost = jnp.where(mode == NO_THINK, 0.0, think_cost * jnp.maximum(reward, 0.0))
  return advantages.mean_centred(reward - cost, valid)


def adapt_think(reward: Array, mode: Array, valid: Array, bonus: float) -> Array:
  """AdaptThink: A = δ · 1[no-think] + r − R̄, where R̄ is the mean reward of thinking.

  Args:
    reward: f32[N, G].
    mode: i32[N, G] in {THINK, NO_THINK, NO_MODE}.
    valid: f32[N, G] in {0, 1}.
    bonus: δ.

  Returns:
    f32[N, G]; 0 in a group without a valid response that thinks.

  Source: 2505.13417, equations 5 and 6.
  Departs from the paper in that R̄ is the mean of the group's own responses that think. The paper's
  is one of the reference policy, drawn once before training.
  """
  chex.assert_rank([reward, mode, valid], 2)
  thinking = valid * (mode == THINK)
  number = thinking.sum(-1, keepdims=True)
  baseline = (jnp.where(thinking > 0, reward, 0.0)).sum(-1, keepdims=True) / jnp.maximum(number, 1)
  return (bonus * (mode == NO_THINK) + reward - baseline) * valid * (number > 0)


def mode_efficiency(reward: Array, mode: Array, valid: Array) -> tuple[Array, Array]:
  """GRPO on every token, and of right short answers on the mode's token: A(r), A(r · 1[no-think]).

  Args:
    reward: f32[N, G].
    mode: i32[N, G] in {THINK, NO_THINK, NO_MODE}.
    valid: f32[N, G] in {0, 1}.

  Returns:
    f32[N, G] twice: the advantage of every token, and what is added on the mode's.

  Source: the idea of ADaPT (2606.19919): efficiency is paid on the mode's token alone, so that a
  long right response is not punished. Its abstract alone was read: the reward is ours.
  """
  chex.assert_rank([reward, mode, valid], 2)
  short = jnp.where(mode == NO_THINK, reward, 0.0)
  return (advantages.group_normalised(reward, valid), advantages.group_normalised(short, valid))


# --- By config type ---------------------------------------------------------------


def _thinkless(config: cfg.Thinkless, s: Scored) -> tuple[Array, Array]:
  value = thinkless(s.reward, s.mode, s.valid, config.think_cost)
  return value[..., None] * s.mask, jnp.zeros_like(s.mask)


def _adapt_think(config: cfg.AdaptThink, s: Scored) -> tuple[Array, Array]:
  value = adapt_think(s.reward, s.mode, s.valid, config.bonus)
  return value[..., None] * s.mask, jnp.zeros_like(s.mask)


def _mode_efficiency(config: cfg.ModeEfficiency, s: Scored) -> tuple[Array, Array]:
  every, of_mode = mode_efficiency(s.reward, s.mode, s.valid)
  advantage = every[..., None] * s.mask
  advantage = advantage.at[..., 0].add(config.alpha * of_mode * s.mask[..., 0])
  return advantage, jnp.zeros_like(s.mask)


TABLE: dict[type, Entry[advantages.Compute]] = {
    cfg.Thinkless: Entry(
        _thinkless, 'A = r − γ r 1[think] − mean; mode and response normalised apart',
        '2505.13379', 'Thinkless', 'thinkless', learns_modes=True),
    cfg.AdaptThink: Entry(
        _adapt_think, 'A = δ 1[no-think] + r − mean of thinking; modes drawn evenly, ρ = π / ½',
        '2505.13417', 'AdaptThink', 'adapt_think', learns_modes=True, modes_even=True),
    cfg.ModeEfficiency: Entry(
        _mode_efficiency, 'A = A(r) + α A(r 1[no-think]) on the mode token', '2606.19919',
        'Efficiency on the mode token', 'mode_efficiency', learns_modes=True),
}
