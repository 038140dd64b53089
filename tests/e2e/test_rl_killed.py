"""RL with a verifier on the host, killed with SIGKILL inside each stage, ends bit-identical."""

from collections.abc import Callable
import dataclasses
import functools
import json
from pathlib import Path
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxrl_pt import checkpoint, metrics
from jaxrl_pt.jobs import replay
from jaxrl_pt.jobs.open import load_state
from jaxrl_pt.run.policy import load_policy
from tests import xla_flags
from tests.e2e.conftest import RL, RPT, Job

LAST = 8
# Stage, before or after it, and at which of its calls since the process started.
ON_POLICY = [('draw', 'after', 3), ('settle', 'before', 3), ('learn', 'after', 2),
             ('save', 'after', 1)]
ONE_STEP_OFF = [('settle', 'before', 3), ('learn', 'before', 3), ('save', 'before', 1)]
# What is under way must come back from the checkpoint, wherever the process died.
IN_FLIGHT = [('draw_in_flight', 'before', 2), ('draw_in_flight', 'after', 3),
             ('settle', 'before', 3), ('learn', 'after', 2), ('save', 'before', 1)]
OFF = ('cfg.Rollouts.mode = @cfg.OneStepOff()', 'cfg.RL.algorithm = @cfg.Algorithm()',
       'cfg.Algorithm.correction = @cfg.TokenTIS()',
       # A step that moves the policy far makes rollouts of the step before very stale.
       'cfg.Cosine.peak_rate = 0.002')

# Three batches of 16 responses are under way in 12 slots.
FLYING = ('cfg.Rollouts.mode = @cfg.InFlight()', 'cfg.InFlight.staleness = 2',
          'cfg.Rollouts.slots = @cfg.Slots()', 'cfg.Slots.slots = 12', 'cfg.Slots.page_size = 8',
          *OFF[1:])
# Two shards of the data, which share out prompts that come again by how long their responses were.
ON_SHARDS = 'cfg.Mesh.fsdp = 2', 'cfg.Arithmetic.size = 20'


def on_devices(number: int, make_job: Callable[..., Job], *args, **kwargs) -> Job:
  job = make_job(*args, **kwargs)
  return dataclasses.replace(job, environment={
      **job.environment, 'XLA_FLAGS': xla_flags.with_devices(number)})


def die(job: Job, stage: str, when: str, call: int) -> None:
  command = [sys.executable, '-m', 'tests.e2e.die_in_stage', stage, when, str(call),
             *job.command()[3:]]
  done = subprocess.run(command, env=job.environment, capture_output=True, text=True, timeout=600,
                        check=False)
  assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
  assert job.last_step() < LAST


def assert_replayed(workdir: Path, step: int) -> None:
  """Each half of a step, run alone from a checkpoint, repeats what the run did."""
  rows = replay.learner(workdir, step)
  assert [row['step'] for row in rows] == list(range(step + 1, LAST + 1))
  for row in rows:
    np.testing.assert_allclose(row['loss'], row['recorded_loss'], rtol=1e-4, atol=1e-6)
  text = json.loads((workdir / 'rollouts' / f'{step + 1}.json').read_text())
  assert len(text['groups']) == 4 and len(text['groups'][0]['responses']) == 4
  assert 'recorded_loss' in replay.text(rows)


def assert_drawn_again(workdir: Path, step: int) -> None:
  found = replay.sampler(workdir, step)
  assert found['same_tokens'] and found['largest_difference'] < 1e-4
  kept = json.loads((workdir / 'rollouts' / f'{step + 1}.json').read_text())
  rewards, kept_rewards = ([[r['reward'] for r in g['responses']] for g in groups]
                           for groups in (found['groups'], kept['groups']))
  assert rewards == kept_rewards
  assert 'the same tokens as' in replay.text(found)


@pytest.mark.slow
def test_rollouts_of_the_fused_program_are_those_of_the_stages(
    make_job: Callable[..., Job], pretrained: Job):
  """RPT's one program against draw, submit, settle and learn dispatched one by one."""
  job = make_job(RPT, start_from=str(pretrained.workdir), bindings=(
      'cfg.Train.num_steps = 8', 'cfg.Checkpoint.every = 4', 'cfg.Rollouts.dump_every = 1',
      'cfg.Rollouts.num_prompts = 4', 'cfg.Rollouts.group_size = 4'))
  done = job.run()
  assert done.returncode == 0, done.stderr
  assert_drawn_again(job.workdir, 4)
  assert_replayed(job.workdir, 4)


@pytest.mark.timeout(900)
@pytest.mark.parametrize('bindings, deaths', [
    pytest.param((), ON_POLICY, id='on_policy', marks=pytest.mark.slow),
    # By then a second checkpoint has begun, for which the first one must have been finished.
    pytest.param(OFF, [('learn', 'before', 6)], id='one_step_off', marks=pytest.mark.slow),
    pytest.param(OFF, ONE_STEP_OFF, id='one_step_off_often', marks=pytest.mark.slow),
    pytest.param(FLYING, IN_FLIGHT, id='in_flight', marks=pytest.mark.slow),
    pytest.param(ON_SHARDS, ON_POLICY, id='on_shards', marks=pytest.mark.slow),
    pytest.param(FLYING + ON_SHARDS, IN_FLIGHT, id='in_flight_on_shards',
                 marks=pytest.mark.slow)])
def test_killed_in_each_stage_is_bit_identical(
    make_job: Callable[..., Job], pretrained: Job, bindings, deaths):
  is_flying, is_sharded = set(FLYING) <= set(bindings), set(ON_SHARDS) <= set(bindings)
  if is_sharded:
    make_job = functools.partial(on_devices, 2, make_job)
  whole = make_job(RL, start_from=str(pretrained.workdir),
                   bindings=(*bindings, 'cfg.Rollouts.dump_every = 1'))
  done = whole.run()
  assert done.returncode == 0, done.stderr
  job = make_job(RL, start_from=str(pretrained.workdir), bindings=bindings)
  for death in deaths:
    die(job, *death)
  done = job.run()
  assert done.returncode == 0, done.stderr
  assert 'Resuming from step' in done.stdout
  one, other = (checkpoint._read_record(j.workdir / 'checkpoints', LAST)['leaves']
                for j in (job, whole))
  assert one == other  # The checksum of every array.
  if not (is_flying and is_sharded):  # A sampler of two shards has no place on one device.
    one, other = (load_state(j.workdir, LAST) for j in (job, whole))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  rows = [[metrics.deterministic(r) for r in j.rows()] for j in (job, whole)]
  assert rows[0] == rows[1] and len(rows[0]) == LAST + 1
  # It has learned something, so that equality says something.
  first, last = (load_policy(whole.workdir, step).params for step in (4, LAST))
  assert np.abs(np.asarray(first['embed']) - np.asarray(last['embed'])).max() > 0
  if not is_sharded:  # This process has one device.
    assert_replayed(whole.workdir, 4)
    if bindings != OFF:
      assert_drawn_again(whole.workdir, 4)
  if is_flying:
    assert sum(r['carried_responses'] for r in rows[1][1:]) > 0
    assert 1 <= max(r['most_versions_behind'] for r in rows[1][1:]) <= 2
  elif is_sharded:
    assert all(1 <= r['shard_imbalance'] <= 2 for r in rows[1][1:])
  is_off = is_flying or bindings == OFF
  name = 'staleness' if is_off else 'mismatch'
  assert all(1 <= r[name] < (2 if is_off else 1.01) for r in rows[1][1:])
