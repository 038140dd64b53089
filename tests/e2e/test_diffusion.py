"""A model of a game as real processes: learns, is killed and resumed, split, evaluated, refused."""

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

pytestmark = pytest.mark.slow
STEPS = 12
GAME = """
include 'gin/base_game.gin'
cfg.Trajectories.game = @cfg.Traveler()
cfg.Trajectories.num_frames = 12
cfg.Traveler.num_cells = 24
cfg.AdamW.schedule = @cfg.ConstantRate()
cfg.ConstantRate.learning_rate = 0.01
cfg.Train.num_steps = 12
cfg.Train.batch_size = 8
cfg.Train.eval_every = 6
cfg.Train.eval_batches = 1
cfg.Train.tensorboard = False
cfg.Checkpoint.every = 4
"""
WORLD = GAME + """
cfg.DiT.num_layers = 1
cfg.DiT.d_model = 32
cfg.DiT.d_ff = 64
cfg.DiT.num_heads = 2
cfg.DiT.patch = 8
cfg.DiT.logic = @cfg.LogicNet()
cfg.LogicNet.channels = 8
cfg.LogicNet.hidden = 16
"""


@pytest.fixture(scope='module')
def trained(make_job: Callable[..., Job]) -> Job:
  job = make_job(WORLD)
  done = job.run()
  assert done.returncode == 0, done.stdout + done.stderr
  return job


