"""RL with a verifier on the host, killed with SIGKILL inside each stage, ends bit-identical."""

from collections.abc import Callable
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxrl_pt import metrics
from jaxrl_pt.train.evaluate import load_state
from tests.e2e.conftest import RL, Job

LAST = 8
# Stage, before or after it, and at which of its calls since the process started.
ON_POLICY = [('draw', 'after', 3), ('judge', 'before', 3), ('learn', 'after', 2),
             ('save', 'after', 1)]
ONE_STEP_OFF = [('judge', 'before', 3), ('learn', 'before', 3), ('save', 'before', 1)]
OFF = ('cfg.Rollouts.mode = @cfg.OneStepOff()', 'cfg.Algorithm.correction = @cfg.TokenTIS()')


def die(job: Job, stage: str, when: str, call: int) -> None:
  command = [sys.executable, '-m', 'tests.e2e.die_in_stage', stage, when, str(call),
             *job.command()[3:]]
  done = subprocess.run(command, env=job.environment, capture_output=True, text=True, timeout=240,
                        check=False)
  assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
  assert job.last_step() < LAST


@pytest.mark.parametrize('bindings, deaths', [((), ON_POLICY), (OFF, ONE_STEP_OFF)],
                         ids=['on_policy', 'one_step_off'])
def test_killed_in_each_stage_is_bit_identical(
    make_job: Callable[..., Job], pretrained: Job, bindings, deaths):
  whole = make_job(RL, start_from=str(pretrained.workdir), bindings=bindings)
  done = whole.run()
  assert done.returncode == 0, done.stderr
  job = make_job(RL, start_from=str(pretrained.workdir), bindings=bindings)
  for death in deaths:
    die(job, *death)
  done = job.run()
  assert done.returncode == 0, done.stderr
  assert 'Resuming from step' in done.stdout
  one, other = (load_state(j.workdir, LAST) for j in (job, whole))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  rows = [[metrics.deterministic(r) for r in j.rows()] for j in (job, whole)]
  assert rows[0] == rows[1] and len(rows[0]) == LAST + 1
  # It has learned something, so that equality says something.
  first, last = load_state(whole.workdir, 2).params, other.params
  assert np.abs(np.asarray(first['embed']) - np.asarray(last['embed'])).max() > 0
  gap = 'staleness' if bindings else 'gap'
  assert all(1 <= r[gap] < (2 if bindings else 1.01) for r in rows[1][1:])
