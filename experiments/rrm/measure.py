"""What run.py measures of a judge of sums, and of a simulated one.

A judge is asked about held-out sums in both orders, one vote each, and then chooses among 8 results
of each sum, of which 30 % are right. Votes of a comparison are drawn once, five of them, and serve
every tournament: their noise is addressed by the texts and the number of the vote, so that they are
those that each tournament would draw by itself.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.data import generated, pack
from jaxrl_pt.environments import judging
from jaxrl_pt.environments.judging import EngineJudge, Judged
from jaxrl_pt.evaluation import judging as evaluation
from jaxrl_pt.run.policy import load_policy, open_run
from jaxrl_pt.sampling.engine import Request
from jaxrl_pt.serving.comparing import Shown
from jaxrl_pt.verifiers import tournament

NUM_CANDIDATES, BASE_RATE, NUM_QUERIES, MOST_VOTES = 8, 0.3, 50, 5
# Share of queries whose chosen candidate is right, for n = 8 and base rate 0.3: accuracy → knockout
# and round robin with one vote, the same with five.
EXPECTED = {0.6: (0.45, 0.47, 0.54, 0.64), 0.7: (0.58, 0.66, 0.79, 0.87),
            0.8: (0.73, 0.81, 0.88, 0.91), 0.9: (0.84, 0.90, 0.95, 0.95)}
WAYS = [(method, votes) for votes in (1, 5) for method in ('knockout', 'round_robin')]
# A tournament, votes of a comparison, and the most comparisons of a round robin.
BUDGETS = [('knockout', 1, None), ('knockout', 3, None), ('knockout', 5, None),
           *(('round_robin', 1, most) for most in (7, 14, 21, 28)), ('round_robin', 5, 28)]


def ended(method: str, right_QN: np.ndarray, judge: tournament.Judge, most: int | None = None
          ) -> list[tournament.Standing]:
  """The tournament of each query."""
  numbers = [right_QN.shape[1]] * len(right_QN)
  if method == 'knockout':
    return tournament.knockout(numbers, judge)
  return tournament.round_robin(numbers, judge, most=most)


def right_ones(right_QN: np.ndarray, standings: Sequence[tournament.Standing]) -> list[float]:
  """Whether the winner of each query is right."""
  return [float(right_QN[q, end.winner]) for q, end in enumerate(standings)]


# --- Simulated judges ---------------------------------------------------------------


def chosen_right(right_QN: np.ndarray, accuracy: float, seed: int) -> dict[str, list[float]]:
  """Whether the chosen candidate is right, for each of WAYS, by a simulated judge."""
  rng = np.random.default_rng([seed, 7])

  def judge(votes: int, games: np.ndarray) -> np.ndarray:
    first, second = (right_QN[games[:, 0], games[:, i]] for i in (1, 2))
    chance = np.where(first == second, 0.5, np.where(first, accuracy, 1 - accuracy))
    return (rng.random((len(games), votes)) >= chance[:, None]).astype(np.int8)

  return {f'{method} {votes}': right_ones(right_QN, ended(
      method, right_QN, functools.partial(judge, votes))) for method, votes in WAYS}


def counted(accuracy: float, votes: int, num: int = 40000) -> float:
  """Share of right choices of a round robin by most wins, without the product's tournaments."""
  rng = np.random.default_rng(1)
  right, wins = rng.random((num, NUM_CANDIDATES)) < BASE_RATE, np.zeros((num, NUM_CANDIDATES))
  for a, b in itertools.combinations(range(NUM_CANDIDATES), 2):
    same = right[:, a] == right[:, b]
    chance = np.where(same, 0.5, np.where(right[:, a], accuracy, 1 - accuracy))
    is_first = (rng.random((num, votes)) < chance[:, None]).sum(1) * 2 > votes
    wins[:, a] += is_first
    wins[:, b] += ~is_first
  best = (wins + rng.random(wins.shape) / 2).argmax(1)  # Who has as many wins as another: a coin.
  return float(right[np.arange(num), best].mean())


def simulated(accuracy: float) -> dict[str, Any]:
  """The table of EXPECTED at one accuracy, with standard errors of our 1,000 queries."""
  num = 1000
  right = np.random.default_rng(11).random((num, NUM_CANDIDATES)) < BASE_RATE
  found = chosen_right(right, accuracy, 0)
  rows = {}
  for (name, values), expected in zip(found.items(), EXPECTED[accuracy], strict=True):
    mean, error = float(np.mean(values)), (expected * (1 - expected) / num) ** 0.5
    rows[name] = {'mean': mean, 'expected': expected, 'standard_errors': (mean - expected) / error}
  return {'of_an_oracle': float(right.any(1).mean()), **rows,
          'counted': {f'round_robin {votes}': counted(accuracy, votes) for votes in (1, 5)}}


# --- Trained judges -----------------------------------------------------------------


def opened(workdir: Path, num_steps: int) -> EngineJudge:
  """The judge in a work directory, fine-tuned or reinforced, asked as it was trained."""
  demonstrations = open_run(workdir, None, cfg.Mesh()).run.data.source
  speaker = judging.of_policy(policy := load_policy(workdir), demonstrations.source.prompt,
                              cfg.Sampler(), 4 * num_steps + 4, is_direct=False)
  return judging.make(policy, speaker, judging.engine_config(speaker, num_steps + 14, 64), 5)


