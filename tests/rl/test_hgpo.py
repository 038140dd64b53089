"""HGPO and its comparators against plain loops over groups, and what each of them is made for."""

import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.rl import hgpo, mode_choice, objectives, tables
from jaxrl_pt.rl.advantages import Scored
from jaxrl_pt.types import NO_MODE, NO_THINK, THINK

T, N = THINK, NO_THINK
NUM, G, S = 40, 6, 5


def batch(seed: int, **changes) -> Scored:
  """Groups of rewards 0, ½ and 1; some responses were not verified, and some have no mode."""
  random = np.random.default_rng(seed)
  reward = random.integers(0, 3, (NUM, G)) / 2
  mode = random.permuted(np.tile([T, T, T, N, N, N], (NUM, 1)), axis=1)
  mode[random.random((NUM, G)) < 0.1] = NO_MODE
  valid = (random.random((NUM, G)) < 0.9).astype(np.float32)
  there = np.arange(S) < random.integers(1, S + 1, (NUM, G, 1))
  mask = (there * valid[..., None]).astype(np.float32)
  zeros = np.zeros((NUM, G, S), np.float32)
  return Scored(reward.astype(np.float32), mask.sum(-1), valid, zeros, mask, zeros, zeros, zeros,
                mode)._replace(**changes)


def inter(reward, mode, valid, margin, ties):
  """r_inter of one group, after the paper's text."""
  rows = {m: [r for r, at, v in zip(reward, mode, valid) if at == m and v] for m in (T, N)}
  if not rows[T] or not rows[N]:
    return [0.0] * len(reward)
  think, no_think = np.mean(rows[T]), np.mean(rows[N]) + margin
  winner = T if think > no_think + 1e-6 else N if think < no_think - 1e-6 else {
      'think': T, 'no_think': N, 'neither': None}[ties]
  return [float(v and at == winner) for at, v in zip(mode, valid)]


def intra(reward, mode, valid, ties):
  """r_intra of one group: the best of each mode."""
  wins = [0.0] * len(reward)
  for m in (T, N):
    mine = [i for i, (at, v) in enumerate(zip(mode, valid)) if at == m and v]
    best = [i for i in mine if reward[i] == max(reward[j] for j in mine)]
    if ties == 'one':
      best = best[:1] if len(best) < len(mine) else []
    for i in best:
      wins[i] = 1.0
  return wins


@pytest.mark.parametrize('ties', ['think', 'no_think', 'neither'])
@pytest.mark.parametrize('margin', [0.0, 0.25, 0.5])
def test_the_better_mode_gets_the_inter_group_reward(margin, ties):
  s = batch(1)
  found = np.asarray(hgpo.inter_group_reward(s.reward, s.mode, s.valid, margin, ties))
  want = [inter(*group, margin, ties) for group in zip(s.reward, s.mode, s.valid)]
  np.testing.assert_array_equal(found, want)
  assert 0.1 < found.mean() < 0.9


@pytest.mark.parametrize('ties', ['one', 'all'])
def test_the_best_of_each_mode_gets_the_intra_group_reward(ties):
  s = batch(2)
  found = np.asarray(hgpo.intra_group_reward(s.reward, s.mode, s.valid, ties))
  np.testing.assert_array_equal(
      found, [intra(*group, ties) for group in zip(s.reward, s.mode, s.valid)])
  if ties == 'one':  # Otherwise a mode with more right answers would have more winners.
    for m in (T, N):
      assert (found * (s.mode == m)).sum(1).max() == 1


def normalised(values, counted, form):
  """GRPO's or RLOO's advantage of one group."""
  mine = [v for v, c in zip(values, counted) if c]
  if len(mine) < 2:
    return np.zeros(len(values))
  centred = np.array(values) - np.mean(mine)
  scaled = (centred / (np.std(mine, ddof=1) + 1e-6) if form == 'grpo'
            else centred * len(mine) / (len(mine) - 1))
  return scaled * np.array(counted)


@pytest.mark.parametrize('form', ['grpo', 'rloo'])
@pytest.mark.parametrize('over', ['mode', 'group'])
def test_hgpo_of_every_token_written_out(form, over):
  s, config = batch(3), cfg.HGPO(form=form, alpha=0.7, best_over=over)
  found = np.asarray(hgpo.hgpo(config, s)[0])
  for n in range(NUM):
    group = s.reward[n], s.mode[n], s.valid[n]
    counted = s.valid[n] * (s.mode[n] != NO_MODE)
    best = intra(*group, 'one')
    parts = ([s.valid[n] * (s.mode[n] == m) for m in (T, N)] if over == 'mode' else [counted])
    every = sum(normalised(best, part, form) for part in parts)
    of_mode = normalised(inter(*group, 0.2, 'no_think'), counted, form)
    want = every[:, None] * s.mask[n] * counted[:, None]
    want[:, 0] += 0.7 * of_mode * s.mask[n, :, 0]
    np.testing.assert_allclose(found[n], want, atol=1e-4)


