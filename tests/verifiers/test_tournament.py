"""Votes, brackets, schedules and ratings, driven by simulated judges."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import tournament as t
from jaxrl_pt.verifiers.judge import FIRST, NONE, SECOND


class Perfect:
  """A judge that names the response with the higher number, and counts what it is asked."""

  def __init__(self, num_votes=1):
    self.rounds, self.num_votes = [], num_votes

  def __call__(self, comparisons):
    self.rounds.append(comparisons)
    won = np.where(comparisons[:, 1] > comparisons[:, 2], FIRST, SECOND)
    return np.repeat(won[:, None], self.num_votes, 1).astype(np.int8)


# --- Votes ------------------------------------------------------------------------

VOTES = np.array([[0, 0, 1], [1, 1, 0], [0, 1, -1], [-1, -1, -1], [0, -1, -1]], np.int8)
ASKED = np.array([[0, i, i + 1] for i in range(5)])


def test_shares_of_the_votes():
  np.testing.assert_allclose(t.shares(VOTES), [2 / 3, 1 / 3, 0.5, 0.5, 1])
  np.testing.assert_allclose(t.shares(VOTES, 'split'), [2 / 3, 1 / 3, 0.5, 0.5, 2 / 3])


def test_majorities_and_ties_by_each_rule():
  scores = lambda **rule: t.scores(VOTES, ASKED, t.Rule(**rule)).tolist()
  assert scores(tie='first') == [1, 0, 1, 1, 1]
  assert scores(tie='half') == [1, 0, 0.5, 0.5, 1]
  by_coin = scores(tie='coin')
  assert by_coin[:2] + by_coin[4:] == [1, 0, 1] and set(by_coin[2:4]) <= {0, 1}
  np.testing.assert_allclose(scores(is_soft=True, unparsed='split'), t.shares(VOTES, 'split'))


def test_coins_are_fair_stay_and_follow_seed_row_and_column():
  rows = np.stack(np.meshgrid(range(40), range(10), range(10), indexing='ij'), -1).reshape(-1, 3)
  first = t.coins(rows, 0)
  np.testing.assert_array_equal(first, t.coins(rows, 0))
  for other in (t.coins(rows, 1), t.coins(rows[:, [0, 2, 1]], 0), t.coins(rows + [1, 0, 0], 0)):
    assert 0.45 < (first == other).mean() < 0.55 or (first != other).sum() > 1500
  assert abs(first.mean() - 0.5) < 0.03


def test_both_orders_cancel_a_preference_for_the_first_place():
  always_first = lambda c: np.zeros((len(c), 3), np.int8)
  votes = t.in_both_orders(always_first)(ASKED)
  assert votes.tolist() == [[0, 0, 0, 1, 1, 1]] * 5
  assert t.turned(VOTES).tolist()[2] == [SECOND, FIRST, NONE]
  ended = t.round_robin([4], t.in_both_orders(always_first))[0]
  np.testing.assert_allclose(ended.ratings, 0, atol=1e-9)


# --- Knockout ---------------------------------------------------------------------


@pytest.mark.parametrize('numbers', [[1], [2], [3], [5, 8], [7, 1, 16, 6]], ids=str)
def test_a_knockout_takes_one_comparison_less_than_candidates_in_logarithmic_rounds(numbers):
  judge = Perfect(3)
  for n, end in zip(numbers, t.knockout(numbers, judge), strict=True):
    assert end.winner == n - 1 and end.num_comparisons == n - 1 == int(end.wins.sum())
    assert end.num_rounds == math.ceil(math.log2(n)) and end.num_votes == 3 * (n - 1)
  assert len(judge.rounds) == max(math.ceil(math.log2(n)) for n in numbers)  # a call a round


def test_who_has_a_bye_is_drawn_and_gets_no_second_one_while_others_had_none():
  byes = np.zeros(5, int)
  for seed in range(200):
    judge = Perfect()
    t.knockout([5], judge, t.Rule(seed=seed))
    played = [set(games[:, 1:].ravel().tolist()) for games in judge.rounds]
    first = set(range(5)) - played[0]
    assert len(first) == 1 and first <= played[1]
    byes[first.pop()] += 1
  assert byes.min() > 20


def test_places_in_a_bracket_are_drawn_and_half_of_the_time_first():
  judge = Perfect()
  t.knockout([8] * 100, judge)
  games = np.concatenate(judge.rounds)
  assert 0.4 < (games[:, 1] > games[:, 2]).mean() < 0.6
  other = Perfect()
  t.knockout([8] * 100, other, t.Rule(seed=1))
  assert not np.array_equal(judge.rounds[0], other.rounds[0])


def test_a_knockout_needs_winners():
  for rule in (t.Rule('half'), t.Rule(is_soft=True)):
    with pytest.raises(UserError, match='A knockout needs a winner'):
      t.knockout([3], Perfect(), rule)


# --- Round robin ------------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 2, 3, 7, 8])
def test_everybody_meets_everybody_once_and_stands_first_as_often_as_second(n):
  games = t.schedule(n)
  assert len({frozenset(game) for game in games.tolist()}) == n * (n - 1) // 2 == len(games)
  firsts, seconds = (np.bincount(games[:, i], minlength=n) for i in (0, 1))
  assert np.abs(firsts - seconds).max() <= (n % 2 == 0)


def test_a_part_of_a_round_robin_connects_all():
  for n in range(2, 9):
    reached = {0}
    for a, b in t.schedule(n, n - 1).tolist() * n:
      reached |= {a, b} if reached & {a, b} else set()
    assert reached == set(range(n))


def test_a_round_robin_is_one_call_and_ranks_as_wins_do():
  judge = Perfect()
  ended = t.round_robin([5, 1, 8], judge)
  assert len(judge.rounds) == 1 and [e.winner for e in ended] == [4, 0, 7]
  assert [e.num_comparisons for e in ended] == [10, 0, 28]
  assert (np.diff(ended[2].ratings) > 0).all() and ended[2].wins.tolist() == list(range(8))
  part = t.round_robin([8], Perfect(), most=12)[0]
  assert part.num_comparisons == 12 and part.winner in (6, 7)  # They have not met.


def test_equal_candidates_win_equally_often():
  half = lambda c: np.tile([[0, 1]], (len(c), 1)).astype(np.int8)
  won = np.bincount([e.winner for e in t.round_robin([4] * 400, half)], minlength=4)
  assert won.min() > 60


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 7), st.integers(0, 10**6))
def test_ratings_are_the_largest_likelihood_and_rank_a_whole_round_robin_by_wins(n, seed):
  rng = np.random.default_rng(seed)
  won = np.triu(rng.random((n, n)) < 0.5, 1).astype(float)
  wins = won + np.tril(1 - won.T, -1)
  theta = t.ratings(wins)
  best = t._likelihood(theta, wins, t.PRIOR)
  for _ in range(20):
    assert t._likelihood(theta + rng.normal(0, 0.1, n), wins, t.PRIOR) <= best + 1e-9
  total = wins.sum(1)
  for i in range(n):
    for j in range(n):
      assert np.sign(round(theta[i] - theta[j], 6)) == np.sign(total[i] - total[j])


def test_two_players_have_the_odds_of_their_games():
  theta = t.ratings(np.array([[0, 3.0], [1, 0]]), prior=1e-6)
  assert theta[0] - theta[1] == pytest.approx(math.log(3), abs=1e-4)
  elo = t.elo(np.array([math.log(10), 0.0]))
  assert elo[0] - elo[1] == pytest.approx(400)
  unbeaten = t.ratings(np.array([[0, 5.0], [0, 0]]))
  assert np.isfinite(unbeaten).all() and unbeaten[0] > unbeaten[1]


# --- Budgets ----------------------------------------------------------------------


@pytest.mark.parametrize('method, n, budget, votes, expected', [
    ('knockout', 8, 35, None, (7, 5)), ('knockout', 8, 34, None, (7, 3)),
    ('knockout', 8, 7, None, (7, 1)), ('round_robin', 8, 84, None, (28, 3)),
    ('round_robin', 8, 20, None, (20, 1)), ('round_robin', 8, 60, 5, (12, 5))])
def test_a_budget_is_met(method, n, budget, votes, expected):
  plan = t.plan(method, n, budget, votes)
  assert plan == expected and plan.comparisons * plan.votes <= budget


@pytest.mark.parametrize('method', ['knockout', 'round_robin'])
def test_a_budget_that_leaves_a_candidate_out_is_refused(method):
  with pytest.raises(UserError, match='takes at least 21; raise the budget'):
    t.plan(method, 8, 20, 3)


# --- A judge that is right with a known probability ---------------------------------


@pytest.mark.parametrize('accuracy, votes, method, expected', [
    (0.7, 1, t.knockout, 0.58), (0.7, 5, t.knockout, 0.79), (0.7, 1, t.round_robin, 0.66),
    (0.8, 5, t.knockout, 0.88), (0.9, 1, t.round_robin, 0.90)])
def test_the_best_of_eight_is_right_as_often_as_it_should_be(accuracy, votes, method, expected):
  """Of 8 candidates each is right with probability 0.3; pairs that are equal are coins."""
  num, rng = 400, np.random.default_rng(2)
  right = rng.random((num, 8)) < 0.3

  def judge(asked):
    first, second = (right[asked[:, 0], asked[:, i]] for i in (1, 2))
    chance = np.where(first == second, 0.5, np.where(first, accuracy, 1 - accuracy))
    return (rng.random((len(asked), votes)) >= chance[:, None]).astype(np.int8)

  won = [right[q, end.winner] for q, end in enumerate(method([8] * num, judge))]
  assert abs(np.mean(won) - expected) <= 2 * math.sqrt(expected * (1 - expected) / num)
