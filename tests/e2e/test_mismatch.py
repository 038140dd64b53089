"""A run whose sampler and trainer disagree stops; what it leaves says where."""

from collections.abc import Callable
import json

import numpy as np
import pytest

from jaxrl_pt import checkpoint
from jaxrl_pt import config as cfg
from tests.e2e.conftest import RPT, Job


@pytest.mark.timeout(900)
def test_a_mismatch_above_the_gate_stops_the_run_with_its_worst_responses(
    make_job: Callable[..., Job], pretrained: Job):
  """At a gate of 1 the rounding of bfloat16 in sampler and trainer is a mismatch already."""
  job = make_job(RPT, start_from=str(pretrained.workdir), bindings=(
      'cfg.Train.num_steps = 3', 'cfg.Checkpoint.every = 1', 'cfg.Rollouts.num_prompts = 4',
      'cfg.Rollouts.response_tokens = 4', 'cfg.Rollouts.mismatch_gate = 1.0',
      "cfg.Compute.dtype = 'bfloat16'"))
  done = job.run()
  assert done.returncode == 2, done.stderr
  sentence, = (line for line in done.stderr.splitlines() if line.startswith('jaxrl-pt: '))
  page = json.loads((job.workdir / 'mismatch' / '1.json').read_text())
  assert 'disagree at step 1' in sentence and str(job.workdir / 'mismatch' / '1.json') in sentence
  assert 'the last good checkpoint is none' in sentence and 'Traceback' not in done.stderr
  assert checkpoint.steps(job.workdir / 'checkpoints') == []
  row = job.rows()[-1]
  assert row['step'] == page['step'] == 1 and row['gap'] == page['mismatch'] > page['gate'] == 1
  means = [response['mismatch'] for response in page['responses']]
  assert len(means) == 16 and means == sorted(means, reverse=True) and means[0] >= row['gap']
  for response in page['responses']:
    difference = np.subtract(response['trainer_logp'], response['sampler_logp'])
    assert len(difference) == len(response['tokens'])
    np.testing.assert_allclose(np.exp(np.abs(difference)).mean(), response['mismatch'], rtol=1e-5)


def test_what_is_gated():
  assert cfg.Rollouts().is_gated and cfg.Rollouts().mismatch_gate == 1.05
  assert not cfg.Rollouts(mismatch_gate=0).is_gated
  assert not cfg.Rollouts(mode=cfg.OneStepOff()).is_gated
