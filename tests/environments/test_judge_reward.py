"""A judge as reward: what its votes make of groups, and that the truth is no part of it."""

import dataclasses
import types

import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.environments import judge_engines, judge_reward
from jaxrl_pt.environments.judging import Judged
from jaxrl_pt.types import Prompts, RolloutBatch, Verdict
from jaxrl_pt.verifiers.judge import FIRST, NONE, SECOND

MODEL = cfg.Model(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
                  vocab_size=257)
SETTINGS = cfg.JudgeReward('a', MODEL, cfg.AnswerMatch())


class Planted:
  """A judge that prefers texts with more of a letter."""

  def __init__(self, letter='e'):
    self.letter, self.asked = letter, []

  def __call__(self, comparisons, num_votes):
    self.asked += comparisons
    more = [s.first.count(self.letter) - s.second.count(self.letter) for s in comparisons]
    votes = np.repeat(np.where(np.sign(more) > 0, FIRST, np.where(np.sign(more) < 0, SECOND, NONE)
                               )[:, None], num_votes, 1).astype(np.int8)
    return Judged(votes, np.zeros(votes.shape, np.int32), [], np.zeros(len(votes), bool))


def rate(texts, ask=None, scale='win_rate', **settings):
  return judge_reward.rate(['q'] * len(texts), texts, ask or Planted(),
                           dataclasses.replace(
                               SETTINGS, scale=scale, tournament=cfg.Tournament(**settings)), 0)


@pytest.mark.parametrize('form', ['round_robin', 'knockout'])
def test_the_better_earns_more_and_all_together_half(form):
  found = rate([['e', 'eee', 'ee', 'x'], ['x', 'eeee', 'xe', 'eex']], form=form)
  assert found.reward.argmax(1).tolist() == [1, 1]
  np.testing.assert_allclose(found.reward.mean(1), 0.5, rtol=1e-6)
  assert (found.valid == 1).all() and (found.reward >= 0).all() and (found.reward <= 1).all()
  assert (found.comparisons == (6 if form == 'round_robin' else 3)).all()
  if form == 'round_robin':  # The share of the games won, but for the prior.
    assert found.reward[0].argsort().tolist() == [3, 0, 2, 1]
    np.testing.assert_allclose(found.reward[0], [1 / 3, 1, 2 / 3, 0], atol=0.08)


def test_equal_texts_are_one_and_a_blank_one_loses_without_being_asked_about():
  ask = Planted()
  found = rate([['e', ' e\n', '', 'x']], ask)
  assert found.reward[0, 0] == found.reward[0, 1] > found.reward[0, 3] > found.reward[0, 2]
  assert len(ask.asked) == 1 and (found.comparisons == 1).all() and (found.no_verdict == 0).all()
  same = rate([['a', 'a', 'a ', 'a']], ask)
  assert (same.reward == 0.5).all() and (same.valid == 1).all() and len(ask.asked) == 1


def test_a_judge_that_prefers_a_place_does_not_reward_what_comes_first_or_often():
  always_first = lambda shown, votes: Judged(
      np.full((len(shown), votes), FIRST, np.int8), None, None, None)
  groups = [[f'{n} right'] * 6 + [f'{n} wrong'] * 2 for n in range(400)]
  for turned in (groups, [group[::-1] for group in groups]):
    found = rate(turned, always_first)
    wins = found.reward[np.arange(400), [group.index(f'{n} right')
                                         for n, group in enumerate(turned)]] > 0.5
    assert abs(wins.mean() - 0.5) < 0.1  # Four standard errors.
  assert (rate(groups, always_first).reward[:, ::-1] == found.reward).all()


def test_a_group_without_a_verdict_is_not_valid():
  found = rate([['x', 'y', 'z'], ['e', 'y', 'z']])
  assert found.valid.tolist() == [[0] * 3, [1] * 3] and found.reward[0].tolist() == [0.5] * 3
  assert found.no_verdict[0].tolist() == [1] * 3 and found.no_verdict[1, 0] == pytest.approx(1 / 3)


