"""Problems as an environment: prompts, verifiers on the device and the host, held-out measure."""

import dataclasses
import json
from pathlib import Path
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import problems as data
from jaxrl_pt.data.tokenizer import ByteTokenizer, JsonTokenizer
from jaxrl_pt.environments import problems
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.run import session as sessions
from jaxrl_pt.types import RolloutBatch, Verdict
from jaxrl_pt.verifiers.base import DeviceVerifier
from jaxrl_pt.verifiers.host import PoolVerifier

MODEL = cfg.Model(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
                  vocab_size=257)
METHOD = cfg.RL('somewhere', cfg.Problems(cfg.Arithmetic(60), held_out=0.2), cfg.AnswerMatch(),
                rollouts=cfg.Rollouts(4, 2, 16, 8))


def make_session(method: cfg.RL) -> sessions.Session:
  run = cfg.Run(
      seed=1, model=MODEL, objective=method,
      data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
      optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.01)),
      train=cfg.Train(9, 0 if isinstance(method, cfg.RL) else 4))
  prepared = types.SimpleNamespace(tokenizer=ByteTokenizer())
  return sessions.Session(run, Path('unused'), '', make_mesh(cfg.Mesh()), prepared)


def test_prompts_are_a_function_of_the_batch_and_the_answers_are_theirs():
  with problems.open_environment(make_session(METHOD), METHOD) as environment:
    assert isinstance(environment.verifier, DeviceVerifier)
    (prompts, references), (again, _), (other, _) = (environment.take(b) for b in (3, 3, 4))
  np.testing.assert_array_equal(prompts.tokens, again.tokens)
  assert (prompts.ids != other.ids).any()
  answers = prompts.extras['answer'], prompts.extras['answer_lengths']
  for row, length, reference, answer, num_bytes in zip(
      prompts.tokens, prompts.lengths, references, *answers, strict=True):
    assert row[0] == ByteTokenizer().bos_id
    text = bytes(row[1:length].tolist()).decode()
    assert text.endswith('=') and sum(map(int, text[:-1].split('+'))) == int(reference)
    assert bytes(answer[:num_bytes].tolist()).decode() == reference


def test_without_held_out_problems_nothing_is_measured():
  method = dataclasses.replace(METHOD, problems=cfg.Problems(cfg.Arithmetic(60), held_out=0))
  with problems.open_environment(make_session(method), method) as environment:
    assert environment.score({}) == {}


def test_an_answer_that_no_response_could_give_is_refused(tmp_path):
  def opened(answer, tokenizer):
    path = tmp_path / 'problems.jsonl'
    path.write_text(json.dumps({'prompt': 'a', 'answer': answer}) + '\n')
    source = cfg.JsonlProblems(str(path), 'prompt', 'answer')
    method = dataclasses.replace(METHOD, problems=cfg.Problems(source, held_out=0.0))
    session = make_session(method)
    with problems.open_environment(dataclasses.replace(
        session, prepared=types.SimpleNamespace(tokenizer=tokenizer)), method):
      pass

  opened('12', ByteTokenizer())
  with pytest.raises(UserError, match=r"jsonl:1, '1#2', holds the marker '#'"):
    opened('1#2', ByteTokenizer())
  backend = hf.Tokenizer(hf.models.WordLevel({c: i for i, c in enumerate('a#?12')}, unk_token='?'))
  backend.pre_tokenizer = hf.pre_tokenizers.Split('', 'isolated')
  with pytest.raises(UserError, match=r"jsonl:1, '13', cannot be written in this tokenizer"):
    opened('13', JsonTokenizer(backend.to_str(), '?', ''))


def test_a_verifier_of_text_verifies_on_the_host():
  method = dataclasses.replace(METHOD, verifier=cfg.LengthVerifier(1, 3),
                               pool=cfg.VerifierPool(num_workers=1))
  with problems.open_environment(make_session(method), method) as environment:
    assert isinstance(environment.verifier, PoolVerifier)
    tokens = np.array([[[97, 97, 256], [97, 97, 97]]], np.int32)
    mask = np.array([[[1, 0, 0], [1, 1, 0]]], np.float32)
    verdict = environment.verifier.submit(
        None, RolloutBatch.of_one_turn(tokens, mask, mask, 0), ['']).result()
  assert np.asarray(verdict.reward).tolist() == [[1.0, 0.5]]
  assert list(verdict.parts) == ['length']


@pytest.mark.parametrize('verifier, expected', [
    (cfg.LogicVerifier(), 'LogicVerifier finds none of 16 reference answers right'),
    (cfg.PythonVerifier('os:system'), 'PythonVerifier gave no verdict on any of the 16 answers')])
def test_a_verifier_that_fits_no_problem_is_refused_before_the_first_step(verifier, expected):
  method = dataclasses.replace(METHOD, verifier=verifier, pool=cfg.VerifierPool(num_workers=1))
  with pytest.raises(UserError, match=expected):
    with problems.open_environment(make_session(method), method):
      pass


def test_how_many_responses_state_an_answer_is_counted_on_the_host():
  method = dataclasses.replace(METHOD, verifier=cfg.MathVerifier('gsm8k', symbolic=False),
                               pool=cfg.VerifierPool(num_workers=1))
  with problems.open_environment(make_session(method), method) as environment:
    tokens = np.array([[list(b'#### 4'), list(b'wrong4')]], np.int32)
    mask = np.ones(tokens.shape, np.float32)
    pending = environment.verifier.submit(
        None, RolloutBatch.of_one_turn(tokens, mask, mask, 0), ['4'])
    assert pending.result().reward.tolist() == [[1.0, 0.0]] and pending.parsed() == 0.5
    prompts, references = environment.take(0)
  # Bytes of references, which may be long, are for verifiers on the device.
  assert prompts.extras['answer'].shape == (4, 1) and all(references)


def test_padding_does_not_count_in_what_is_held_out():
  """Ten problems in batches of four: the two rows that fill the last one up repeat its last."""
  held_out, _ = data.load(cfg.Problems(cfg.Arithmetic(10), held_out=0.0))

  def id_is_reward(prompts, rollouts) -> Verdict:
    reward = prompts.ids[:, None].astype(jnp.float32)
    return Verdict(reward, jnp.ones_like(reward), (reward >= 9).astype(jnp.float32))

  session = make_session(METHOD)
  score = problems.make_scorer(
      problems.HeldOut(session, METHOD.rollouts, data.encode(
          held_out, ByteTokenizer(), METHOD.rollouts.prompt_len)), DeviceVerifier(id_is_reward))
  found = score(P.init(session.model(MODEL).specs, jax.random.key(0)))
  assert sorted(p.id for p in held_out) == list(range(10))
  for suffix in ('', '_argmax'):
    assert found[f'validation/reward{suffix}'] == pytest.approx(4.5)
    assert found[f'validation/accuracy{suffix}'] == pytest.approx(0.1)
