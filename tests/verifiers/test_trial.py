"""A verifier is tried on answers that must be right before anything is learned from it."""

import json

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data import problems
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import build, trial
from jaxrl_pt.verifiers.pool import Pool
from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict

ROLES = 'Alice is a knight, Bob is a knave'
LIMITS = cfg.VerifierPool(num_workers=1, wall_seconds=5)


@pytest.mark.parametrize('settings, reference', [
    (cfg.MathVerifier('boxed', False), 'so 6 \\boxed{42}'),
    (cfg.MathVerifier('gsm8k', False), '42'),
    (cfg.MathVerifier('gsm8k', False), '6 · 7 = 42\n#### 42'),
    (cfg.MathVerifier('last_number', False), '42'), (cfg.LogicVerifier(), ROLES),
    (cfg.WordVerifier(3, 9, 2), 'horse'), (cfg.WordVerifier(0, 9, 4), 'horse'),
    (cfg.FormatVerifier(), ''), (cfg.LengthVerifier(3, 9), 'any'),
    (cfg.Composite((cfg.LogicVerifier(), cfg.LengthVerifier(3, 9)), (1.0, 2.0)), ROLES)])
def test_what_is_tried_is_right(settings, reference):
  item = trial.tried(settings, reference, 'a demonstration', 'row 1')
  verified = build.host_verifier(settings)(item.response, reference)
  assert item.is_right and verified.outcome is Outcome.CORRECT, (item, verified)


def test_reasoning_gyms_own_answers_are_right():
  pytest.importorskip('reasoning_gym')
  ours, = problems.load(cfg.Problems(cfg.ReasoningGym('chain_sum', 1), held_out=0.0))[0]
  for settings in (cfg.GymVerifier('tags'), cfg.GymVerifier('text')):
    item = trial.tried(settings, ours.answer, ours.demonstration, ours.place)
    verified = build.host_verifier(settings)(item.response, ours.answer)
    assert item.is_right and verified.outcome is Outcome.CORRECT
  # Where the library has no answer of its own, the verifier must verify whatever it is given.
  place = json.loads(ours.answer)
  without = json.dumps({**place, 'entry': {**place['entry'], 'answer': None}})
  del place['entry']
  for reference in (without, json.dumps(place)):
    item = trial.tried(cfg.GymVerifier(), reference, '', 'row 1')
    assert not item.is_right and item.response


def _check(settings: cfg.HostVerifier, *references: str) -> None:
  with Pool(settings, LIMITS) as pool:
    trial.check(pool, settings, [trial.tried(settings, r, '', f'row {i}')
                                 for i, r in enumerate(references)])


def test_a_verifier_of_other_problems_is_refused():
  with pytest.raises(UserError, match=r"LogicVerifier finds none of 2 reference answers right.*"
                                      r"'<think></think><answer>42</answer>' where the reference "
                                      r"is '42' \(row 0\)"):
    _check(cfg.LogicVerifier(), '42', '7')


def test_a_verifier_that_verifies_nothing_is_refused_with_its_last_words():
  with pytest.raises(UserError, match='PythonVerifier gave no verdict on any of the 2 answers that '
                                      'it was tried on before the first step: TypeError: '):
    _check(cfg.PythonVerifier('os:system'), '42', '7')


def test_references_that_cannot_be_earned_are_named(capfd):
  _check(cfg.LogicVerifier(), ROLES, '42', ROLES)
  assert "1 of 3 reference answers not right" in (said := capfd.readouterr().err)
  assert "the reference is '42' (row 1)" in said
  _check(cfg.LogicVerifier(), ROLES)
  assert capfd.readouterr().err == ''


def test_the_commonest_reason_is_the_last_word():
  crash = [ResponseVerdict(Outcome.CRASH, detail=d) for d in ('a', 'b', 'b')]
  assert trial.last_words([ResponseVerdict(Outcome.CORRECT, {'answer': 1.0}), *crash]) == 'b'