def test_a_budget_and_votes_are_met_and_ratings_are_in_nats():
  ask = Planted()
  found = rate([['e' * i for i in range(1, 9)]], ask, votes=3, budget=40, scale='rating')
  assert len(ask.asked) == 13 and (found.comparisons == 13).all()  # of 28, with 3 votes each
  assert found.reward.max() > 1 and abs(found.reward.mean()) < 0.5


def test_win_rates_against_others_are_asked_in_both_orders():
  always_first = lambda shown, votes: Judged(
      np.full((len(shown), votes), FIRST, np.int8), None, None, None)
  found = judge_reward.win_rates(['q'] * 3, ['a', 'b ', ''], ['x', 'b', 'x'], always_first, 2)
  assert found.tolist() == [0.5, 0.5, 0]  # A preference for a place cancels.
  ask = Planted()
  assert judge_reward.win_rates(['q'] * 2, ['e', 'x'], ['x', 'e'], ask, 1).tolist() == [1, 0]
  assert len(ask.asked) == 4


def test_the_judge_is_shown_what_stands_after_the_last_marker():
  part = judge_reward.judged_part
  assert part('1+2=3#3', '#') == '3' and part('#1#2', '#') == '2' and part('#', '#') == ''
  assert part('12', '#') == '' and part('1#2', '') == '1#2'
  verifier = judge_reward.JudgeVerifier(
      None, None, dataclasses.replace(SETTINGS, after='</t>'), {}, lambda ids: bytes(ids).decode(),
      0)
  said = [b'e</t>x', b'x</t>e', b'eeeeee']
  tokens = np.array([[list(text) for text in said]], np.int32)
  rollouts = RolloutBatch.of_one_turn(tokens, np.ones(tokens.shape, np.float32), tokens * 0.0, 0)
  assert verifier.texts(rollouts) == [['x', 'e', '']]


def test_the_truth_is_measured_and_is_no_part_of_the_reward():
  def verdict_of(correct):
    truth = types.SimpleNamespace(submit=lambda *_: types.SimpleNamespace(result=lambda: Verdict(
        np.full((1, 2), 9.0), np.ones((1, 2)), np.array([correct]))))

    class Asking:
      __enter__, __exit__ = lambda self: Planted(), lambda self, *_: None

    verifier = judge_reward.JudgeVerifier(Asking, truth, SETTINGS, {7: 'q'},
                                          lambda ids: bytes(ids).decode(), 0)
    tokens = np.array([[[101, 101, 0], [120, 0, 0]]], np.int32)
    rollouts = RolloutBatch.of_one_turn(tokens, (tokens > 0).astype(np.float32), tokens * 0.0, 0)
    prompts = Prompts(np.zeros((1, 2), np.int32), np.array([1]), np.array([7]))
    return verifier.submit(prompts, rollouts, ['-']).result()

  one, other = verdict_of([1.0, 0.0]), verdict_of([0.0, 1.0])
  assert one.reward.tolist() == other.reward.tolist() and one.reward[0, 0] > one.reward[0, 1]
  assert one.correct.tolist() == [[1, 0]] and other.correct.tolist() == [[0, 1]]
  assert (one.measures['accuracy/verified'] == 1).all() and not one.parts


def test_a_judge_with_another_tokenizer_or_model_is_refused(monkeypatch, tmp_path):
  of = lambda fingerprint: types.SimpleNamespace(
      data=types.SimpleNamespace(tokenizer=types.SimpleNamespace(fingerprint=fingerprint)),
      workdir=tmp_path, run=types.SimpleNamespace(mesh=cfg.Mesh()))
  judge = types.SimpleNamespace(session=of('b'), model=types.SimpleNamespace(config=MODEL))
  monkeypatch.setattr(judge_engines.policy, 'load_policy', lambda path, mesh: judge)
  assert judge_engines.load_judge(of('b'), SETTINGS) is judge
  with pytest.raises(judge_engines.UserError, match='has another tokenizer than the policy'):
    judge_engines.load_judge(of('a'), SETTINGS)
  other = dataclasses.replace(SETTINGS, model=dataclasses.replace(MODEL, d_ff=32))
  with pytest.raises(judge_engines.UserError, match=r'has d_ff = 32, but the judge in a .* 16'):
    judge_engines.load_judge(of('b'), other)
