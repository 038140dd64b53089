"""RL on two hosts, as two processes with a device each, against one process with two devices."""

from collections.abc import Callable
import dataclasses

import jax
import numpy as np
import pytest

from jaxrl_pt import metrics
from jaxrl_pt.jobs.open import load_state
from tests.e2e.conftest import RL, Job, run_on_hosts

SPLIT = ('cfg.Mesh.data = 1', 'cfg.Mesh.fsdp = 2', 'cfg.Train.num_steps = 2',
         'cfg.Train.eval_every = 2',
         'cfg.RL.verifier = @cfg.PythonVerifier()',
         "cfg.PythonVerifier.target = 'tests.e2e.one_of_two_hosts:verify'")
# Groups drawn again from the second step on: rows travel from the devices to all hosts and back.
DRAWN_AGAIN = ('cfg.Rollouts.selection = @cfg.DynamicSampling()',
               'cfg.DynamicSampling.from_step = 1')


@pytest.mark.parametrize('bindings', [
    pytest.param((), id='drawn once', marks=pytest.mark.slow),
    pytest.param(DRAWN_AGAIN, id='drawn again')])
def test_two_hosts_agree_and_learn_as_one_does(
    make_job: Callable[..., Job], pretrained: Job, bindings: tuple[str, ...]):
  """Their verifiers contradict each other on purpose: host 0's word counts."""
  apart, together = (make_job(RL, start_from=str(pretrained.workdir),
                              bindings=(*SPLIT, *bindings)) for _ in range(2))
  said = run_on_hosts(apart, 'tests.e2e.one_of_two_hosts', 2, *apart.command()[3:])
  assert 'step 2/2' in said[0] and 'step 2/2' not in said[1]
  flags = together.environment['XLA_FLAGS'] + ' --xla_force_host_platform_device_count=2'
  together = dataclasses.replace(together, environment={**together.environment,
                                                        'XLA_FLAGS': flags})
  done = together.run()
  assert done.returncode == 0, done.stderr
  rows, expected = ([metrics.deterministic(row) for row in job.rows()]
                    for job in (apart, together))
  assert len(rows) == 3
  for row, wanted in zip(rows, expected, strict=True):
    assert row.keys() == wanted.keys()
    for name, value in wanted.items():
      np.testing.assert_allclose(row[name], value, rtol=2e-3, atol=1e-5, err_msg=name)
  # Two verdicts that were not made one would add up to a half, whatever was drawn.
  assert any(abs(row['reward'] - 0.5) > 0.05 for row in rows[1:])
  one, other = (load_state(job.workdir, 2).params for job in (apart, together))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-3)
