"""Resume equals never having stopped: real processes, really killed, compared bit for bit."""

from collections.abc import Callable
import json
import random
import signal

import jax
import numpy as np
import pytest

from jaxrl_pt import checkpoint, metrics
from jaxrl_pt.jobs.open import load_state
from tests.e2e.conftest import RPT, Job

LAST = 60


def assert_same_run(one: Job, other: Job) -> None:
  """Every leaf of the last state, and every row of the metrics but its times."""
  first, second = (jax.tree_util.tree_leaves_with_path(load_state(j.workdir))
                   for j in (one, other))
  for (path, a), (_, b) in zip(first, second, strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
  rows, others = ([metrics.deterministic(r) for r in j.rows()] for j in (one, other))
  assert rows == others
  assert [r['step'] for r in rows if r['step'] > 0] == list(range(1, LAST + 1))


# `test_mixture.py` kills a pretraining run in the ordinary tests.
@pytest.mark.slow
@pytest.mark.parametrize('trial', [0, 1])
def test_pretraining_killed_at_a_random_step_is_bit_identical(
    make_job: Callable[..., Job], pretrained: Job, trial: int):
  step = random.SystemRandom().randint(1, LAST - 5)
  job = make_job()
  code, output = job.run_until(step, signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  finished = checkpoint.steps(job.workdir / 'checkpoints')  # What the kill left behind.
  done = job.run()
  assert done.returncode == 0, done.stderr
  assert ('Resuming from step' in done.stdout) == bool(finished)
  assert_same_run(job, pretrained)


def test_rpt_killed_at_a_random_step_is_bit_identical(
    make_job: Callable[..., Job], pretrained: Job, reinforced: Job):
  step = random.SystemRandom().randint(1, LAST - 5)
  job = make_job(RPT, start_from=str(pretrained.workdir))
  code, output = job.run_until(step, signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  done = job.run()
  assert done.returncode == 0, done.stderr
  assert_same_run(job, reinforced)


RLP = RPT.replace('response_tokens = 1', 'response_tokens = 3') + r"""
cfg.RPT.reward = @cfg.InformationGain()
cfg.InformationGain.decay = 0.9
cfg.RPT.prediction = @cfg.Reason()
cfg.Reason.think = '\x01'
cfg.Reason.answer = '\x02'
cfg.RPT.algorithm = @cfg.Algorithm()
cfg.Algorithm.advantage = @cfg.RLOO()
"""


@pytest.mark.slow
def test_rlp_killed_at_a_random_step_is_bit_identical(
    make_job: Callable[..., Job], pretrained: Job):
  """Its average policy, the baseline of its reward, is in the checkpoint."""
  whole, job = (make_job(RLP, start_from=str(pretrained.workdir)) for _ in range(2))
  done = whole.run()
  assert done.returncode == 0, done.stderr
  code, output = job.run_until(random.SystemRandom().randint(1, LAST - 5), signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  done = job.run()
  assert done.returncode == 0, done.stderr
  assert_same_run(job, whole)
  state = load_state(job.workdir)
  apart = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(),
                       state.params, state.method.average)
  assert max(jax.tree.leaves(apart)) > 0  # The average lags behind.


@pytest.mark.slow  # The next test sends SIGTERM, and asks the same of it.
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_writes_a_checkpoint_and_says_that_the_run_is_not_finished(
    make_job: Callable[..., Job], pretrained: Job, number: signal.Signals):
  job = make_job()
  code, output = job.run_until(12, number)
  assert code == 75, output
  assert 'run the same command to go on' in output
  assert checkpoint.steps(job.workdir / 'checkpoints')[-1] == job.last_step()
  assert job.run().returncode == 0
  assert_same_run(job, pretrained)


def test_a_truncated_newest_checkpoint_is_named_and_skipped(
    make_job: Callable[..., Job], pretrained: Job):
  job = make_job()
  code, output = job.run_until(35, signal.SIGTERM)
  assert code == 75 and 'run the same command to go on' in output, output
  assert checkpoint.steps(job.workdir / 'checkpoints')[-1] == job.last_step()
  newest, before = checkpoint.steps(job.workdir / 'checkpoints')[:-3:-1]
  largest = max((job.workdir / 'checkpoints' / str(newest)).rglob('*'),
                key=lambda p: p.stat().st_size if p.is_file() else -1)
  largest.write_bytes(largest.read_bytes()[:largest.stat().st_size // 2])
  done = job.run()
  assert done.returncode == 0, done.stderr
  assert f'/{newest}' in done.stderr or f'step {newest}' in done.stderr
  assert f'Resuming from step {before}' in done.stdout
  assert_same_run(job, pretrained)


def test_rpt_rewards_rise_and_the_sampler_agrees_with_the_trainer(reinforced: Job):
  rows = reinforced.rows()
  assert 'validation/easy_sampled' in rows[0] and rows[0]['step'] == 0
  assert rows[-1]['validation/easy_sampled'] > rows[0]['validation/easy_sampled']
  assert max(r['mismatch'] for r in rows[1:]) <= 1.01


def test_the_pretrained_model_has_learned(pretrained: Job):
  rows = pretrained.rows()
  assert rows[-1]['validation/loss'] < rows[0]['loss'] - 1.5
  assert (pretrained.workdir / 'report.html').stat().st_size > 10_000


@pytest.mark.slow
def test_rpt_at_several_positions_of_a_document(make_job: Callable[..., Job], pretrained: Job):
  job = make_job(RPT, start_from=str(pretrained.workdir), bindings=(
      'cfg.RPT.positions_per_document = 4', 'cfg.Train.num_steps = 3',
      'cfg.Rollouts.dump_every = 3'))
  done = job.run()
  assert done.returncode == 0, done.stderr
  assert max(r['mismatch'] for r in job.rows()[1:]) <= 1.01
  page = json.loads((job.workdir / 'rollouts' / '3.json').read_text())
  groups = page['groups'] if isinstance(page, dict) else page
  first = [g['prompt'] for g in groups[:4]]
  assert all(a == b[:len(a)] and len(a) < len(b) for a, b in zip(first, first[1:]))