def queries(num_steps: int, held_out: bool) -> list[tuple[str, int]]:
  """Sums and their results, those that training has not seen or those that it may have."""
  source = cfg.RedundantChecks(20000, num_steps, num_steps, 0)
  problems = (generated.problem(source, number) for number in range(source.size))
  sums = {problem.prompt: int(problem.answer) for problem in problems}
  return [(query, answer) for query, answer in sums.items()
          if (pack.hold_out(query) < 0.2) == held_out]


def worked(query: str) -> str:
  """The whole work of a sum."""
  digits = [int(digit) for digit in query[:-1]]
  totals = itertools.accumulate(digits)
  return ''.join(f'+{digit}={total % 10}' for digit, total in
                 list(zip(digits, totals, strict=True))[1:])


def pairs(num_steps: int, num: int, held_out: bool = True) -> list[tuple[str, str, str]]:
  """(query, right result, wrong result); sums that are few come again with other wrong results."""
  asked, rng = queries(num_steps, held_out), np.random.default_rng(1)
  errors = [rng.permutation(np.arange(1, 10)) for _ in asked]
  found = [(query, str(answer), str((answer + int(own[turn])) % 10))
           for turn in range(9) for (query, answer), own in zip(asked, errors, strict=True)]
  return found[:num]


def measured(judge: EngineJudge, asked: Sequence[tuple[str, str, str]]
             ) -> tuple[dict[str, float], list[Shown], Judged]:
  """Accuracy, swap consistency, lengths and work of pairs, one vote in each order."""
  shown = [Shown(query, *order) for query, right, wrong in asked
           for order in ((right, wrong), (wrong, right))]
  judged = judge.ask(shown, 1)
  votes = judged.votes.reshape(-1, 2, 1)
  scores = evaluation.pair_scores(votes, np.tile([0, 1], (len(asked), 1)), 'wrong')
  summary = evaluation.summary([''] * len(asked), scores, votes, judged)['all']
  said = [row[0].partition('#')[0] for row in judged.responses]
  found = {name: value['mean'] if isinstance(value, dict) else value
           for name, value in summary.items()}
  found['worked'] = float(np.mean([text == worked(one.query)
                                   for text, one in zip(said, shown, strict=True)]))
  return found, shown, judged


def capped(judge: EngineJudge, shown: Sequence[Shown], judged: Judged, most: int) -> float:
  """Accuracy where work of more than `most` tokens is cut there and the verdict's marker forced.

  Args:
    judge: which has said `judged` of `shown`.
    shown: pairs in both orders, the right result first and then second.
    judged: one vote of each.
    most: tokens of the work, which are bytes.
  """
  cut = [c for c, (said,) in enumerate(judged.responses) if len(said.partition('#')[0]) > most]
  votes = judged.votes[:, 0].copy()
  speaker = judge.speaker
  requests = [Request(
      tuple(speaker.tokens(shown[c])), c, most + 2, 1, speaker.sampler, speaker.stop_ids(),
      forced=tuple(speaker.tokenizer.encode(judged.responses[c][0][:most] + '#'))) for c in cut]
  for c, (response,) in zip(cut, judge.engine.run(requests), strict=True):
    _, votes[c] = speaker.said(response)
  return float((votes == np.tile([0, 1], len(votes) // 2)).mean())


def remembered(judge: EngineJudge, asked: Sequence[str], texts: Sequence[Sequence[str]]
               ) -> Callable[[int, np.ndarray], np.ndarray]:
  """(votes, games) → votes of the games; each comparison of texts is drawn once."""
  known: dict[Shown, np.ndarray] = {}

  def votes_of(num_votes: int, games: np.ndarray) -> np.ndarray:
    shown = [Shown(asked[q], texts[q][a], texts[q][b]) for q, a, b in games.tolist()]
    new = list(dict.fromkeys(one for one in shown if one not in known))
    if new:
      known.update(zip(new, judge.ask(new, MOST_VOTES).votes, strict=True))
    return np.stack([known[one] for one in shown])[:, :num_votes]

  return votes_of


def selected(judge: EngineJudge, num_steps: int, pair_accuracy: float) -> dict[str, Any]:
  """The best of 8 results by the judge, by budget, and by simulated ones of its accuracy."""
  rng = np.random.default_rng(3)
  asked = queries(num_steps, held_out=True)[:NUM_QUERIES]
  right = rng.random((len(asked), NUM_CANDIDATES)) < BASE_RATE
  texts = [[str(answer if is_right else (answer + int(rng.integers(1, 10))) % 10)
            for is_right in row] for (_, answer), row in zip(asked, right, strict=True)]
  votes_of = remembered(judge, [query for query, _ in asked], texts)
  found: dict[str, Any] = {'base_rate': float(right.mean()),
                           'of_an_oracle': float(right.any(1).mean()), 'budgets': []}
  for method, votes, most in BUDGETS:
    standings = ended(method, right, functools.partial(votes_of, votes), most)
    accuracy = float(np.mean(right_ones(right, standings)))
    comparisons = float(np.mean([end.num_comparisons for end in standings]))
    found['budgets'].append({'method': method, 'votes': votes, 'comparisons': comparisons,
                             'accuracy': accuracy})
    if (method, votes) in WAYS and comparisons in (7, 28) and most in (None, 28):
      found[f'{method} {votes}'] = accuracy
  independent = chosen_right(np.repeat(right, 20, 0), pair_accuracy, 1)
  found['simulated'] = {name: float(np.mean(values)) for name, values in independent.items()}
  return found
