"""What a run of reinforcement learning refuses to go on with."""

from pathlib import Path
import types

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.environments.base import Environment
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import reinforce
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.run.session import Session
from jaxrl_pt.types import Verdict
from jaxrl_pt.verifiers.base import DeviceVerifier

MODEL = cfg.Model(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
                  vocab_size=257)


def opened(mode: cfg.OnPolicy | cfg.OneStepOff) -> reinforce.Reinforcement:
  """A run that is opened, of problems that nobody asks."""
  method = cfg.RL('somewhere', cfg.Problems(cfg.Arithmetic(60)), cfg.AnswerMatch(),
                  rollouts=cfg.Rollouts(4, 2, 16, 8, mode=mode),
                  algorithm=cfg.Algorithm(correction=cfg.TokenTIS()))
  run = cfg.Run(
      seed=1, model=MODEL, objective=method,
      data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
      optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.01)), train=cfg.Train(9))
  session = Session(run, Path('unused'), '', make_mesh(cfg.Mesh()),
                    types.SimpleNamespace(tokenizer=ByteTokenizer()))
  verifier = DeviceVerifier(lambda prompts, rollouts: Verdict(*[rollouts.lengths()] * 3))
  environment = Environment(lambda batch: None, verifier, lambda params: {}, 'problems')
  start = jax.tree.map(lambda spec: np.zeros(spec.shape, spec.dtype),
                       P.abstract(session.model(MODEL).specs))
  return reinforce.Reinforcement(session, method, start, environment, {'Run.seed': 1},
                                 lambda params: reinforce.new_method(run, params))


def position(job: reinforce.Reinforcement) -> dict:
  """As a checkpoint keeps it."""
  return job.saved(None, 3)[1]  # Of the state nothing is read where nothing is drawn ahead.


def test_rollouts_drawn_ahead_by_an_earlier_version_are_refused_in_one_sentence():
  """Their arrays are not those of a RolloutBatch: the sentence comes before they are read."""
  job = opened(cfg.OneStepOff())
  job.check(position(job))
  for earlier in ({}, {'pending': 'Rollout'}):
    saved = {name: x for name, x in position(job).items() if name != 'pending'}
    with pytest.raises(UserError, match='of an earlier version, which kept rollouts that were '
                                        'drawn ahead in another form: finish the run with that '
                                        'version, or use a new --workdir') as found:
      job.check({**saved, **earlier})
    assert '\n' not in str(found.value)


def test_without_rollouts_drawn_ahead_an_earlier_version_goes_on():
  job = opened(cfg.OnPolicy())
  saved = position(job)
  saved.pop('pending')
  job.check(saved)