def test_reinforce_plus_plus_discounts_the_best_and_whitens_both_terms():
  s, config = batch(4), cfg.HGPO(form='reinforce_plus_plus', gamma=0.5)
  both = np.asarray(hgpo.hgpo(config, s)[0])
  every = np.asarray(hgpo.hgpo(cfg.HGPO(form='reinforce_plus_plus', gamma=0.5, alpha=0.0), s)[0])
  assert (both != every)[..., 0].any() and (both == every)[..., 1:].all()
  counted = (s.mask * (s.mode != NO_MODE)[..., None]) > 0
  assert abs(every[counted].mean()) < 1e-5 and abs(every[counted].std() - 1) < 0.01
  # γ of tokens before the end: a longer best response earns its first token less.
  best = np.asarray(hgpo.intra_group_reward(s.reward, s.mode, s.valid, 'one')) > 0
  first = {length: every[best & (s.lengths == length)][:, 0].mean() for length in (1, 3, 5)}
  assert first[1] > first[3] > first[5]


def test_no_token_but_the_modes_learns_of_the_other_mode():
  """Better answers of one mode move the other's advantages in nothing but the mode's token."""
  s = batch(5)
  other = s._replace(reward=np.where(s.mode == T, s.reward + 1, s.reward))
  one, two = (np.asarray(hgpo.hgpo(cfg.HGPO(), x)[0]) for x in (s, other))
  np.testing.assert_allclose(one[..., 1:], two[..., 1:], atol=1e-5)
  assert (np.abs(one[..., 0] - two[..., 0]) > 0.1).any()
  without = np.asarray(hgpo.hgpo(cfg.HGPO(alpha=0.0), s)[0])
  np.testing.assert_allclose(without[..., 0] * (s.mask[..., 1] > 0),
                             without[..., 1] * (s.mask[..., 1] > 0), atol=1e-6)


@pytest.mark.parametrize('num, margins', [(4, [0.0, 0.2, 0.4, 0.6]), (16, [0.0, 0.1, 0.2, 0.4])])
def test_margins_between_two_multiples_are_one_margin(num, margins):
  """2505.14631's δ is a staircase: with 4 responses of reward 0 or 1, all of (0, ½) are equal."""
  random = np.random.default_rng(0)
  mode = np.tile(np.repeat([T, N], num // 2), (4000, 1))
  reward = (random.random(mode.shape) < np.where(mode == T, 0.8, 0.4)).astype(np.float32)
  share = [float(hgpo.inter_group_reward(reward, mode, np.ones_like(reward), margin, 'no_think')[
      :, 0].mean()) for margin in margins]
  assert share == sorted(share, reverse=True) and share[0] > share[-1]
  assert (share[1] == share[2]) == (num == 4)


@pytest.mark.parametrize('easy, hard, num', [(0.12, 0.74, 4), (0.07, 0.92, 16)])
def test_how_often_thinking_wins_where_it_is_worth_so_much(easy, hard, num):
  """Easy prompts: 0.95 against 0.93 right; hard ones 0.80 against 0.30; δ = 0.2."""
  random = np.random.default_rng(0)
  for expected, (think, no_think) in ((easy, (0.95, 0.93)), (hard, (0.8, 0.3))):
    mode = np.tile(np.repeat([T, N], num // 2), (20000, 1))
    reward = (random.random(mode.shape) < np.where(mode == T, think, no_think)).astype(np.float32)
    won = hgpo.inter_group_reward(reward, mode, np.ones_like(reward), 0.2, 'no_think')[:, 0].mean()
    assert float(won) == pytest.approx(expected, abs=0.012)


# --- Comparators ------------------------------------------------------------------

REWARD = np.array([[1, 0, 1, 0]], np.float32)
MODE, VALID = np.array([[T, T, N, N]]), np.ones((1, 4), np.float32)


def test_thinkless_pays_less_for_a_right_answer_that_was_thought_about():
  found = mode_choice.thinkless(REWARD, MODE, VALID, 0.5)
  np.testing.assert_allclose(found, [[0.125, -0.375, 0.625, -0.375]], atol=1e-6)
  unknown = mode_choice.thinkless(REWARD, np.full((1, 4), NO_MODE), VALID, 0.5)
  np.testing.assert_allclose(unknown, [[0.25, -0.25, 0.25, -0.25]], atol=1e-6)


def test_adapt_think_compares_with_the_mean_of_thinking():
  found = mode_choice.adapt_think(REWARD, MODE, VALID, 0.05)
  np.testing.assert_allclose(found, [[0.5, -0.5, 0.55, -0.45]], atol=1e-6)
  nobody = mode_choice.adapt_think(REWARD, np.full((1, 4), N), VALID, 0.05)
  assert not np.asarray(nobody).any()


def test_efficiency_is_paid_on_the_modes_token_alone():
  s = batch(6)
  one, two = (np.asarray(tables.ADVANTAGES[cfg.ModeEfficiency].compute(
      cfg.ModeEfficiency(alpha), s)[0]) for alpha in (0.0, 1.0))
  assert (one[..., 1:] == two[..., 1:]).all()
  of_mode = (two - one)[..., 0]
  right_and_short = (s.mode == N) & (s.reward == 1) & (s.valid > 0)
  assert of_mode[right_and_short].mean() > 0.5 > 0 > of_mode[(s.mode == T) & (s.valid > 0)].mean()


def test_the_modes_token_has_a_weight_of_its_own():
  values = np.arange(1.0, 7.0).reshape(1, 2, 3).astype(np.float32)
  mask = np.array([[[1, 1, 1], [1, 1, 0]]], np.float32)
  found = objectives.decoupled_modes(0.1)(values, mask)
  assert float(found) == pytest.approx((0.1 * (1 + 4) + (2 + 3) / 2 + 5) / 2)
