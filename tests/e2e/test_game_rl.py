"""A policy of a game as real processes: learns, is killed and resumed, evaluated, refused."""

from collections.abc import Callable
import dataclasses
import json
import random
import signal

import jax
import numpy as np
import pytest

from jaxrl_pt import metrics
from jaxrl_pt.jobs.open import load_state
from jaxrl_pt.main import main
from tests import xla_flags
from tests.e2e.conftest import Job
from tests.e2e.test_bad_input import complaint, train_argv
from tests.e2e.test_diffusion import GAME, WORLD

pytestmark = pytest.mark.slow
STEPS = 12
POLICY = GAME.replace('cfg.Train.eval_batches = 1\n', '') + """
cfg.Run.model = @cfg.GamePolicy()
cfg.Run.objective = @cfg.GameRL()
cfg.GamePolicy.channels = [4, 8]
cfg.GamePolicy.hidden = 16
cfg.GameRL.group_size = 4
cfg.GameRL.eval_games = 8
cfg.GameRL.algorithm = @cfg.Algorithm()
cfg.Algorithm.advantage = @cfg.ReinforcePlusPlus()
cfg.ReinforcePlusPlus.gamma = 0.9
cfg.Algorithm.aggregation = @cfg.TokenMean()
"""
INSIDE = POLICY + """
cfg.GameRL.place = @cfg.InsideModel()
cfg.InsideModel.model_from = '{model}'
cfg.Algorithm.advantage = @cfg.GAE()
cfg.Algorithm.surrogate = @cfg.PPOClip()
cfg.Algorithm.minibatches = 2
cfg.Algorithm.epochs = 2
cfg.Train.num_steps = 4
cfg.Train.eval_every = 2
cfg.Checkpoint.every = 1
"""


@pytest.fixture(scope='module')
def trained(make_job: Callable[..., Job]) -> Job:
  job = make_job(POLICY)
  done = job.run()
  assert done.returncode == 0, done.stdout + done.stderr
  return job


@pytest.fixture(scope='module')
def model(make_job: Callable[..., Job]) -> Job:
  job = make_job(WORLD)
  done = job.run()
  assert done.returncode == 0, done.stdout + done.stderr
  return job


def same_bits(one: Job, other: Job) -> None:
  states = (jax.tree_util.tree_leaves_with_path(load_state(job.workdir)) for job in (one, other))
  for (path, a), (_, b) in zip(*states, strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
  rows, others = ([metrics.deterministic(r) for r in job.rows()] for job in (one, other))
  assert rows == others


def test_it_learns_in_the_true_game_and_is_evaluated(
    trained: Job, capsys: pytest.CaptureFixture[str]):
  rows = [row for row in trained.rows() if row['step']]
  assert rows[-1]['reward'] > 1.5 * rows[0]['reward']
  for row in rows:
    assert row['reward'] == row['true_reward']
    assert row['unreadable'] == row['false_events'] == row['missed'] == 0
    assert row['mismatch'] == pytest.approx(1.0, abs=1e-4)
  assert main(['eval', '--workdir', str(trained.workdir), '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['step'] == STEPS
  assert found['return'] == pytest.approx(rows[-1]['validation/return'])
  assert found['sampled_return'] == pytest.approx(rows[-1]['validation/sampled_return'])
  assert found['return'] > found['random_return'] and 'model_return' not in found
  assert found['return_low'] <= found['return'] <= found['return_high'] <= 11
  other = ['--gin_bindings', 'cfg.Trajectories.seed = 5']
  assert main(['eval', '--workdir', str(trained.workdir), '--json', *other]) == 0
  assert json.loads(capsys.readouterr().out)['random_return'] != found['random_return']


def test_killed_at_a_random_step_it_goes_on_bit_for_bit(
    make_job: Callable[..., Job], trained: Job):
  job = make_job(POLICY)
  code, output = job.run_until(random.SystemRandom().randint(1, STEPS - 2), signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  done = job.run()
  assert done.returncode == 0, done.stderr
  same_bits(job, trained)


def test_on_four_devices_the_games_are_the_same(make_job: Callable[..., Job], trained: Job):
  job = make_job(POLICY, bindings=('cfg.Mesh.data = 2', 'cfg.Mesh.fsdp = 2',
                                   'cfg.Train.accumulation = 2'))
  job = dataclasses.replace(
      job, environment={**job.environment, 'XLA_FLAGS': xla_flags.with_devices(4)})
  done = job.run()
  assert done.returncode == 0, done.stderr
  # Later an action on the edge falls otherwise, and the games part.
  for ours, theirs in list(zip(job.rows(), trained.rows(), strict=True))[:4]:
    for name in ('reward', 'loss', 'grad_norm'):
      assert (name in ours) == (name in theirs)
      if name in ours:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (name, ours['step'])


@pytest.mark.parametrize('game', ['Pong', 'PacMan'])
def test_other_games_are_played(make_job: Callable[..., Job], game):
  job = make_job(POLICY, bindings=(f'cfg.Trajectories.game = @cfg.{game}()',
                                   'cfg.Train.num_steps = 3'))
  done = job.run()
  assert done.returncode == 0, done.stderr
  for row in job.rows():
    if row['step']:
      assert row['reward'] == row['true_reward'] and row['false_events'] == row['missed'] == 0


def test_inside_a_model_it_is_killed_and_goes_on_and_the_model_may_move(
    make_job: Callable[..., Job], model: Job, capsys: pytest.CaptureFixture[str]):
  whole, job = (make_job(INSIDE, model=str(model.workdir)) for _ in range(2))
  done = whole.run()
  assert done.returncode == 0, done.stderr
  code, output = job.run_until(random.SystemRandom().randint(1, 2), signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  done = job.run()
  assert done.returncode == 0, done.stderr
  same_bits(job, whole)
  assert main(['eval', '--workdir', str(job.workdir), '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['model_gap'] == pytest.approx(found['model_return'] - found['model_true_return'])
  assert 0 <= found['model_unreadable'] <= 1 and 0 <= found['model_false_events'] <= 1


def test_mistakes_are_one_sentence(trained: Job, model: Job, make_job: Callable[..., Job], capfd,
                                   tmp_path):
  inside = lambda *bindings, where=model.workdir: make_job(
      INSIDE, model=str(where), bindings=bindings)
  argv = lambda job: train_argv(job, *job.bindings)
  for command, expected in (
      (argv(inside(where=tmp_path / 'nowhere')), 'holds no config.gin'),
      (argv(inside(where=trained.workdir)), 'holds a run of GameRL'),
      (argv(inside('cfg.Trajectories.game = @cfg.Pong()')),
       'Pong in frames of 24x32 is asked for'),
      (argv(inside('cfg.Traveler.frame = "64x64"')), 'Traveler in frames of 64x64 is asked for'),
      (['sample', '--workdir', str(trained.workdir), '--prompt', 'a'], 'draws frames and no text'),
      ([*train_argv(trained), '--gin_bindings', 'cfg.Trajectories.game = @cfg.PacMan()'],
       'Trajectories.game'),
      ([*train_argv(trained), '--gin_bindings', 'cfg.GamePolicy.hidden = 8'],
       'made with other settings (GamePolicy.hidden'),
      ([*train_argv(trained), '--gin_bindings', 'cfg.Run.objective = @cfg.NextToken()'],
       'Run.model = @cfg.Model()')):
    assert expected in complaint(capfd, *command), command
