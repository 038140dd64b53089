"""Problems as a task, and what a run refuses to go on with."""

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
from jaxrl_pt.data import problems
from jaxrl_pt.data.tokenizer import ByteTokenizer, JsonTokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.train import problem_task, rl, rollouts, tasks
from jaxrl_pt.train import session as sessions
from jaxrl_pt.train.stages import Drawn, Judged
from jaxrl_pt.train.tasks import OnDevice, OnHost
from jaxrl_pt.types import Prompts, Rollout, Verdict

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
  data = types.SimpleNamespace(tokenizer=ByteTokenizer())
  return sessions.Session(run, Path('unused'), '', make_mesh(cfg.Mesh()), data)


def test_prompts_are_a_function_of_the_batch_and_the_answers_are_theirs():
  with problem_task.open_task(make_session(METHOD), METHOD) as task:
    assert isinstance(task.judge, OnDevice)
    (prompts, references), (again, _), (other, _) = (task.take(b) for b in (3, 3, 4))
  np.testing.assert_array_equal(prompts.tokens, again.tokens)
  assert (prompts.ids != other.ids).any()
  for row, length, reference in zip(prompts.tokens, prompts.lengths, references, strict=True):
    assert row[0] == ByteTokenizer().bos_id
    text = bytes(row[1:length].tolist()).decode()
    assert text.endswith('=') and sum(map(int, text[:-1].split('+'))) == int(reference)


def test_without_held_out_problems_nothing_is_measured():
  method = dataclasses.replace(METHOD, problems=cfg.Problems(cfg.Arithmetic(60), held_out=0))
  with problem_task.open_task(make_session(method), method) as task:
    assert task.score({}) == {}


def test_an_answer_that_no_response_could_give_is_refused(tmp_path):
  def opened(answer, tokenizer):
    path = tmp_path / 'problems.jsonl'
    path.write_text(json.dumps({'prompt': 'a', 'answer': answer}) + '\n')
    source = cfg.JsonlProblems(str(path), 'prompt', 'answer')
    method = dataclasses.replace(METHOD, problems=cfg.Problems(source, held_out=0.0))
    session = make_session(method)
    with problem_task.open_task(dataclasses.replace(
        session, data=types.SimpleNamespace(tokenizer=tokenizer)), method):
      pass

  opened('12', ByteTokenizer())
  with pytest.raises(UserError, match=r"jsonl:1, '1#2', holds the marker '#'"):
    opened('1#2', ByteTokenizer())
  backend = hf.Tokenizer(hf.models.WordLevel({c: i for i, c in enumerate('a#?12')}, unk_token='?'))
  backend.pre_tokenizer = hf.pre_tokenizers.Split('', 'isolated')
  with pytest.raises(UserError, match=r"jsonl:1, '13', cannot be written in this tokenizer"):
    opened('13', JsonTokenizer(backend.to_str(), '?', ''))


def test_rollouts_never_hold_ids_without_a_token(tmp_path):
  (tmp_path / 'text.txt').write_text('some text\n' * 40)
  run = make_session(METHOD).run
  run = dataclasses.replace(
      run, model=dataclasses.replace(MODEL, vocab_size=300),
      data=cfg.Data(cfg.TextFiles(str(tmp_path / 'text.txt')), cfg.Bytes(), 16,
                    validation_fraction=0.0))
  session = sessions.open_session(run, tmp_path, '')
  assert session.run.objective.rollouts.sampler.banned == tuple(range(257, 300))


def test_a_verifier_of_text_judges_on_the_host():
  method = dataclasses.replace(METHOD, verifier=cfg.LengthVerifier(1, 3),
                               pool=cfg.VerifierPool(num_workers=1))
  with problem_task.open_task(make_session(method), method) as task:
    assert isinstance(task.judge, OnHost)
    tokens = np.array([[[97, 97, 256], [97, 97, 97]]], np.int32)
    mask = np.array([[[1, 0, 0], [1, 1, 0]]], np.float32)
    verdict = task.judge.submit(Rollout(tokens, mask, mask, 0), ['']).result()
  assert np.asarray(verdict.reward).tolist() == [[1.0, 0.5]]
  assert list(verdict.parts) == ['length']


@pytest.mark.parametrize('verifier, expected', [
    (cfg.LogicVerifier(), 'LogicVerifier finds none of 16 reference answers right'),
    (cfg.PythonVerifier('os:system'), 'PythonVerifier judged none of the 16 answers')])
def test_a_verifier_that_fits_no_problem_is_refused_before_the_first_step(verifier, expected):
  method = dataclasses.replace(METHOD, verifier=verifier, pool=cfg.VerifierPool(num_workers=1))
  with pytest.raises(UserError, match=expected):
    with problem_task.open_task(make_session(method), method):
      pass


def test_a_step_in_which_nothing_was_judged_stops_the_run():
  class Ticket:
    valid = np.zeros((2, 2), np.float32)

    def result(self) -> Verdict:
      return Verdict(self.valid, self.valid, self.valid)

    def parsed(self) -> float:
      return 1.0

    def last_words(self) -> str:
      return 'ImportError: no module named horse'

  with pytest.raises(UserError, match='judged none of 4 responses: ImportError: no module named '
                                      'horse. This step is not learned from'):
    tasks.settled(Ticket())
  ticket = Ticket()
  ticket.valid = np.array([[0, 0], [0, 1]], np.float32)
  assert tasks.settled(ticket).valid.sum() == 1


@pytest.mark.parametrize('shares, says', [
    ([0.0, 0.1, 0.02], True), ([0.0, 0.2, 0.0], False)])
