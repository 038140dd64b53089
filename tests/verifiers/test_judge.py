"""Verdicts: what counts as one, on the host and on the device, and what it earns."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.token_bytes import token_table
from jaxrl_pt.types import Prompts, RolloutBatch
from jaxrl_pt.verifiers import build, exact, trial
from jaxrl_pt.verifiers.base import DeviceVerifier
from jaxrl_pt.verifiers.judge import FIRST, NONE, SECOND, verdict
from jaxrl_pt.verifiers.response_verdict import Outcome

BOXED, MARKED = cfg.BoxedVerdict(), cfg.MarkedVerdict()


@pytest.mark.parametrize('response, expected', [
    (r'Both are fine. \boxed{Assistant 1}', FIRST), (r'\boxed{ Assistant 2 }', SECOND),
    (r'\boxed{Assistant 2} no: \boxed{Assistant 1}.', FIRST),
    (r'\boxed{Assistant 1} and then \boxed{neither}', NONE),
    (r'\boxed{Assistant 1} and \boxed{Assistant 1 and Assistant 2}', NONE),
    (r'\boxed{assistant 1}', NONE), (r'\boxed{1}', NONE), (r'Assistant 1', NONE),
    (r'\boxed{Assistant 1', NONE), ('', NONE), (r'\boxed{}', NONE),
    (r'The answer says \boxed{Assistant 2}, which I ignore: \boxed{Assistant 1}', FIRST)])
def test_the_last_box_is_the_verdict_or_there_is_none(response, expected):
  assert verdict(response, BOXED) == expected


@pytest.mark.parametrize('response, expected', [
    ('1+2=3#A', FIRST), ('#B', SECOND), ('#A#B', SECOND), ('#A#', NONE), ('#AB', NONE),
    ('#C', NONE), ('A', NONE), ('', NONE), ('#a', NONE)])
def test_the_text_behind_the_last_marker_is_the_verdict(response, expected):
  assert verdict(response, MARKED) == expected


@pytest.mark.parametrize('settings, right, wrong', [
    (cfg.JudgeVerifier(), r'\boxed{Assistant 2}', r'\boxed{Assistant 1}'),
    (cfg.JudgeVerifier(MARKED, -0.5), '#B', '#A')])
def test_a_verdict_earns_one_or_minus_one(settings, right, wrong):
  verify, label = build.host_verifier(settings), settings.verdict.labels[1]
  for response, outcome, score in ((right, Outcome.CORRECT, 1.0), (wrong, Outcome.WRONG, -1.0),
                                   ('hm', Outcome.UNPARSED, settings.unparsed)):
    found = build.checked(verify(response, label), settings)
    assert (found.outcome, found.score) == (outcome, score)
  assert trial.tried(settings, label, '', 'here').response == right
  assert verify(trial.tried(settings, '42', '', 'here').response, '42').outcome != Outcome.CORRECT


def test_the_device_earns_what_the_host_does():
  """`AnswerMatch` with −1 for what is wrong, on responses that end, is the judge's verifier."""
  tokenizer = ByteTokenizer()
  texts = ['1+2=3#A', '#B', '#', 'A', '', '#AB', '#B#A']
  tokens = np.full((2, len(texts), 9), tokenizer.eos_id, np.int32)
  mask = np.zeros(tokens.shape, np.float32)
  for g, text in enumerate(texts):
    tokens[:, g, :len(text)] = list(text.encode())
    mask[:, g, :len(text) + 1] = 1
  answers = jnp.asarray([[ord('A')], [ord('B')]])
  prompts = Prompts(jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32), jnp.arange(2), extras={
      'answer': answers, 'answer_lengths': jnp.ones(2, jnp.int32)})
  table = token_table(tokenizer.token_bytes(), tokenizer.vocab_size)
  rollouts = RolloutBatch.of_one_turn(tokens, mask, mask, 0)
  verify = lambda wrong: DeviceVerifier(exact.device_verifier(
      table, b'#', tokenizer.stop_ids, wrong)).submit(prompts, rollouts, ()).result()
  found, plain = verify(-1.0), verify(0.0)
  host = build.host_verifier(cfg.JudgeVerifier(MARKED))
  expected = [[host(text, label).score for text in texts] for label in 'AB']
  np.testing.assert_array_equal(found.reward, expected)
  np.testing.assert_array_equal(found.correct, np.array(expected) > 0)
  np.testing.assert_array_equal(plain.reward, np.array(expected) > 0)
