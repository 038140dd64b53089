"""RL on episodes of several turns as real processes: resumed, replayed, refused."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from jaxrl_pt import checkpoint, metrics
from jaxrl_pt.jobs.open import load_state
from jaxrl_pt.rollouts import record
from tests.e2e.conftest import RL, Job
from tests.e2e.test_rl_killed import LAST, assert_drawn_again, assert_replayed, die, on_devices

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# A guess is one byte. Three guesses and their answers fit into a response, so that rows of one, two
# and three turns stand in one batch.
GUESSES = RL.replace('cfg.RL.verifier = @cfg.LengthVerifier()', """
cfg.RL.verifier = @cfg.Interactive()
cfg.Interactive.environment = @cfg.GuessNumber()
cfg.Interactive.max_turns = 3
cfg.Interactive.turn_tokens = 2
cfg.Interactive.observation_tokens = 8
cfg.Interactive.template = @cfg.ChatTemplate()
cfg.ChatTemplate.opening = ''
cfg.ChatTemplate.user = '{{content}}|'
cfg.ChatTemplate.ending = '|'
cfg.GuessNumber.low = 0
cfg.GuessNumber.high = 2
cfg.GuessNumber.max_guesses = 3
""").replace('cfg.LengthVerifier.min_chars = 2\ncfg.LengthVerifier.max_chars = 9', '').replace(
    'cfg.Rollouts.prompt_len = 16', 'cfg.Rollouts.prompt_len = 200').replace(
        'cfg.Rollouts.response_tokens = 8', 'cfg.Rollouts.response_tokens = 60').replace(
            '@cfg.Arithmetic()', '@cfg.NumberedGames()').replace(
                'cfg.Arithmetic.size', 'cfg.NumberedGames.size')
# Digits alone, and most guesses wrong.
DIGITS = f'cfg.Sampler.banned = {tuple(t for t in range(257) if not 48 <= t < 54)}'
BINDINGS = ('cfg.Rollouts.sampler = @cfg.Sampler()', DIGITS, 'cfg.Rollouts.dump_every = 1')


@pytest.fixture(scope='module')
def whole(make_job: Callable[..., Job], pretrained: Job) -> Job:
  job = make_job(GUESSES, start_from=str(pretrained.workdir), bindings=BINDINGS)
  done = job.run()
  assert done.returncode == 0, done.stderr
  return job


def test_a_run_learns_evaluates_and_is_replayed(whole: Job):
  rows = whole.rows()
  assert len(rows) == LAST + 1
  assert {'validation/turns', 'validation/reward', 'validation/accuracy_argmax'} <= set(rows[-1])
  for row in rows[1:]:
    assert 1 <= row['mismatch'] <= 1 + 1e-4 and row['verified'] == 1
    assert 1 < row['turns'] < 3 and row['observation_tokens'] > 0
    assert row['outcome/ok'] == 1 and 0 < row['guesses'] <= row['turns']
  assert any(0 < row['reward'] < 1 for row in rows[1:])
  first, last = (load_state(whole.workdir, step).params['embed'] for step in (4, LAST))
  assert np.abs(np.asarray(first) - np.asarray(last)).max() > 0
  assert_replayed(whole.workdir, 4)
  assert_drawn_again(whole.workdir, 4)


def test_a_run_that_was_killed_goes_on_to_the_bit(make_job: Callable[..., Job], pretrained: Job,
                                                  whole: Job):
  job = make_job(GUESSES, start_from=str(pretrained.workdir), bindings=BINDINGS)
  for death in (('draw_verified', 'after', 3), ('settle', 'before', 3), ('learn', 'after', 2)):
    die(job, *death)
  done = job.run()
  assert done.returncode == 0 and 'Resuming from step' in done.stdout, done.stderr
  one, other = (load_state(j.workdir, LAST) for j in (job, whole))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  rows = [[metrics.deterministic(r) for r in j.rows()] for j in (job, whole)]
  assert rows[0] == rows[1]


def test_on_a_mesh_a_killed_run_goes_on_and_begins_with_the_tokens_of_one_device(
    make_job: Callable[..., Job], pretrained: Job, whole: Job):
  sharded, job = (on_devices(4, make_job, GUESSES, start_from=str(pretrained.workdir), bindings=(
      *BINDINGS, 'cfg.Mesh.data = 2', 'cfg.Mesh.fsdp = 2')) for _ in range(2))
  done = sharded.run()
  assert done.returncode == 0, done.stderr
  die(job, 'draw_verified', 'after', 3)
  done = job.run()
  assert done.returncode == 0 and 'Resuming from step' in done.stdout, done.stderr
  one, other = (checkpoint._read_record(j.workdir / 'checkpoints', LAST)['leaves']
                for j in (job, sharded))
  assert one == other  # The checksum of every array.
  rows = [[metrics.deterministic(r) for r in j.rows()] for j in (job, sharded)]
  assert rows[0] == rows[1] and len(rows[0]) == LAST + 1
  assert all(1 <= row['mismatch'] <= 1 + 1e-4 and row['verified'] == 1 for row in rows[0][1:])
  first, alone = (record.load(j.workdir / 'rollouts' / '1.npz')[1] for j in (sharded, whole))
  np.testing.assert_array_equal(first.tokens, alone.tokens)
  np.testing.assert_allclose(first.logp, alone.logp, atol=1e-4)
