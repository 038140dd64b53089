"""What is measured of judges: scores, intervals, swaps, files in and out, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrl_pt.environments.judging import Judged
from jaxrl_pt.errors import UserError
from jaxrl_pt.evaluation import judging
from jaxrl_pt.evaluation.judging import Asking
from jaxrl_pt.verifiers import tournament
from jaxrl_pt.verifiers.judge import FIRST, NONE, SECOND

ROWS = [{'prompt': f'q{i}', 'chosen': 'good', 'rejected': f'bad {i}', 'subset': 'ab'[i % 2], 'x': i}
        for i in range(20)]


class Simulated:
  """A judge that follows a rule: shown → verdict."""

  def __init__(self, rule):
    self.rule, self.asked = rule, []

  def ask(self, comparisons, num_votes):
    self.asked += comparisons
    votes = np.array([[self.rule(shown)] * num_votes for shown in comparisons], np.int8)
    return Judged(votes, np.full(votes.shape, 7, np.int32), [[''] * num_votes] * len(votes),
                  np.zeros(len(votes), bool))

  def of_candidates(self, queries, candidates, num_votes):
    return lambda games: self.ask([(queries[q], candidates[q][a], candidates[q][b])
                                   for q, a, b in games], num_votes).votes


likes_good = Simulated(lambda shown: FIRST if shown[1] == 'good' else SECOND)


def written(tmp_path: Path, rows: list) -> str:
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def pairs(tmp_path):
  rows, is_pairs = judging.read(written(tmp_path, ROWS))
  assert is_pairs
  return rows


def test_scores_of_pairs():
  votes = np.array([[[0, 0, 1]], [[1, 1, 1]], [[0, 1, -1]], [[-1, -1, -1]]], np.int8)
  better = np.array([[0], [0], [1], [1]])
  assert judging.pair_scores(votes, better, 'wrong').ravel().tolist() == [1, 0, 0.5, 0]
  assert judging.pair_scores(votes, better, 'half').ravel().tolist() == [1, 0, 0.5, 0.5]


def test_swaps_agree_where_one_response_wins_both_times():
  votes = np.array([[[0], [1]], [[1], [0]], [[0], [0]], [[1], [1]], [[-1], [0]], [[0], [-1]]])
  assert judging.swap_consistency(votes).tolist() == [1, 1, 0, 0, 0, 0]


def test_a_good_judge_and_one_that_prefers_the_first_place(tmp_path):
  found, out = judging.judge_pairs(likes_good, pairs(tmp_path), Asking(3, True), 0)
  assert found['all']['accuracy']['mean'] == found['all']['swap_consistency']['mean'] == 1
  assert found['all']['first_rate'] == 0.5 and set(found) == {'a', 'b', 'all'}
  assert found['a']['num_pairs'] == 10 and found['all']['mean_of_subsets'] == 1
  assert [row['x'] for row in out] == list(range(20)) and out[0]['results'] == 1
  assert out[0]['better_at'] == [0, 1] and out[0]['votes'] == [[0] * 3, [1] * 3]
  biased, _ = judging.judge_pairs(Simulated(lambda shown: FIRST), pairs(tmp_path), Asking(1, True),
                                  0)
  assert biased['all']['accuracy']['mean'] == 0.5 and biased['all']['first_rate'] == 1
  assert biased['all']['swap_consistency']['mean'] == 0


def test_without_swaps_the_better_response_stands_in_a_hashed_place(tmp_path):
  found, out = judging.judge_pairs(Simulated(lambda shown: FIRST), pairs(tmp_path), Asking(), 0)
  places = [row['better_at'][0] for row in out]
  assert 4 <= sum(places) <= 16 and found['all']['accuracy']['mean'] == 1 - np.mean(places)
  assert 'swap_consistency' not in found['all']
  other = judging.judge_pairs(Simulated(lambda shown: FIRST), pairs(tmp_path), Asking(), 1)[1]
  assert places != [row['better_at'][0] for row in other]


def test_no_verdict_is_counted(tmp_path):
  mute = Simulated(lambda shown: NONE)
  found, _ = judging.judge_pairs(mute, pairs(tmp_path), Asking(), 0)
  assert found['all']['accuracy']['mean'] == 0 and found['all']['no_verdict'] == 1
  half, _ = judging.judge_pairs(mute, pairs(tmp_path), Asking(unparsed='half'), 0)
  assert half['all']['accuracy']['mean'] == 0.5


def test_wilsons_interval():
  found = judging.wilson(np.array([1.0] * 8 + [0.0] * 2))
  assert (round(found['low'], 4), round(found['high'], 4)) == (0.4902, 0.9433)
  assert judging.wilson(np.ones(5))['low'] < 1 == judging.wilson(np.ones(5))['high']


@pytest.mark.parametrize('method, games', [('knockout', 3), ('round_robin', 6)])
def test_the_best_of_candidates(tmp_path, method, games):
  rows, is_pairs = judging.read(written(tmp_path, [
      {'prompt': f'q{i}', 'candidates': ['bad', 'good', 'worse', 'worst'],
       'correct': [False, True, False, False]} for i in range(5)]))
  assert not is_pairs
  rule = tournament.MAJORITY if method == 'knockout' else tournament.HALVES
  judge = Simulated(lambda s: FIRST if s[1] == 'good' else SECOND if s[2] == 'good' else NONE)
  found, out = judging.select(judge, rows, Asking(3, method=method, rule=rule))
  assert found['accuracy']['mean'] == found['of_an_oracle'] == 1 and found['of_any'] == 0.25
  assert [row['best'] for row in out] == [1] * 5 and found['num_comparisons'] == 5 * games
  assert found['num_votes'] == 15 * games and out[0]['num_comparisons'] == games
  if method == 'round_robin':
    assert np.argmax(out[0]['ratings']) == np.argmax(out[0]['elo']) == 1
  assert 'accuracy' in judging.text(found, False)


def test_a_budget_of_verdicts_is_met(tmp_path):
  rows, _ = judging.read(written(tmp_path, [{'prompt': 'q', 'candidates': list('abcdefgh')}]))
  judge = Simulated(lambda s: FIRST if s[1] < s[2] else SECOND)
  for both in (False, True):
    found, _ = judging.select(judge, rows, Asking(None, both, budget=40))
    assert found['num_votes'] <= 40 and found['num_comparisons'] == 7
  with pytest.raises(UserError, match='takes at least 7'):
    judging.select(judge, rows, Asking(budget=5))


@pytest.mark.parametrize('rows, expected', [
    ([], 'holds no rows'),
    ([ROWS[0], {'prompt': 'q', 'candidates': ['a']}], 'rows.jsonl:2: some rows are pairs and some'),
    ([{'prompt': 'q', 'candidates': []}], 'rows.jsonl:1 is no row of candidates'),
    ([{'prompt': 'q', 'candidates': ['a', ' ']}], 'a candidate is empty'),
    ([{'prompt': 'q', 'candidates': ['a', 3]}], 'a candidate is no text'),
    ([{'prompt': 'q', 'candidates': ['a'], 'correct': [1]}], "'correct' is no list of 1 truth"),
    ([{'prompt': 'q', 'chosen': 'a', 'rejected': 'a'}], 'are the same'),
    ([{'prompt': 'q', 'chosen': 'a', 'rejected': ''}], "'rejected' is empty"),
    ([{'prompt': 'q', 'chosen': 'a', 'rejected': 'b', 'subset': 3}], "'subset' is no text"),
    ([{'prompt': 'q', 'response': 'a'}], "has no field 'chosen'")])
def test_bad_rows_are_one_sentence(tmp_path, rows, expected):
  with pytest.raises(UserError, match=expected):
    judging.read(written(tmp_path, rows))


def test_rows_go_out_as_they_came(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('{"prompt": "ü", "chosen": "a", "rejected": "b", "weight": 0.25}\n')
  rows, _ = judging.read(str(path))
  _, out = judging.judge_pairs(likes_good, rows, Asking(), 0)
  judging.write(tmp_path / 'out' / 'rows.jsonl', out)
  again = json.loads((tmp_path / 'out' / 'rows.jsonl').read_text())
  assert again['weight'] == 0.25 and again['prompt'] == 'ü' and 'results' in again


SHARED = Path(__file__).resolve().parents[3] / 'shared' / 'data'


@pytest.mark.skipif(not (SHARED / 'pref-llmbar').is_dir(), reason=f'no {SHARED}/pref-llmbar')
def test_real_preferences_are_read_by_subset(tmp_path):
  rows = [{'prompt': row['input'], 'chosen': row[f'output_{row["label"]}'],
           'rejected': row[f'output_{3 - row["label"]}'], 'subset': path.stem}
          for path in sorted((SHARED / 'pref-llmbar').glob('*.json'))
          for row in json.loads(path.read_text())]
  longer = Simulated(lambda shown: FIRST if len(shown[1]) > len(shown[2]) else SECOND)
  found, _ = judging.judge_pairs(longer, judging.read(written(tmp_path, rows))[0],
                                 Asking(1, True), 0)
  assert found['all']['num_pairs'] == 419 and len(found) == 6
  assert found['all']['swap_consistency']['mean'] > 0.98
  # The adversarial subsets are made so that the worse response looks better.
  assert found['adversarial-gptout']['accuracy']['mean'] < 0.7
  assert 'adversarial-manual' in judging.text(found, True)


@pytest.mark.skipif(not (SHARED / 'pref-pandalm').is_dir(), reason=f'no {SHARED}/pref-pandalm')
def test_pairs_of_three_annotators(tmp_path):
  rows = json.loads((SHARED / 'pref-pandalm' / 'testset-v1.json').read_text())
  agreed = []
  for row in rows:
    said = [row[f'annotator{i}'] for i in (1, 2, 3)]
    texts = row['response1'], row['response2']
    best = max(set(said), key=said.count)
    spoken = {str(text).strip() for text in texts} - {''}
    is_text = all(isinstance(text, str) for text in texts)
    if best and said.count(best) > 1 and len(spoken) == 2 and is_text:
      agreed.append({'prompt': f'{row["instruction"]}\n{row["input"]}', 'chosen': texts[best - 1],
                     'rejected': texts[2 - best]})
  assert len(agreed) > 700
  found, _ = judging.judge_pairs(Simulated(lambda s: FIRST), judging.read(
      written(tmp_path, agreed))[0], Asking(), 0)
  assert 0.45 < found['all']['accuracy']['mean'] < 0.55
