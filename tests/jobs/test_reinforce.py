"""What a run of reinforcement learning refuses to go on with, and what it goes on from."""

import dataclasses
from pathlib import Path
import types

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.environments.base import Task
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import open as opening
from jaxrl_pt.jobs import rpt
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.run import session as sessions
from jaxrl_pt.verifiers.base import DeviceVerifier

MODEL = cfg.Model(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
                  vocab_size=257)
METHOD = cfg.RL('somewhere', cfg.Problems(cfg.Arithmetic(60), held_out=0.2), cfg.AnswerMatch(),
                rollouts=cfg.Rollouts(4, 2, 16, 8))
AHEAD = dataclasses.replace(
    METHOD, rollouts=dataclasses.replace(METHOD.rollouts, mode=cfg.OneStepOff()),
    algorithm=cfg.Algorithm(correction=cfg.TokenTIS()))


@pytest.fixture
def reopened(monkeypatch):
  """reopened(objective) → its job, as a context. RPT's positions are chosen by nobody."""
  monkeypatch.setattr(rpt.next_token, 'make_environment', lambda *_: Task(
      lambda batch: (None, ()), DeviceVerifier(lambda prompts, rollouts: None), lambda _: {},
      'positions'))

  def open_job(objective):
    run = cfg.Run(
        seed=1, model=MODEL, objective=objective,
        data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
        optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.01)),
        train=cfg.Train(9, 0 if isinstance(objective, cfg.RL) else 4))
    data = types.SimpleNamespace(tokenizer=ByteTokenizer())
    session = sessions.Session(run, Path('unused'), '', make_mesh(cfg.Mesh()), data)
    start = P.init(session.model(MODEL).specs, jax.random.key(0))
    return opening.kind(objective).reopen(session, start)

  return open_job


@pytest.mark.parametrize('changed, expected', [
    ('start', 'is not the one that this run started from'),
    ('task', 'The problems are not those')])
def test_a_run_goes_on_from_its_own_start_and_problems_only(reopened, changed, expected):
  with reopened(METHOD) as job:
    saved = {**job.saved(None, 3)[1], 'batches': 3}
    job.check(saved)
    job.resume(None, saved)
    assert job.saved(None, 3)[1]['batches'] == 3
    with pytest.raises(UserError, match=expected):
      job.check({**saved, changed: 'other'})


@pytest.mark.parametrize('name, value', [('Run.seed', 2), ('Rollouts.num_prompts', 8),
                                         ('RPT.positions_per_document', 4)])
def test_a_run_goes_on_in_its_own_order_only(reopened, name, value):
  """With another one, some prompts would be asked twice and others not at all."""
  method = METHOD if name[:3] != 'RPT' else cfg.RPT('somewhere', rollouts=METHOD.rollouts)
  with reopened(method) as job:
    saved = {**job.saved(None, 3)[1], 'batches': 3}
    job.check(saved)
    job.check({key: saved[key] for key in ('batches', 'start', 'task')})  # As older checkpoints.
    with pytest.raises(UserError, match=f'was made with {name} = {value}, this run has'):
      job.check({**saved, name: value})


def test_what_was_drawn_ahead_travels_with_the_checkpoint(reopened):
  with reopened(AHEAD) as job:
    state = job.start()
    saved, position = job.saved(state, 3)
    assert saved is state  # Nothing is drawn ahead before the first step.
    pending = dataclasses.replace(state.method.pending, tokens=state.method.pending.tokens + 7)
    drawn = dataclasses.replace(state, method=dataclasses.replace(state.method, pending=pending))
    job.check(position)
    job.resume(drawn, position)
    jax.tree.map(lambda x: x.delete(), drawn)  # As the step does, to which it is donated.
    again, _ = job.saved(job.start(), 4)
    np.testing.assert_array_equal(again.method.pending.tokens, 7)


def test_rollouts_that_an_earlier_version_drew_ahead_are_refused(reopened):
  """Their arrays had other names, and the checkpoint's tree would not be that of the state."""
  with reopened(AHEAD) as job:
    position = job.saved(job.start(), 3)[1]
    job.check(position)
    older = {name: value for name, value in position.items() if name != 'pending'}
    with pytest.raises(UserError, match='of an earlier version, which kept rollouts'):
      job.check(older)
  with reopened(METHOD) as job:  # Nothing is drawn ahead.
    position = job.saved(None, 3)[1]
    job.check({name: value for name, value in position.items() if name != 'pending'})


def test_rollouts_under_way_on_other_shards_are_refused(reopened):
  flying = dataclasses.replace(AHEAD, rollouts=dataclasses.replace(
      METHOD.rollouts, mode=cfg.InFlight(2), slots=cfg.Slots(4)))
  with reopened(flying) as job:
    saved = job.saved(None, 3)[1]
    job.check(saved)
    with pytest.raises(UserError, match='under way on 2 shards of the data'):
      job.check({**saved, 'shards': 2})
  with reopened(METHOD) as job:  # Nothing is under way between its steps.
    job.check({**job.saved(None, 3)[1], 'shards': 2})
