"""Runs whose verifier's processes are killed, or whose verifier breaks, as real processes."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxrl_pt import metrics
from jaxrl_pt.verifiers import sandbox
from tests.e2e.conftest import RL, Job

NUM_PROCESSES = 2  # of one worker of the pool: a supervisor and who verifies
pytestmark = pytest.mark.timeout(900)
JUDGED = RL.replace('cfg.RL.verifier = @cfg.LengthVerifier()',
                    'cfg.RL.verifier = @cfg.PythonVerifier()').replace(
    'cfg.LengthVerifier.min_chars = 2\ncfg.LengthVerifier.max_chars = 9',
    "cfg.PythonVerifier.target = 'tests.e2e.slow_verifier:{function}'")


def _text(function: str) -> str:
  return JUDGED.replace('{function}', function)


def _rows(job: Job) -> list[dict[str, float]]:
  return [metrics.deterministic(row) for row in metrics.read_rows(job.workdir / metrics.FILE)]


@pytest.fixture(scope='module')
def undisturbed(make_job: Callable[..., Job], pretrained: Job) -> Job:
  job = make_job(_text('verify'), start_from=str(pretrained.workdir))
  assert job.run().returncode == 0
  return job


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_signal_to_every_process_of_a_run_loses_and_changes_nothing(
    make_job: Callable[..., Job], pretrained: Job, undisturbed: Job):
  """As systemd, scancel and Kubernetes send it: the children must outlive the step in hand."""
  job = make_job(_text('verify'), start_from=str(pretrained.workdir))
  with _started(job) as process:
    while job.last_step() < 3:
      assert process.poll() is None
      time.sleep(0.02)
    for pid in (*reversed(sandbox.descendants(process.pid)), process.pid):
      _send(pid, signal.SIGTERM)
    assert process.wait(120) == 75  # Saved, not finished.
  assert 3 <= job.last_step() < undisturbed.last_step()
  assert job.run().returncode == 0 and _rows(job) == _rows(undisturbed)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_children_that_are_killed_change_nothing(make_job: Callable[..., Job], pretrained: Job,
                                                 undisturbed: Job):
  """SIGKILL to some of them, and what a service manager sends to all of them."""
  job = make_job(_text('verify'), start_from=str(pretrained.workdir))
  rng, num_kills = random.Random(0), 0
  with _started(job) as process:
    while process.poll() is None:
      time.sleep(0.1)
      below = sandbox.descendants(process.pid)
      if not job.rows() or len(below) < NUM_PROCESSES:
        continue
      time.sleep(0.1)  # an answer that was begun again is done: three losses of one are a crash
      for pid in below:
        _send(pid, rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
      _send(rng.choice(below), signal.SIGKILL)
      num_kills += 1
  assert process.returncode == 0 and num_kills >= 2 and _rows(job) == _rows(undisturbed)


@contextlib.contextmanager
def _started(job: Job) -> Iterator[subprocess.Popen[bytes]]:
  process = subprocess.Popen(job.command(), env=job.environment, stdout=subprocess.DEVNULL)
  try:
    yield process
  finally:
    process.kill()


def _send(pid: int, number: signal.Signals) -> None:
  try:
    os.kill(pid, number)
  except ProcessLookupError:
    pass


def test_a_verifier_that_breaks_stops_the_run_with_its_last_words(
    make_job: Callable[..., Job], pretrained: Job):
  job = make_job(_text('breaking'), start_from=str(pretrained.workdir))
  job = dataclasses.replace(job, environment={**job.environment,
                                              'TEST_WORKDIR': str(job.workdir)})
  done = job.run()
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert 'The verifier gave no verdict on any of ' in done.stderr
  assert 'ConnectionError: the licence server is gone' in done.stderr
  assert (job.workdir / 'checkpoints' / '4').exists() and job.last_step() >= 4


def test_a_verifier_that_verifies_nothing_stops_the_run_before_the_first_step(
    make_job: Callable[..., Job], pretrained: Job):
  job = make_job(_text('verify').replace('tests.e2e.slow_verifier:verify', 'os:system'),
                 start_from=str(pretrained.workdir))
  done = job.run()
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert 'PythonVerifier gave no verdict on any of the 16 answers' in done.stderr
  assert not (job.workdir / metrics.FILE).exists()
