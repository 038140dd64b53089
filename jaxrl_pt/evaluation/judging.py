"""`jaxrl-pt judge`: how often a judge agrees with preferences, and which candidate it finds best.

A row of a JSON-lines file is a pair, `{"prompt", "chosen", "rejected"}`, perhaps with a `subset`,
as RewardBench's rows are; or it is `{"prompt", "candidates": […]}`, perhaps with `correct`, a list
of truth values. Each row goes out as it came in, with what the judge said beside it.

A pair is one question. It scores 1 if most verdicts name the chosen response, ½ if as many name the
other one, else 0; in both orders, the mean of both. Intervals are Wilson's, at 95 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from jaxrl_pt import files
from jaxrl_pt.data import judge_problems, judge_prompts, preferences, sources
from jaxrl_pt.environments import judging
from jaxrl_pt.environments.judging import EngineJudge, Judged
from jaxrl_pt.errors import UserError
from jaxrl_pt.evaluation import preference_pairs
from jaxrl_pt.serving.comparing import Shown, Speaker
from jaxrl_pt.verifiers import tournament
from jaxrl_pt.verifiers.judge import FIRST, NONE

# What a pair scores in whose votes there is no verdict: nothing, as it earns −1 in training, or
# half, as if a coin had been thrown.
Unparsed = Literal['wrong', 'half']
_ALL = 'all'
_COLUMNS = ('num_pairs', 'accuracy', 'swap_consistency', 'first_rate', 'no_verdict', 'tokens')


class Row(NamedTuple):
  """A row of a file: texts[0] is the better one of a pair.

  place: 'file:line'.
  row: the JSON object.
  """

  place: str
  query: str
  texts: tuple[str, ...]
  row: dict[str, Any]


@dataclass(frozen=True)
class Asking:
  """What is asked of a judge.

  votes: verdicts of a comparison; None for one, or for what the budget pays for.
  both_orders: whether each comparison is asked in both orders.
  unparsed: what a pair without a verdict scores.
  method: the tournament of candidates.
  budget: the most verdicts of a row of candidates; 0 for no bound.
  rule: how votes of a tournament count.
  """

  votes: int | None = None
  both_orders: bool = False
  unparsed: Unparsed = 'wrong'
  method: tournament.Method = 'knockout'
  budget: int = 0
  rule: tournament.Rule = tournament.Rule()


# --- Rows -------------------------------------------------------------------------


def read(glob: str) -> tuple[list[Row], bool]:
  """The rows of files, and whether they are pairs.

  Raises:
    UserError: a row is neither a pair nor a list of candidates, or there are both kinds or none.
  """
  rows, kinds = [], set()
  for place, row in sources.json_rows(glob):
    has_candidates = 'candidates' in row
    kinds.add(has_candidates)
    rows.append(_candidates(place, row) if has_candidates else _pair(place, row))
    if len(kinds) > 1:
      raise UserError(f'{place}: some rows are pairs and some have candidates: judge them apart.')
  if not rows:
    raise UserError(f'{glob} holds no rows: write {{"prompt", "chosen", "rejected"}} or '
                    '{"prompt", "candidates"}, an object a line.')
  return rows, kinds == {False}


def _pair(place: str, row: dict[str, Any]) -> Row:
  pair = preferences.as_texts(preferences.of_row(place, row))
  subset = row.get('subset', '')
  if not isinstance(subset, str):
    raise UserError(f"{place}: 'subset' is no text: write a name, or leave it out.")
  return Row(place, pair.query, (pair.better, pair.worse), row)


def _candidates(place: str, row: dict[str, Any]) -> Row:
  texts, prompt, correct = row['candidates'], row.get('prompt'), row.get('correct')
  expected = 'write {"prompt": "…", "candidates": ["…", …]}.'
  if not isinstance(prompt, str) or not isinstance(texts, list) or not texts:
    raise UserError(f'{place} is no row of candidates: {expected}')
  for text in (prompt, *texts):
    if not isinstance(text, str) or not sources.is_unicode(text):
      raise UserError(f'{place}: a candidate is no text: {expected}')
  if not all(text.strip() for text in texts):
    raise UserError(f'{place}: a candidate is empty, so that there is nothing to judge: leave it '
                    'out.')
  is_right = isinstance(correct, list) and all(isinstance(x, bool) for x in correct)
  if correct is not None and (not is_right or len(correct) != len(texts)):
    raise UserError(f"{place}: 'correct' is no list of {len(texts)} truth values, one for each "
                    'candidate: mend it, or leave it out.')
  return Row(place, prompt, tuple(texts), row)


# --- Pairs ------------------------------------------------------------------------


def judge_pairs(judge: EngineJudge, rows: Sequence[Row], asking: Asking, seed: int
                ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Judges pairs, all in one batch.

  Each pair is asked with its better response in a place that is a hash of the pair, or in both
  orders.

  Returns:
    A summary for each subset and for all pairs, and the rows with `results`, the score, `votes` and
    `better_at`, where the better response stood, each a list with an entry for each order.
  """
  swaps = [(False, True) if asking.both_orders else
           (judge_problems.is_second(seed, row.query, *row.texts),) for row in rows]
  asked = [Shown(row.query, *judge_prompts.orders(row.texts[0], row.texts[1], swap))
           for row, own in zip(rows, swaps, strict=True) for swap in own]
  judged = judge.ask(asked, asking.votes or 1)
  width = 2 if asking.both_orders else 1
  of_row = lambda values: values.reshape(len(rows), width, *values.shape[1:])
  votes = of_row(judged.votes)
  better = np.array(swaps, int)
  scores = pair_scores(votes, better, asking.unparsed)
  out = [{**row.row, 'results': float(score.mean()), 'votes': vote.tolist(),
          'better_at': place.tolist()}
         for row, score, vote, place in zip(rows, scores, votes, better, strict=True)]
  subsets = [row.row.get('subset', '') for row in rows]
  return summary(subsets, scores, votes, judged), out


