"""What a run opens: rollouts draw tokens of its tokenizer alone; a chat template is carried on."""

import dataclasses
import json

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.run import places, saved
from jaxrl_pt.run import session as sessions

MODEL = cfg.Model(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
                  vocab_size=300)


def make_run(tmp_path, sampler: cfg.Sampler = cfg.Sampler()) -> cfg.Run:
  """A run whose tokenizer has 257 of the model's 300 ids."""
  (tmp_path / 'text.txt').write_text('some text\n' * 40)
  method = cfg.RL('somewhere', cfg.Problems(cfg.Arithmetic(60), held_out=0.2), cfg.AnswerMatch(),
                  rollouts=cfg.Rollouts(4, 2, 16, 8, sampler))
  return cfg.Run(
      seed=1, model=MODEL, objective=method,
      data=cfg.Data(cfg.TextFiles(str(tmp_path / 'text.txt')), cfg.Bytes(), 16,
                    validation_fraction=0.0),
      optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.01)), train=cfg.Train(9))


def test_rollouts_never_hold_ids_without_a_token(tmp_path):
  session = sessions.open_session(make_run(tmp_path), tmp_path, '')
  assert session.run.objective.rollouts.sampler.banned == tuple(range(257, 300))


def test_nothing_is_drawn_where_every_token_is_banned(tmp_path):
  run = make_run(tmp_path, cfg.Sampler(banned=tuple(range(257))))
  with pytest.raises(UserError, match='names all 257 tokens'):
    sessions.open_session(run, tmp_path, '')


def test_an_objective_that_draws_nothing_is_left_as_it_is(tmp_path):
  run = make_run(tmp_path)
  run = dataclasses.replace(run, objective=cfg.NextToken(), train=cfg.Train(9, batch_size=4))
  assert sessions.open_session(run, tmp_path, '').run == run


def test_the_template_of_the_start_policy_writes_messages_and_is_carried_on(tmp_path):
  start, work = tmp_path / 'start', tmp_path / 'work'
  carried = start / places.CARRIED
  carried.mkdir(parents=True)
  (start / places.CONFIG).write_text('')
  (carried / 'chat_template.jinja').write_text(
      '{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}'
      '{% if add_generation_prompt %}<assistant>{% endif %}')
  (carried / 'ternary_scales.json').write_text('{}')  # Of weights that training changes.
  (tmp_path / 'rows.jsonl').write_text(json.dumps({'messages': [
      {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]}) + '\n')
  data = cfg.Data(cfg.Conversations(str(tmp_path / 'rows.jsonl')), cfg.PolicyTokenizer(), 64, 0.0,
                  long_documents='cut')
  run = dataclasses.replace(make_run(tmp_path), objective=cfg.SFT(str(start)), data=data,
                            train=cfg.Train(9, batch_size=1))
  session = sessions.open_session(run, work, '', tokenizer=ByteTokenizer())
  [tokens] = session.data.train.batch([0]).tokens
  assert bytes(int(i) for i in tokens if i < 256).startswith(b'<user>a<assistant>b')
  saved.record(session, 0)
  assert [p.name for p in (work / places.CARRIED).iterdir()] == ['chat_template.jinja']
  # From now on the run has its own.
  (carried / 'chat_template.jinja').write_text('another')
  assert sessions.open_session(run, work, '', tokenizer=ByteTokenizer()).data.directory == (
      session.data.directory)
