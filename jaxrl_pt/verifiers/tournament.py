"""Tournaments: many candidates ranked by a judge that compares two at a time.

    judge(comparisons i64[C, 3]) → votes i8[C, K]      a comparison is (query, first, second)

A judge is any such function: of an engine that draws verdicts (`environments.judging`), or a
simulated one. All that is here is arithmetic on its votes, by numpy.

    knockout     n − 1 comparisons in ⌈log2 n⌉ rounds; who has no opponent goes on without a game
    round robin  n (n − 1) / 2 comparisons in one round, or fewer; rated by Bradley and Terry

A round of all queries is one call of the judge, so that one large batch is drawn.

Source: Reward Reasoning Model, 2505.14674, which has both, with votes. What it leaves open (byes,
ties, the order in which two are shown, Elo's constant) is named in docs/methods/rrm.md.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers.judge import FIRST, NONE, SECOND

Judge = Callable[[np.ndarray], np.ndarray]
Method = Literal['knockout', 'round_robin']
# What becomes of a comparison without a majority: a coin that is a hash of it, the response that
# was shown first, or half a win for each.
Tie = Literal['coin', 'first', 'half']
# What becomes of a vote without a verdict: it is left out, or counts half for each.
Unparsed = Literal['ignore', 'split']


class Rule(NamedTuple):
  """How votes become wins.

  tie: of a comparison without a majority; a knockout needs a winner and takes no 'half'.
  unparsed: of votes without a verdict.
  is_soft: whether a comparison counts by the share of its votes instead of by their majority, in a
    round robin; only then do both choices of `unparsed` differ.
  seed: of coins, brackets and orders.
  """

  tie: Tie = 'coin'
  unparsed: Unparsed = 'ignore'
  is_soft: bool = False
  seed: int = 0


MAJORITY, HALVES = Rule(), Rule('half')


class Standing(NamedTuple):
  """The end of one query's tournament.

  winner: a candidate's number.
  num_comparisons, num_rounds: what it took.
  ratings: f64[n] Bradley–Terry ratings in nats; () after a knockout.
  wins: f64[n] games won; a tie is half a win.
  num_votes, num_unparsed: votes, and how many of them had no verdict.
  table: f64[n, n] how often i has beaten j, of which `ratings` can be made after a knockout too.
  """

  winner: int
  num_comparisons: int
  num_rounds: int
  ratings: np.ndarray | tuple[()]
  wins: np.ndarray
  num_votes: int
  num_unparsed: int
  table: np.ndarray


# --- Votes ------------------------------------------------------------------------


def shares(votes_CK: np.ndarray, unparsed: Unparsed = 'ignore') -> np.ndarray:
  """f64[C]: the share of each comparison's votes that the first response has.

  It is ½ where no vote counts.

  Args:
    votes_CK: i8[C, K] of FIRST, SECOND and NONE.
    unparsed: what becomes of NONE.
  """
  first, none = (votes_CK == FIRST).sum(1), (votes_CK == NONE).sum(1)
  num = votes_CK.shape[1] - none
  if unparsed == 'split':
    return (first + none / 2) / max(votes_CK.shape[1], 1)
  return np.where(num > 0, first / np.maximum(num, 1), 0.5)


def scores(votes_CK: np.ndarray, comparisons_C3: np.ndarray, rule: Rule) -> np.ndarray:
  """f64[C]: how much of a win each comparison is for the response that is shown first.

  Args:
    votes_CK: as in `shares`.
    comparisons_C3: i64[C, 3], which address the coins.
    rule: how votes count.
  """
  share = shares(votes_CK, rule.unparsed)
  if rule.is_soft:
    return share
  match rule.tie:
    case 'coin':
      tied = coins(comparisons_C3, rule.seed).astype(float)
    case 'first':
      tied = np.ones(len(share))
    case 'half':
      tied = np.full(len(share), 0.5)
  return np.where(share == 0.5, tied, share > 0.5)


def coins(rows_CN: np.ndarray, seed: int) -> np.ndarray:
  """bool[C]: a fair coin for each row of whole numbers, which is a hash of the row and the seed."""
  with np.errstate(over='ignore'):
    state = np.full(len(rows_CN), seed, np.uint64)
    for column in (*rows_CN.T.astype(np.uint64), np.uint64(0)):
      # splitmix64, whose output bits are all fair.
      state = (state ^ column) + np.uint64(0x9e3779b97f4a7c15)
      state = (state ^ (state >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
      state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
      state ^= state >> np.uint64(31)
  return (state >> np.uint64(63)).astype(bool)


def in_both_orders(judge: Judge) -> Judge:
  """A judge that is asked about each comparison in both orders, with twice the votes.

  A preference for a position then cancels.
  """
  def ask(comparisons_C3: np.ndarray) -> np.ndarray:
    swapped = comparisons_C3[:, [0, 2, 1]]
    votes = judge(np.concatenate([comparisons_C3, swapped]))
    kept, other = votes[:len(swapped)], votes[len(swapped):]
    return np.concatenate([kept, turned(other)], 1)

  return ask


def turned(votes: np.ndarray) -> np.ndarray:
  """The votes of comparisons whose responses change places."""
  return np.where(votes == NONE, NONE, SECOND - votes).astype(votes.dtype)


# --- Budgets ----------------------------------------------------------------------


class Plan(NamedTuple):
  """Comparisons of each query and votes of each comparison."""

  comparisons: int
  votes: int


def num_comparisons(method: Method, num_candidates: int) -> int:
  """The comparisons of a whole tournament of one query."""
  n = num_candidates
  return n - 1 if method == 'knockout' else n * (n - 1) // 2


def plan(method: Method, num_candidates: int, budget: int, votes: int | None = None) -> Plan:
  """The tournament that a number of verdicts pays for.

  A knockout has all its comparisons, a round robin as many as there is budget for. Where the votes
  are not given they are the largest odd number for all comparisons, and at least 1.

  Args:
    method: the tournament.
    num_candidates: n ≥ 2.
    budget: the most verdicts of one query.
    votes: verdicts of a comparison.

  Raises:
    UserError: the budget does not pay for n − 1 comparisons, without which a candidate would be
      compared with nobody, or not with all others by any chain of comparisons.
  """
  whole = num_comparisons(method, num_candidates)
  if votes is None:
    votes = max(1, budget // whole - (budget // whole + 1) % 2)
  least = num_candidates - 1
  if budget < least * votes:
    raise UserError(f'A budget of {budget} verdicts for {num_candidates} candidates with {votes} '
                    f'votes a comparison: a {method.replace("_", " ")} takes at least '
                    f'{least * votes}; raise the budget, or lower the votes.')
  return Plan(min(whole, budget // votes), votes)


# --- Knockout ---------------------------------------------------------------------


def knockout(num_candidates: Sequence[int], judge: Judge, rule: Rule = MAJORITY) -> list[Standing]:
  """Tournaments of pairs, whose losers leave.

  The bracket of a query is a permutation of its candidates, a function of (seed, query's number).
  In a round neighbours meet; where the number is odd the last one has a bye, and stands first in
  the next round, so that it gets no second one while others had none. Who is shown first is a coin.

  Args:
    num_candidates: n ≥ 1 of each query.
    judge: asked once a round.
    rule: how votes count.

  Raises:
    UserError: the rule would leave ties.
  """
  if rule.tie == 'half' or rule.is_soft:
    raise UserError("A knockout needs a winner of each comparison: choose ties 'coin' or 'first', "
                    'and whole wins.')
  alive = [np.random.default_rng([rule.seed, q]).permutation(n).tolist()
           for q, n in enumerate(num_candidates)]
  tables = [np.zeros((n, n)) for n in num_candidates]
  counts = np.zeros((len(alive), 4), int)  # comparisons, rounds, votes, votes without a verdict
  while any(len(order) > 1 for order in alive):
    games = np.array([(q, order[i], order[i + 1]) for q, order in enumerate(alive)
                      for i in range(0, len(order) - 1, 2)])
    is_turned = coins(games, rule.seed + 1)
    games[is_turned] = games[is_turned][:, [0, 2, 1]]
    votes = judge(games)
    is_first = scores(votes, games, rule) > 0.5
    won = np.where(is_first, games[:, 1], games[:, 2])
    lost = np.where(is_first, games[:, 2], games[:, 1])
    end = 0
    for q, order in enumerate(alive):
      begin, end = end, end + len(order) // 2  # The games of a query stand together.
      if end > begin:
        counts[q] += end - begin, 1, votes[begin:end].size, (votes[begin:end] == NONE).sum()
        tables[q][won[begin:end], lost[begin:end]] += 1
        bye = order[-1:] if len(order) % 2 else []
        alive[q] = [*bye, *won[begin:end].tolist()]
  return [Standing(order[0], int(c[0]), int(c[1]), (), table.sum(1), int(c[2]), int(c[3]), table)
          for order, table, c in zip(alive, tables, counts, strict=True)]


# --- Round robin ------------------------------------------------------------------


def schedule(num_candidates: int, most: int | None = None) -> np.ndarray:
  """i64[C, 2]: who meets whom, and who is shown first.

  Candidate i is shown first against i + 1, i + 2, … up to half way round the circle, so that each
  is shown first as often as second (but for one game where n is even). Neighbours meet first:
  n − 1 games connect all candidates.

  Args:
    num_candidates: n.
    most: the largest number of games; None for all n (n − 1) / 2.
  """
  n = num_candidates
  games = [(i, (i + distance) % n) for distance in range(1, n // 2 + 1)
           for i in range(n if 2 * distance < n else n // 2)]
  return np.array(games[:most], np.int64).reshape(-1, 2)


def round_robin(num_candidates: Sequence[int], judge: Judge, rule: Rule = HALVES,
                most: int | None = None) -> list[Standing]:
  """Tournaments in which everybody meets everybody, or as many as there is budget for.

  The candidates stand on the circle of `schedule` in an order that is a function of (seed, query's
  number). The winner has the highest rating; where several have, a function of both says which.

  Args:
    num_candidates: n ≥ 1 of each query.
    judge: asked once about all games of all queries.
    rule: how votes count.
    most: the largest number of games of a query; None for all.
  """
  games = np.concatenate([drawn_up(q, n, rule.seed, most) for q, n in enumerate(num_candidates)])
  votes = judge(games) if len(games) else np.zeros((0, 1), np.int8)
  of_query = [games[:, 0] == q for q in range(len(num_candidates))]
  return [standing(n, games[own], votes[own], rule)
          for n, own in zip(num_candidates, of_query, strict=True)]


def drawn_up(query: int, num_candidates: int, seed: int, most: int | None = None) -> np.ndarray:
  """i64[C, 3]: the games of one query's round robin; arguments as in `round_robin`."""
  order = _circle(query, num_candidates, seed)
  return np.insert(order[schedule(num_candidates, most)], 0, query, 1)


def _circle(query: int, num_candidates: int, seed: int) -> np.ndarray:
  return np.random.default_rng([seed, query]).permutation(num_candidates)


def standing(num_candidates: int, games_C3: np.ndarray, votes_CK: np.ndarray, rule: Rule = HALVES
             ) -> Standing:
  """The end of a round robin of one query from the votes on all of its games.

  Args:
    num_candidates: n ≥ 1.
    games_C3: from `drawn_up` with the rule's seed.
    votes_CK: i8[C, K].
    rule: how votes count.
  """
  won = scores(votes_CK, games_C3, rule)
  table = np.zeros((num_candidates, num_candidates))
  np.add.at(table, (games_C3[:, 1], games_C3[:, 2]), won)
  np.add.at(table, (games_C3[:, 2], games_C3[:, 1]), 1 - won)
  rated = ratings(table)
  order = _circle(int(games_C3[0, 0]) if len(games_C3) else 0, num_candidates, rule.seed)
  best = order[np.round(rated[order], 6).argmax()]
  return Standing(int(best), len(games_C3), int(len(games_C3) > 0), rated, table.sum(1),
                  votes_CK.size, int((votes_CK == NONE).sum()), table)


# The weight of the drawn game that everybody has played against an opponent of rating 0. Without it
# whoever won or lost all games would have an infinite rating.
PRIOR = 0.1


def ratings(wins_nn: np.ndarray, prior: float = PRIOR) -> np.ndarray:
  """f64[n]: Bradley–Terry ratings θ in nats; 0 is as good as the prior's opponent.

    P(i beats j) = σ(θ_i − θ_j),   θ = argmax Σ_ij wins_ij log σ(θ_i − θ_j) + prior · log-likelihood
                                       of a drawn game of each i against rating 0

  After a complete round robin they rank as the numbers of wins do.

  Args:
    wins_nn: f64[n, n] how often i has beaten j; ties are half a win for each.
    prior: weight of the drawn game, above 0.

  Source: Bradley and Terry, 1952. Departs from Elo's updates (2505.14674 names no constant and no
  order for them) in having the maximum likelihood itself, which depends on no order.
  """
  games, won = wins_nn + wins_nn.T, wins_nn.sum(1)
  theta = np.zeros(len(wins_nn))
  value = _likelihood(theta, wins_nn, prior)
  for _ in range(100):  # Newton's method; the function is concave.
    chance = _sigmoid(theta[:, None] - theta)
    own = _sigmoid(theta)
    gradient = won - (games * chance).sum(1) + prior * (0.5 - own)
    slopes = games * chance * (1 - chance)
    hessian = np.diag(slopes.sum(1) + prior * own * (1 - own)) - slopes
    step = np.linalg.solve(hessian, gradient)
    while (new := _likelihood(theta + step, wins_nn, prior)) < value - 1e-12:
      step = step / 2
    theta, value = theta + step, new
    if np.abs(step).max() < 1e-10:
      break
  return theta


def _likelihood(theta: np.ndarray, wins_nn: np.ndarray, prior: float) -> float:
  log = lambda x: -np.logaddexp(0, -x)
  return float((wins_nn * log(theta[:, None] - theta)).sum()
               + prior / 2 * (log(theta) + log(-theta)).sum())


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))


def win_rates(theta: np.ndarray) -> np.ndarray:
  """f64[n]: the chance of each candidate to beat another one of them, drawn at random.

    w_i = 1 / (n − 1) · Σ_{j ≠ i} σ(θ_i − θ_j),   ½ for a single one

  They lie between 0 and 1, and their mean is ½. After a whole round robin w_i is the share of the
  games that i has won, up to the prior; where games are missing, as after a knockout, the ratings
  stand for them.

  Args:
    theta: ratings in nats.
  """
  num = len(theta)
  chances = _sigmoid(theta[:, None] - theta)
  return (chances.sum(1) - 0.5) / (num - 1) if num > 1 else np.full(num, 0.5)


def elo(theta: np.ndarray, zero: float = 1000.0) -> np.ndarray:
  """f64[n]: ratings on Elo's scale, where 400 points are odds of ten to one, and 0 is `zero`."""
  return zero + theta * 400 / np.log(10)
