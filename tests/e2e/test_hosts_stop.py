"""Signals to hosts of a run, as real processes of a cluster: all stop after the same step."""

from collections.abc import Callable, Sequence
import re
import signal
import subprocess
import time

import pytest

from jaxrl_pt import checkpoint
from tests.e2e.conftest import RL, Job, free_port

ENDLESS = ('cfg.Mesh.data = 1', 'cfg.Mesh.fsdp = 2', 'cfg.Train.num_steps = 100000',
           'cfg.Train.eval_every = 100000', 'cfg.Checkpoint.every = 100000')


def start(job: Job) -> list[subprocess.Popen[str]]:
  """Two hosts, as Slurm would start them."""
  cluster = {'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2',
             'SLURM_LOCALID': '0', 'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{free_port()}'}
  return [subprocess.Popen([*job.command(), '--multihost'], text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, env={
                               **job.environment, **cluster, 'SLURM_PROCID': str(host)})
          for host in range(2)]


def stop(job: Job, hosts: list[subprocess.Popen[str]], after: int,
         told: Sequence[int]) -> int:
  """SIGTERM to some hosts, 0.2 s apart, once `after` steps are done; the step they stop at."""
  try:
    job.wait_for(after, *hosts, seconds=400)
    for host in told:
      hosts[host].send_signal(signal.SIGTERM)
      time.sleep(0.2)
    said = [host.communicate(timeout=180)[0] for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  assert [host.returncode for host in hosts] == [75, 75], '\n'.join(said)
  steps = {int(n) for text in said for n in re.findall(
      r'SIGTERM: checkpoint written at step (\d+); run the same command to go on', text)}
  assert len(steps) == 1, '\n'.join(said)
  assert checkpoint.steps(job.workdir / 'checkpoints')[-1] == job.last_step() == max(steps)
  return max(steps)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_host_or_both_stop_all_at_one_step(make_job: Callable[..., Job]):
  job = make_job(bindings=ENDLESS)
  first = stop(job, start(job), after=3, told=[1])
  second = stop(job, start(job), after=first + 3, told=[0, 1])
  assert [row['step'] for row in job.rows()] == list(range(1, second + 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_reinforcement_stops_too(make_job: Callable[..., Job], pretrained: Job):
  job = make_job(RL, start_from=str(pretrained.workdir), bindings=ENDLESS)
  stop(job, start(job), after=2, told=[1])