def pair_scores(votes_NOK: np.ndarray, better_NO: np.ndarray, unparsed: Unparsed) -> np.ndarray:
  """f64[N, O]: 1, ½ or 0 of each pair in each order in which it was asked.

  Args:
    votes_NOK: i8[N, O, K].
    better_NO: i[N, O] the place, 0 or 1, of the better response.
    unparsed: what a pair without a verdict scores.
  """
  right = (votes_NOK == better_NO[..., None]).sum(-1)
  wrong = ((votes_NOK != NONE).sum(-1)) - right
  nothing = {'wrong': 0.0, 'half': 0.5}[unparsed]
  tied = np.where(right + wrong > 0, 0.5, nothing)
  return np.where(right > wrong, 1.0, np.where(right < wrong, 0.0, tied))


def swap_consistency(votes_NOK: np.ndarray) -> np.ndarray:
  """f64[N]: 1 where most votes of both orders name one and the same response, else 0.

  Args:
    votes_NOK: i8[N, 2, K], of the two orders of each pair.
  """
  share = np.stack([tournament.shares(votes_NOK[:, order]) for order in (0, 1)], 1)
  has_winner = (share != 0.5).all(1)
  return (has_winner & ((share[:, 0] > 0.5) == (share[:, 1] < 0.5))).astype(float)


def summary(subsets: Sequence[str], scores_NO: np.ndarray, votes_NOK: np.ndarray,
            judged: Judged) -> dict[str, Any]:
  """What a judge said of each subset, and of all pairs under the name 'all'.

  accuracy: mean score with its interval, of `num_pairs` pairs.
  swap_consistency: where pairs were asked in both orders.
  first_rate: share of the verdicts that name the response which was shown first.
  no_verdict: share of the responses without a verdict; tokens: mean length.
  """
  names = sorted(set(subsets) - {''})
  tokens = judged.num_tokens.reshape(votes_NOK.shape)
  found: dict[str, Any] = {}
  for name in (*names, _ALL):
    of = np.array([name in (_ALL, subset) for subset in subsets])
    votes = votes_NOK[of]
    is_verdict = votes != NONE
    found[name] = {'num_pairs': int(of.sum()), 'accuracy': wilson(scores_NO[of].mean(1))}
    if votes_NOK.shape[1] == 2:
      found[name]['swap_consistency'] = wilson(swap_consistency(votes))
    found[name] |= {
        'first_rate': float((votes == FIRST).sum() / max(is_verdict.sum(), 1)),
        'no_verdict': float(1 - is_verdict.mean()), 'tokens': float(tokens[of].mean())}
  if len(names) > 1:
    found[_ALL]['mean_of_subsets'] = float(np.mean([found[n]['accuracy']['mean'] for n in names]))
  found[_ALL]['too_long'] = int(judged.too_long.sum())
  return found


def wilson(values: np.ndarray) -> dict[str, float]:
  """The mean of values in [0, 1] and its 95 % interval, 'mean', 'low' and 'high'.

  Wilson's interval of a share (1927). Values between 0 and 1 vary less than a share of the same
  mean, so that the interval then holds the truth more often than it says.
  """
  num, mean, z = len(values), float(np.mean(values)), float(stats.norm.ppf(0.975))
  middle = (mean + z * z / (2 * num)) / (1 + z * z / num)
  half = z / (1 + z * z / num) * (mean * (1 - mean) / num + z * z / (4 * num * num)) ** 0.5
  return {'mean': mean, 'low': max(0.0, middle - half), 'high': min(1.0, middle + half)}


# --- Candidates -------------------------------------------------------------------


