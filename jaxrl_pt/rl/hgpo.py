"""HGPO: which mode of a response was the better one, and which response the best of its mode.

A group has responses of two modes, think (0) and answer at once (1), and half of it is forced into
each. Two rewards of 0 or 1 are made of the verifier's:

    inter-group   1 on all responses of the mode with the greater mean, where the mode that answers
                  at once gets a margin δ for being short
    intra-group   1 on the best response of each mode

The advantage of the intra-group reward is on every token, that of the inter-group reward on the
token of the mode alone:

    A_{i,t} = A(r_intra)_i + 1[t is the mode token] · α · A(r_inter)_i

A response whose mode is NO_MODE began with neither mode's token: it takes no part, and gets 0.

Source: LHRM 2505.14631, section 3.2. The paper leaves open what is done on ties and over which
responses the rewards are normalised; `cfg.HGPO` names the choices.
"""

import chex
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.rl import advantages, token_advantages
from jaxrl_pt.rl.advantages import Scored
from jaxrl_pt.rl.entry import Entry
from jaxrl_pt.types import NO_MODE, NO_THINK, THINK, Array

MODES = (THINK, NO_THINK)


def inter_group_reward(reward: Array, mode: Array, valid: Array, margin: float,
                       ties: cfg.ModeTies) -> Array:
  """r_inter: 1 if m_i = argmax {mean of think, mean of no-think + δ}, else 0.

  Args:
    reward: f32[N, G].
    mode: i32[N, G] in {THINK, NO_THINK, NO_MODE}.
    valid: f32[N, G] in {0, 1}.
    margin: δ.
    ties: the mode that wins where both sides are equal.

  Returns:
    f32[N, G]; 0 where a mode of the group has no valid response, since nothing was compared.

  Source: 2505.14631, section 3.2.
  """
  chex.assert_rank([reward, mode, valid], 2)
  chex.assert_equal_shape([reward, mode, valid])
  counted = [valid * (mode == m) for m in MODES]
  means = [(jnp.where(c > 0, reward, 0.0)).sum(-1, keepdims=True)
           / jnp.maximum(c.sum(-1, keepdims=True), 1) for c in counted]
  sides = jnp.concatenate([means[THINK], means[NO_THINK] + margin], -1)
  # Means of equal rewards can differ by a rounding.
  is_best = advantages.below_largest(sides, jnp.ones_like(sides)) == 0
  tied = is_best.all(-1, keepdims=True)
  winner = jnp.where(tied, {'think': THINK, 'no_think': NO_THINK, 'neither': NO_MODE}[ties],
                     is_best.argmax(-1, keepdims=True))
  compared = (counted[THINK].sum(-1, keepdims=True) > 0) & (
      counted[NO_THINK].sum(-1, keepdims=True) > 0)
  return ((mode == winner) & (mode != NO_MODE) & compared).astype(jnp.float32) * valid


def intra_group_reward(reward: Array, mode: Array, valid: Array, ties: cfg.BestTies) -> Array:
  """r_intra: 1 on the best response of each mode, else 0.

  Args:
    reward: f32[N, G].
    mode: i32[N, G] in {THINK, NO_THINK, NO_MODE}.
    valid: f32[N, G] in {0, 1}.
    ties: 'one' takes the first of several best ones and none where all of a mode are equal;
      'all' takes all best ones.

  Returns:
    f32[N, G].

  Source: 2505.14631, section 3.2.
  """
  chex.assert_rank([reward, mode, valid], 2)
  chex.assert_equal_shape([reward, mode, valid])
  total = jnp.zeros_like(reward)
  for m in MODES:
    mine = valid * (mode == m)
    best = (advantages.below_largest(reward, mine) == 0) * mine
    if ties == 'one':
      is_mixed = best.sum(-1, keepdims=True) < mine.sum(-1, keepdims=True)
      best = best * (jnp.cumsum(best, -1) == 1) * is_mixed
    total += best
  return total


def _advantage(form: cfg.HybridForm, reward: Array, counted: Array) -> Array:
  """f32[N, G]: GRPO's or RLOO's advantage over the counted responses of a group."""
  if form == 'rloo':
    return advantages.leave_one_out(reward, counted)
  return advantages.group_normalised(reward, counted)


def hgpo(config: cfg.HGPO, s: Scored) -> tuple[Array, Array]:
  """A_{i,t} = A(r_intra)_i + 1[t is the mode token] · α · A(r_inter)_i, f32[N, G, S].

  The inter-group reward is constant within a mode, so that it is always normalised over the whole
  group. With 'reinforce_plus_plus' the first term is Σ_{s≥t} γ^{s−t} r_intra and the second
  α · r_inter, both centred over the batch: the paper subtracts no baseline from either.

  Departs from the paper, for that form, in centring and scaling both terms, as REINFORCE++ does.
  """
  has_mode = s.valid * (s.mode != NO_MODE)
  intra = intra_group_reward(s.reward, s.mode, s.valid, config.best_ties)
  inter = inter_group_reward(s.reward, s.mode, s.valid, config.margin, config.mode_ties)
  mask = s.mask * has_mode[..., None]
  on_mode_token = jnp.zeros_like(mask).at[..., 0].set(1.0) * mask
  if config.form == 'reinforce_plus_plus':
    rewards = token_advantages.terminal_rewards(intra, mask)
    every = token_advantages.reinforce_plus_plus(rewards, mask, config.gamma)
    of_mode = token_advantages.whiten(inter[..., None] * on_mode_token, on_mode_token)
    return every + config.alpha * of_mode, jnp.zeros_like(mask)
  if config.best_over == 'mode':
    of_best = sum(_advantage(config.form, intra, s.valid * (s.mode == m)) for m in MODES)
  else:
    of_best = _advantage(config.form, intra, has_mode)
  of_mode = _advantage(config.form, inter, has_mode)
  advantage = jnp.asarray(of_best)[..., None] + config.alpha * of_mode[..., None] * on_mode_token
  return advantage * mask, jnp.zeros_like(mask)


TABLE: dict[type, Entry[advantages.Compute]] = {
    cfg.HGPO: Entry(
        hgpo, 'A = A(r_intra) + α A(r_inter) on the mode token', '2505.14631', 'HGPO', 'hgpo',
        learns_modes=True)}
