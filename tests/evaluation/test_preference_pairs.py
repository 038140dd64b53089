"""Pairs of sampled answers, by a verifier and by a judge, as rows of preferences."""

from pathlib import Path

import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data import preferences
from jaxrl_pt.errors import UserError
from jaxrl_pt.evaluation import preference_pairs
from jaxrl_pt.verifiers import tournament
from jaxrl_pt.verifiers.judge import FIRST, NONE, SECOND

ROW = {'prompt': 'q', 'candidates': ['b', 'd', 'a', 'c'], 'subset': 's'}


def judged(texts, vote, method=tournament.round_robin):
  """The standing of texts under a judge (first text, second text) → verdict."""
  judge = lambda games: np.array([[vote(texts[a], texts[b])] for _, a, b in games], np.int8)
  return method([len(texts)], judge)[0]


def earlier(first, second):
  """A judge that prefers what comes first in the alphabet."""
  return FIRST if first < second else SECOND


@pytest.mark.parametrize('method', [tournament.round_robin, tournament.knockout])
def test_the_winner_is_chosen_against_the_lowest_rating(method):
  end = judged(ROW['candidates'], earlier, method)
  (pair,) = preference_pairs.of_tournament(ROW, ROW['candidates'], end)
  assert pair['chosen'] == 'a' and pair['prompt'] == 'q' and pair['subset'] == 's'
  assert pair['rejected'] == 'd' or method is tournament.knockout and pair['rejected'] in 'cd'
  assert end.table.sum() == end.num_comparisons and (end.table.sum(1) == end.wins).all()


@pytest.mark.parametrize('texts, vote, reason', [
    (['a', 'b', 'c'], lambda *_: NONE, 'no_verdict'),
    (['a'], earlier, 'no_verdict'),
    # Each has beaten one and lost to one.
    (['a', 'b', 'c'], lambda f, s: FIRST if f + s in ('ab', 'bc', 'ca') else SECOND, 'tied'),
    (['a', ' a\n'], earlier, 'tied')])
def test_a_row_without_a_preference_gives_its_reason(texts, vote, reason):
  assert preference_pairs.of_tournament(ROW, texts, judged(texts, vote)) == reason


def test_right_and_wrong_answers_are_paired_once_each():
  of = lambda texts, correct, most=9: preference_pairs.of_verdicts('q', texts, correct, most)
  found = of(['1', ' 2', '3', '1 ', '4', '5'], [True, False, True, True, False, False])
  assert [(p['chosen'], p['rejected']) for p in found] == [('1', ' 2'), ('3', '4')]
  assert len(of(['1', '2', '3', '4'], [True, False, True, False], 1)) == 1
  assert of(['1', '1'], [True, True]) == 'only_right'
  assert of(['1', '2'], [False, False]) == 'only_wrong'
  assert of([], []) == of(['1', ' 1'], [True, False]) == 'no_verdict'
  asked = [{'role': 'user', 'content': 'q'}]
  (chat,) = preference_pairs.of_verdicts(asked, ['1', '2'], [False, True], 1)
  assert chat['prompt'] == asked and chat['chosen'] == [{'role': 'assistant', 'content': '2'}]


def test_pairs_are_written_with_counts_and_read_as_preferences(tmp_path: Path):
  path = tmp_path / 'pairs.jsonl'
  asked = [{'role': 'user', 'content': 'p'}]
  found = [preference_pairs.of_verdicts(asked, ['1', '2'], [True, False], 1),
           preference_pairs.of_verdicts('q', ['ü', 'b'], [False, True], 1), 'only_right', 'tied',
           'only_right']
  said = preference_pairs.write(path, found, 'problems')
  assert said == f'2 pairs in {path}; problems left out: 1 tied, 2 with right responses only.'
  read = list(preferences.pairs(cfg.Preferences(str(path))))
  assert [(p.query, p.better, p.worse) for p in read] == [('p', '1', '2'), ('q', 'b', 'ü')]
  with pytest.raises(UserError, match=r'No pair in 1 rows \(1 tied\): draw more'):
    preference_pairs.write(tmp_path / 'none.jsonl', ['tied'], 'rows')
  assert not (tmp_path / 'none.jsonl').exists()
