"""A run whose sampler and trainer disagree stops; what it leaves says where."""

from collections.abc import Callable
import json

import numpy as np
import pytest

from jaxrl_pt import checkpoint
from jaxrl_pt import config as cfg
from tests.e2e.conftest import RPT, Job


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_mismatch_above_the_gate_stops_the_run_with_its_worst_responses(
    make_job: Callable[..., Job], pretrained: Job):
  """At a gate of 1 rounding is a mismatch already; a low temperature makes it ten times that."""
  job = make_job(RPT, start_from=str(pretrained.workdir), bindings=(
      'cfg.Train.num_steps = 3', 'cfg.Checkpoint.every = 1', 'cfg.Rollouts.num_prompts = 4',
      'cfg.Rollouts.response_tokens = 4', 'cfg.Rollouts.mismatch_gate = 1.0',
      'cfg.Rollouts.sampler = @cfg.Sampler()', 'cfg.Sampler.temperature = 0.1'))
  done = job.run()
  assert done.returncode == 2, done.stdout + done.stderr
  sentence, = (line for line in done.stderr.splitlines() if line.startswith('jaxrl-pt: '))
  path, = (job.workdir / 'mismatch').iterdir()
  page = json.loads(path.read_text())
  step = int(path.stem)
  assert f'disagree at step {step}' in sentence and str(path) in sentence
  assert f'the last good checkpoint is {f"step {step - 1}" if step > 1 else "none"}' in sentence
  assert 'Traceback' not in done.stderr
  assert checkpoint.steps(job.workdir / 'checkpoints') == list(range(1, step))
  row = job.rows()[-1]
  assert row['step'] == page['step'] == step
  assert row['mismatch'] == page['mismatch'] > page['gate'] == 1
  means = [response['mismatch'] for response in page['responses']]
  assert len(means) == 16 and means == sorted(means, reverse=True) and means[0] >= row['mismatch']
  for response in page['responses']:
    difference = np.subtract(response['trainer_logp'], response['sampler_logp'])
    assert len(difference) == len(response['tokens'])
    np.testing.assert_allclose(np.exp(np.abs(difference)).mean(), response['mismatch'], rtol=1e-5)


def test_what_is_gated():
  assert cfg.Rollouts().is_gated and cfg.Rollouts().mismatch_gate == 1.05
  assert not cfg.Rollouts(mismatch_gate=0).is_gated
  assert not cfg.Rollouts(mode=cfg.OneStepOff()).is_gated