def select(judge: EngineJudge, rows: Sequence[Row], asking: Asking
           ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """The best of each row's candidates by a tournament: `selected` of what `play` returns."""
  return selected(rows, play(judge, rows, asking))


def play(judge: EngineJudge, rows: Sequence[Row], asking: Asking) -> list[tournament.Standing]:
  """The tournament of each row's candidates; a round of all rows is one batch.

  Raises:
    UserError: the budget does not pay for a tournament.
  """
  numbers = [len(row.texts) for row in rows]
  votes, most = _planned(max(numbers), asking)
  ask = judge.of_candidates([row.query for row in rows], [row.texts for row in rows], votes)
  if asking.both_orders:
    ask = tournament.in_both_orders(ask)
  if asking.method == 'knockout':
    return tournament.knockout(numbers, ask, asking.rule)
  return tournament.round_robin(numbers, ask, asking.rule, most)


def selected(rows: Sequence[Row], ended: Sequence[tournament.Standing]
             ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """What tournaments found.

  Returns:
    A summary, and the rows with `best` (a number from 0), `wins`, `num_comparisons` and, after a
    round robin, Bradley–Terry `ratings` and `elo`. Where rows have `correct`, the summary has the
    accuracy of the best ones, of any one, and of a judge that knows.
  """
  out = []
  for row, end in zip(rows, ended, strict=True):
    found = {'best': end.winner, 'wins': end.wins.tolist(),
             'num_comparisons': end.num_comparisons, 'num_votes': end.num_votes}
    if not isinstance(end.ratings, tuple):
      found |= {'ratings': end.ratings.tolist(), 'elo': tournament.elo(end.ratings).tolist()}
    out.append({**row.row, **found})
  total = sum(end.num_votes for end in ended)
  result: dict[str, Any] = {
      'num_rows': len(rows), 'num_comparisons': sum(end.num_comparisons for end in ended),
      'num_votes': total, 'rounds': max(end.num_rounds for end in ended),
      'no_verdict': sum(end.num_unparsed for end in ended) / max(total, 1)}
  known = [(row.row['correct'], end.winner) for row, end in zip(rows, ended, strict=True)
           if 'correct' in row.row]
  if known:
    result['accuracy'] = wilson(np.array([float(right[best]) for right, best in known]))
    result['of_any'] = float(np.mean([np.mean(right) for right, _ in known]))
    result['of_an_oracle'] = float(np.mean([any(right) for right, _ in known]))
  return result, out


def _planned(num_candidates: int, asking: Asking) -> tuple[int, int | None]:
  """Votes of a comparison, and the most comparisons of a row."""
  if not asking.budget or num_candidates < 2:
    return asking.votes or 1, None
  # Asked in both orders, a vote is two verdicts.
  budget = asking.budget // (2 if asking.both_orders else 1)
  plan = tournament.plan(asking.method, num_candidates, budget, asking.votes)
  return plan.votes, plan.comparisons


# --- The command ------------------------------------------------------------------


def prompt_len(speaker: Speaker, rows: Sequence[Row], most: int) -> int:
  """Tokens of the longest prompt of any two texts of a row, or `most` if that is less."""
  found = judging.longest(speaker, [row.query for row in rows], [row.texts for row in rows])
  return max(1, min(most, found))


def text(found: dict[str, Any], is_pairs: bool) -> str:
  """A summary as lines."""
  if not is_pairs:
    return '\n'.join(f'{name:16} {_cell(value)}' for name, value in found.items())
  columns = [name for name in _COLUMNS if name in found[_ALL]]
  lines = [['subset', *columns]]
  lines += [[name, *(_cell(row[column]) for column in columns)] for name, row in found.items()]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  table = ['  '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
           for line in lines]
  table += [f'{name}: {_cell(found[_ALL][name])}' for name in ('mean_of_subsets', 'too_long')
            if found[_ALL].get(name)]
  return '\n'.join(table)


def write_pairs(path: Path, rows: Sequence[Row], ended: Sequence[tournament.Standing]) -> str:
  """Writes the best of each row's candidates against the worst, as preferences.

  Returns:
    How many pairs there are, and what was left out, as a sentence.

  Raises:
    UserError: no row gives a pair, so that nothing is written.
    Unwritable: the file cannot be written.
  """
  found = [preference_pairs.of_tournament(row.row, row.texts, end)
           for row, end in zip(rows, ended, strict=True)]
  return preference_pairs.write(path, found, 'rows')


def _cell(value: Any) -> str:
  match value:
    case {'mean': mean, 'low': low, 'high': high}:
      return f'{mean:.3f} [{low:.3f}, {high:.3f}]'
    case float():
      return f'{value:.3f}'
    case _:
      return str(value)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
  """Writes rows as JSON lines, whole or not at all.

  Raises:
    Unwritable: the file cannot be written.
  """
  files.write_json_lines(path, rows)