def test_it_learns_and_is_evaluated(trained: Job, capsys: pytest.CaptureFixture[str]):
  rows = trained.rows()
  assert rows[-1]['loss'] < 0.5 * rows[0]['loss']
  assert main(['eval', '--workdir', str(trained.workdir), '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['loss'] == pytest.approx(rows[-1]['validation/loss'], rel=1e-3)
  assert found.keys() >= {'readable', 'counters', 'objects', 'cells', 'new_cells', 'event_recall'}
  assert found['step'] == STEPS and 0 <= found['counters'] <= found['readable'] <= 1
  other = ['--gin_bindings', 'cfg.Trajectories.seed = 5']
  assert main(['eval', '--workdir', str(trained.workdir), '--json', *other]) == 0
  assert json.loads(capsys.readouterr().out)['loss'] != found['loss']


def test_killed_at_a_random_step_it_goes_on_bit_for_bit(
    make_job: Callable[..., Job], trained: Job):
  job = make_job(WORLD)
  code, output = job.run_until(random.SystemRandom().randint(1, STEPS - 2), signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  done = job.run()
  assert done.returncode == 0, done.stderr
  first, second = (jax.tree_util.tree_leaves_with_path(load_state(j.workdir))
                   for j in (job, trained))
  for (path, a), (_, b) in zip(first, second, strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
  rows, others = ([metrics.deterministic(r) for r in j.rows()] for j in (job, trained))
  assert rows == others and [r['step'] for r in rows] == list(range(1, STEPS + 1))


def test_on_eight_devices_and_in_micro_batches_the_losses_are_the_same(
    make_job: Callable[..., Job], trained: Job):
  job = make_job(WORLD, bindings=('cfg.Mesh.data = 2', 'cfg.Mesh.fsdp = 2', 'cfg.Mesh.tensor = 2',
                                  'cfg.Train.accumulation = 2'))
  job = dataclasses.replace(
      job, environment={**job.environment, 'XLA_FLAGS': xla_flags.with_devices(8)})
  done = job.run()
  assert done.returncode == 0, done.stderr
  for ours, theirs in zip(job.rows(), trained.rows(), strict=True):
    for name in ('loss', 'frame_loss', 'event_loss', 'validation/loss'):
      assert (name in ours) == (name in theirs)
      if name in ours:
        assert ours[name] == pytest.approx(theirs[name], rel=2e-3), (name, ours['step'])


@pytest.mark.parametrize('bindings', [
    ('cfg.DiT.quant = @cfg.Quant()', 'cfg.Quant.weights = "ternary"',
     'cfg.Quant.activations = "int8"', 'cfg.DiT.sub_norm = True'),
    ('cfg.Trajectories.game = @cfg.Pong()', 'cfg.Diffusion.process = @cfg.VDiffusion()'),
    ('cfg.Trajectories.game = @cfg.PacMan()', 'cfg.Diffusion.process = @cfg.Shortcut()',
     'cfg.DiT.step_sizes = 3', 'cfg.Conditions.values = False',
     'cfg.DiT.conditions = @cfg.Conditions()')], ids=['ternary', 'pong', 'pacman'])
def test_other_games_processes_and_weights_learn(make_job: Callable[..., Job], bindings):
  job = make_job(WORLD, bindings=bindings)
  done = job.run()
  assert done.returncode == 0, done.stderr
  rows = job.rows()
  assert np.mean([r['loss'] for r in rows[-3:]]) < np.mean([r['loss'] for r in rows[:3]])


def test_mistakes_are_one_sentence(trained: Job, make_job: Callable[..., Job], capfd, tmp_path):
  for argv, expected in (
      (['sample', '--workdir', str(trained.workdir), '--prompt', 'a'], 'draws frames and no text'),
      (['eval', '--workdir', str(trained.workdir), '--gin_bindings', 'cfg.Run.data = @cfg.Data()'],
       'cfg.Data'),
      ([*train_argv(trained), '--gin_bindings', 'cfg.Trajectories.game = @cfg.Pong()'],
       'Trajectories.game'),
      ([*train_argv(trained), '--gin_bindings', 'cfg.DiT.d_model = 64'], 'another model'),
      (['train', '--gin_file', 'gin/run/maag_tiny.gin', '--workdir', str(tmp_path / 'w'),
        '--gin_bindings', 'cfg.DiT.patch = 5'], 'DiT.patch = 5 does not divide')):
    assert expected in complaint(capfd, *argv), argv


VAE = GAME + """
cfg.Run.model = @cfg.VAE()
cfg.Run.objective = @cfg.Autoencoding()
cfg.VAE.base = 8
cfg.VAE.multipliers = [1, 1]
cfg.VAE.num_blocks = 1
"""
RECURRENT = WORLD + """
cfg.DiT.patch = 4
cfg.DiT.past = @cfg.Recurrent()
cfg.Recurrent.channels = 6
cfg.DiT.space = @cfg.VAE()
cfg.VAE.base = 8
cfg.VAE.multipliers = [1, 1]
cfg.VAE.num_blocks = 1
cfg.Diffusion.process = @cfg.VDiffusion()
cfg.Diffusion.vae_from = '{vae}'
"""


def test_the_recurrent_form_learns_in_the_latents_of_an_autoencoder(
    make_job: Callable[..., Job], trained: Job, capfd):
  coder = make_job(VAE)
  done = coder.run()
  assert done.returncode == 0, done.stderr
  rows = coder.rows()
  assert rows[-1]['frame_loss'] < 0.7 * rows[0]['frame_loss'] and 'validation/kl' in rows[-1]
  job = make_job(RECURRENT, vae=str(coder.workdir))
  code, output = job.run_until(6, signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  coder.workdir.rename(coder.workdir.with_name('moved'))  # A resumed run has its parameters.
  done = job.run()
  assert done.returncode == 0, done.stderr
  rows = job.rows()
  assert rows[-1]['loss'] < rows[0]['loss']
  coder.workdir.with_name('moved').rename(coder.workdir)
  ours, theirs = load_state(job.workdir).params['vae'], load_state(coder.workdir).params
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert main(['eval', '--workdir', str(job.workdir), '--json']) == 0
  assert main(['eval', '--workdir', str(coder.workdir), '--json']) == 0
  capfd.readouterr()
  for vae, bindings, expected in (
      (trained.workdir, (), 'holds a run of Diffusion'),
      (coder.workdir, ('cfg.VAE.base = 4',), 'give both the same sizes')):
    other = make_job(RECURRENT, vae=str(vae), bindings=bindings)
    assert expected in complaint(capfd, *train_argv(other, *bindings))
