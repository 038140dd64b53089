"""Preference pairs of sampled responses, as rows that DPO, reward models and judges learn from.

    {"prompt": "…", "chosen": "…", "rejected": "…"}, perhaps with "subset"

Who says which response is better is a judge, by a tournament (`of_tournament`), or a verifier
(`of_verdicts`). What gives no pair is counted by its reason and left out. Texts that differ in
nothing but the space round them are one text, since nothing is preferred between them.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxrl_pt import files
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers.tournament import Standing, ratings

# Why a row of candidates gives no pair: a judge said nothing of it; its best and its worst
# candidate are rated alike, or are one text. Or its responses are all right, or all wrong.
Reason = Literal['no_verdict', 'tied', 'only_right', 'only_wrong']

Pair = dict[str, Any]


def of_tournament(row: dict[str, Any], texts: Sequence[str], end: Standing
                  ) -> list[Pair] | Reason:
  """The best of a tournament's candidates against the worst.

  The winner is chosen, and of the candidates with the lowest Bradley–Terry rating the first is
  rejected. So a row gives one pair at most, of the two responses that the judge tells apart best.

  Args:
    row: the row of candidates, whose prompt and subset the pair has.
    texts: the candidates.
    end: how the tournament ended.
  """
  if not end.num_votes or end.num_unparsed == end.num_votes:
    return 'no_verdict'
  rated = ratings(end.table).round(6)
  worst = int(rated.argmin())
  chosen, rejected = texts[end.winner], texts[worst]
  if rated[worst] >= rated[end.winner] or chosen.strip() == rejected.strip():
    return 'tied'
  subset = {'subset': row['subset']} if 'subset' in row else {}
  return [{'prompt': row['prompt'], 'chosen': chosen, 'rejected': rejected, **subset}]


def of_verdicts(prompt: Any, texts: Sequence[str], correct: Sequence[bool], most: int
                ) -> list[Pair] | Reason:
  """Pairs of a right and a wrong response to one problem.

  The first right text is paired with the first wrong one, the second with the second and so on, so
  that no text comes twice, until one kind or `most` is used up. A text that was drawn several times
  counts once, and one that some verdicts call right and others wrong counts for neither.

  Args:
    prompt: what was asked, a text or the messages of a chat. Of a chat, chosen and rejected are
      messages too.
    texts: the responses that were verified.
    correct: which of them are right.
    most: the largest number of pairs, at least 1.
  """
  drawn: dict[str, tuple[str, set[bool]]] = {}
  for text, is_right in zip(texts, correct, strict=True):
    drawn.setdefault(text.strip(), (text, set()))[1].add(bool(is_right))
  right, wrong = ([text for text, verdicts in drawn.values() if verdicts == {kind}]
                  for kind in (True, False))
  if not right and not wrong:
    return 'no_verdict'
  if not wrong:
    return 'only_right'
  if not right:
    return 'only_wrong'
  of_turn = lambda text: text if isinstance(prompt, str) else [
      {'role': 'assistant', 'content': text}]
  return [{'prompt': prompt, 'chosen': of_turn(better), 'rejected': of_turn(worse)}
          for better, worse in list(zip(right, wrong, strict=False))[:most]]


def write(path: Path, found: Sequence[list[Pair] | Reason], of: str) -> str:
  """Writes pairs as JSON lines, in their order.

  Args:
    path: the file.
    found: the pairs of each row, or why it gives none.
    of: what a row is called, in the plural.

  Returns:
    One sentence on how many pairs there are, and what was left out.

  Raises:
    UserError: there is no pair, so that nothing is written.
    Unwritable: the file cannot be written.
  """
  pairs = [pair for one in found if isinstance(one, list) for pair in one]
  reasons = Counter(one for one in found if not isinstance(one, list))
  left = ', '.join(f'{reasons[reason]} {text}' for reason, text in _IN_WORDS.items()
                   if reasons[reason])
  if not pairs:
    raise UserError(f'No pair in {len(found)} {of} ({left}): draw more responses, at a temperature '
                    'at which they differ.')
  files.write_json_lines(path, pairs)
  return f'{len(pairs)} pairs in {path}' + (f'; {of} left out: {left}.' if left else '.')


_IN_WORDS: dict[Reason, str] = {
    'no_verdict': 'without a verdict', 'tied': 'tied', 'only_right': 'with right responses only',
    'only_wrong': 'with wrong responses only'}