def test_first_batches_without_answers_are_said_once(shares, says):
  beginning = tasks.FirstBatches()
  *before, last = [beginning.note(share) for share in shares]
  assert before == [None, None] and (last is not None) == says and beginning.is_over
  assert not says or 'an answer in 4.0% of the responses of the first 3 steps' in last
  assert beginning.note(0.0) is None


def test_how_many_responses_state_an_answer_is_counted_on_the_host():
  method = dataclasses.replace(METHOD, verifier=cfg.MathVerifier('gsm8k', symbolic=False),
                               pool=cfg.VerifierPool(num_workers=1))
  with problem_task.open_task(make_session(method), method) as task:
    tokens = np.array([[list(b'#### 4'), list(b'wrong4')]], np.int32)
    mask = np.ones(tokens.shape, np.float32)
    ticket = task.judge.submit(Rollout(tokens, mask, mask, 0), ['4'])
    assert ticket.result().reward.tolist() == [[1.0, 0.0]] and ticket.parsed() == 0.5
    (prompts, references) = task.take(0)
  # Bytes of references, which may be long, are for verifiers on the device.
  assert prompts.continuation.shape == (4, 1) and all(references)


@pytest.mark.parametrize('changed, expected', [
    ('start', 'is not the one that this run started from'),
    ('task', 'The problems are not those')])
def test_a_run_goes_on_from_its_own_start_and_problems_only(changed, expected):
  saved = {'start': 'a', 'task': 'b', 'batches': 3}
  task = types.SimpleNamespace(digest='b')
  assert rl._resumed(saved, 'a', task, METHOD, None, None).batch == 3
  with pytest.raises(UserError, match=expected):
    rl._resumed({**saved, changed: 'other'}, 'a', task, METHOD, None, None)


@pytest.mark.parametrize('name, value', [('Run.seed', 2), ('Rollouts.num_prompts', 8),
                                         ('RPT.positions_per_document', 4)])
def test_a_run_goes_on_in_its_own_order_only(name, value):
  """With another one, some prompts would be asked twice and others not at all."""
  method = METHOD if name[:3] != 'RPT' else cfg.RPT('somewhere', rollouts=METHOD.rollouts)
  run = make_session(method).run
  saved = rl.order_identity(run)
  rl.check_order({**saved, 'batches': 3}, run)
  rl.check_order({'batches': 3}, run)  # As older checkpoints are.
  with pytest.raises(UserError, match=f'was made with {name} = {value}, this run has'):
    rl.check_order({**saved, name: value}, run)


def test_nothing_is_drawn_where_every_token_is_banned(tmp_path):
  (tmp_path / 'text.txt').write_text('some text\n' * 40)
  sampler = cfg.Sampler(banned=tuple(range(257)))
  run = make_session(dataclasses.replace(
      METHOD, rollouts=dataclasses.replace(METHOD.rollouts, sampler=sampler))).run
  run = dataclasses.replace(
      run, model=dataclasses.replace(MODEL, vocab_size=300),
      data=cfg.Data(cfg.TextFiles(str(tmp_path / 'text.txt')), cfg.Bytes(), 16,
                    validation_fraction=0.0))
  with pytest.raises(UserError, match='names all 257 tokens'):
    sessions.open_session(run, tmp_path, '')


def test_padding_does_not_count_in_what_is_held_out():
  """Ten problems in batches of four: the two rows that fill the last one up repeat its last."""
  held_out, _ = problems.load(cfg.Problems(cfg.Arithmetic(10), held_out=0.0))

  def id_is_reward(prompts, rollout) -> Verdict:
    reward = prompts.ids[:, None].astype(jnp.float32)
    return Verdict(reward, jnp.ones_like(reward), (reward >= 9).astype(jnp.float32))

  session = make_session(METHOD)
  score = problem_task._make_scorer(
      session, METHOD.rollouts, OnDevice(id_is_reward),
      problems.encode(held_out, ByteTokenizer(), METHOD.rollouts.prompt_len))
  found = score(P.init(session.model(MODEL).specs, jax.random.key(0)))
  assert sorted(p.id for p in held_out) == list(range(10))
  for suffix in ('', '_argmax'):
    assert found[f'validation/reward{suffix}'] == pytest.approx(4.5)
    assert found[f'validation/accuracy{suffix}'] == pytest.approx(0.1)


def test_rollouts_on_disk_come_back_and_damage_is_named(tmp_path):
  with problem_task.open_task(make_session(METHOD), METHOD) as task:
    prompts, references = task.take(0)
  rng = np.random.default_rng(0)
  reals = rng.random((4, 2, 8)).astype(np.float32)
  rollout = Rollout(rng.integers(0, 256, (4, 2, 8)).astype(np.int32), np.ones_like(reals), reals,
                    np.array(7, np.int32))
  verdict = Verdict(reals[..., 0], np.ones((4, 2), np.float32), reals[..., 0] > 0.5,
                    {'answer': reals[..., 0]})
  rollouts.dump(tmp_path, 5, Judged(Drawn(2, prompts, references, rollout), verdict, {}),
                ByteTokenizer())
  found = rollouts.load(tmp_path / '5.npz')
  for one, other in zip(found, (prompts, rollout, verdict), strict=True):
    for field in dataclasses.fields(one):
      if field.name != 'parts':
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
  assert isinstance(found[0], Prompts)
  np.testing.assert_array_equal(found[2].parts['answer'], verdict.parts['answer'])
  damaged = tmp_path / '6.npz'
  damaged.write_bytes((tmp_path / '5.npz').read_bytes()[:300])
  for path in (damaged, tmp_path / 'none.npz'):
    with pytest.raises(UserError, match='dump_every = 1'):
      rollouts.load(path)
