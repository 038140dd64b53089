"""A run of reinforcement learning with adapters: resumed, used, exported and gone on from."""

from collections.abc import Callable
import dataclasses
import io
import json
from pathlib import Path
import shutil

import jax
import numpy as np
import pytest

from jaxrl_pt import checkpoint, metrics
from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.interop import peft
from jaxrl_pt.jobs import open as jobs
from jaxrl_pt.main import main
from jaxrl_pt.models import adapters, transformer
from jaxrl_pt.run.policy import load_policy
from tests.e2e.conftest import RL, Job
from tests.e2e.test_supervised import PAIRS, SFT
from tests.e2e.test_turns import BINDINGS as DRAWN
from tests.e2e.test_turns import GUESSES

BINDINGS = (
    'cfg.Model.adapter = @cfg.LoRA()', 'cfg.LoRA.rank = 4', 'cfg.RL.algorithm = @cfg.Algorithm()',
    'cfg.Algorithm.kl = @cfg.KLInLoss()', 'cfg.KLInLoss.coef = 0.1', 'cfg.Train.num_steps = 4',
    'cfg.Cosine.peak_rate = 0.05')


def train(job: Job, workdir: Path, *bindings: str) -> int:
  flags = [flag for binding in (*job.bindings, *bindings) for flag in ('--gin_bindings', binding)]
  return main(['train', '--gin_file', str(job.gin_file), '--workdir', str(workdir), *flags])


@pytest.fixture(scope='module')
def adapted(make_job: Callable[..., Job], pretrained: Job) -> Job:
  job = make_job(RL, bindings=BINDINGS, start_from=str(pretrained.workdir))
  assert train(job, job.workdir) == 0
  return job


def test_a_run_keeps_one_frozen_packed_base_and_trains_its_adapters(adapted: Job, pretrained: Job):
  state = jobs.load_state(adapted.workdir)
  trained = load_policy(adapted.workdir)
  specs = trained.model.specs
  start = load_policy(pretrained.workdir).params
  at_first = jax.jit(lambda start: adapters.adapt(specs, start, jax.random.key(3)))(start)
  jax.tree.map(lambda now, then: np.testing.assert_allclose(
      now.astype(float), then.astype(float), rtol=1e-6),
               P.frozen(specs, state.params), P.frozen(specs, at_first))
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), P.trained(specs, state.params),
                         P.trained(specs, at_first))
  assert all(jax.tree.leaves(changed))
  assert state.params['layers']['wq'].base.codes.dtype == 'int2'
  num = P.count(P.trained(specs, specs))
  assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * num
  rows = metrics.read_rows(adapted.workdir / metrics.FILE)
  kl = [row['kl'] for row in rows if 'kl' in row]
  assert kl[0] == pytest.approx(0, abs=1e-5) and kl[-1] > 1e-4  # From the base, without a copy.


def test_a_resumed_run_ends_with_the_same_bits(adapted: Job, tmp_path: Path):
  workdir = tmp_path / 'again'
  shutil.copytree(adapted.workdir, workdir)
  shutil.rmtree(workdir / 'checkpoints' / '4')
  assert checkpoint.steps(workdir / 'checkpoints') == [2]
  assert train(adapted, workdir) == 0
  jax.tree.map(np.testing.assert_array_equal, jobs.load_state(workdir),
               jobs.load_state(adapted.workdir))
  rows = [[metrics.deterministic(row) for row in metrics.read_rows(w / metrics.FILE)]
          for w in (workdir, adapted.workdir)]
  assert rows[0] == rows[1]


@pytest.mark.slow
def test_every_command_takes_its_work_directory(adapted: Job, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str],
                                                monkeypatch: pytest.MonkeyPatch):
  workdir = ['--workdir', str(adapted.workdir)]
  drawn = []
  for held in ((), ('--packed',)):
    capsys.readouterr()
    assert main(['sample', '--prompt', '1+1', '--num_tokens', '3', '--json', *held, *workdir]) == 0
    drawn.append(json.loads(capsys.readouterr().out))
  assert drawn[0] == drawn[1]
  monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(b'1+1\n')))
  assert main(['chat', '--num_tokens', '3', *workdir]) == 0
  assert '(3 tokens' in capsys.readouterr().out
  assert main(['eval', *workdir, '--json']) == 0
  assert main(['replay', '--only', 'sampler', '--step', '2', *workdir]) == 0
  assert main(['export', str(tmp_path / 'adapter'), '--format', 'peft', *workdir]) == 0
  policy = load_policy(adapted.workdir)
  folder = tmp_path / 'adapter'
  assert peft.read_settings(folder) == cfg.LoRA(4)
  loaded = peft.load(folder, policy.model.specs, policy.session.mesh)
  jax.tree.map(np.testing.assert_array_equal, loaded, P.trained(policy.model.specs, policy.params))
  plain = transformer.build(dataclasses.replace(policy.model.config, adapter=cfg.NoAdapter()))
  assert P.num_bytes(policy.model.specs) < P.num_bytes(plain.specs) / 1.5


def test_another_rank_is_another_model(adapted: Job, capsys: pytest.CaptureFixture[str]):
  capsys.readouterr()
  assert train(adapted, adapted.workdir, 'cfg.LoRA.rank = 2') == 2
  assert 'LoRA.rank is 4 in the checkpoint and 2 in this run' in capsys.readouterr().err
  assert train(adapted, adapted.workdir, 'cfg.LoRA.alpha = 8.0') == 2
  assert 'add --allow_changes LoRA.alpha' in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_goes_on_from_the_adapters_of_another(adapted: Job, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]):
  start = f"cfg.RL.start_from = '{adapted.workdir}'"
  assert train(adapted, tmp_path / 'plain', start, 'cfg.Model.adapter = @cfg.NoAdapter()') == 2
  err = capsys.readouterr().err
  assert 'set Model.adapter to go on with its adapters, or merge them' in err
  assert not (tmp_path / 'plain').exists()
  assert train(adapted, tmp_path / 'next', start, 'cfg.Train.num_steps = 2') == 0
  rows = metrics.read_rows(tmp_path / 'next' / metrics.FILE)
  # The reference policy has the adapters that the run began with.
  assert next(row['kl'] for row in rows if 'kl' in row) < 1e-2
  specs = load_policy(adapted.workdir).model.specs
  before, after = (P.frozen(specs, load_policy(w).params)
                   for w in (adapted.workdir, tmp_path / 'next'))
  jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
@pytest.mark.parametrize('text, bindings', [
    (RL, ('cfg.Rollouts.mode = @cfg.InFlight()', 'cfg.Rollouts.slots = @cfg.Slots()',
          'cfg.Slots.slots = 4', 'cfg.Algorithm.correction = @cfg.TokenTIS()')),
    (RL, ('cfg.Rollouts.mode = @cfg.OneStepOff()', 'cfg.Algorithm.correction = @cfg.TokenTIS()')),
    (GUESSES, DRAWN),
], ids=['in flight', 'one step off', 'several turns'])
def test_every_way_of_drawing_takes_adapters(pretrained: Job, make_job: Callable[..., Job],
                                             text: str, bindings: tuple[str, ...]):
  job = make_job(text, bindings=BINDINGS, start_from=str(pretrained.workdir))
  assert train(job, job.workdir, 'cfg.Train.num_steps = 2', *bindings) == 0
  specs = load_policy(job.workdir).model.specs
  rows = metrics.read_rows(job.workdir / metrics.FILE)
  assert len(rows) > 1 and jobs.load_state(job.workdir).step == 2
  own = P.trained(specs, jobs.load_state(job.workdir).params)
  assert any(np.asarray(x).any() for x in jax.tree.leaves(own))


@pytest.mark.parametrize('objective', [
    'SFT', 'DPO', pytest.param('RewardModel', marks=pytest.mark.slow)])  # It opens as DPO does.
def test_supervised_stages_train_adapters_alone(pretrained: Job, make_job: Callable[..., Job],
                                                tmp_path: Path, objective: str):
  path = tmp_path / 'rows.jsonl'
  rows = [{'prompt': f'say {i % 50}: ', 'completion': f'{i % 50}!'} if objective == 'SFT' else
          {'prompt': f'say {i % 50}: ', 'chosen': f'{i % 50}!', 'rejected': 'no'}
          for i in range(120)]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  text = SFT if objective == 'SFT' else PAIRS
  job = make_job(text, start_from=str(pretrained.workdir), rows=str(path), objective=objective)
  bindings = ('cfg.Model.adapter = @cfg.LoRA()', 'cfg.LoRA.rank = 4', 'cfg.Train.num_steps = 6',
              'cfg.Train.eval_every = 6', 'cfg.Checkpoint.every = 6')
  assert train(job, job.workdir, *bindings) == 0
  state, policy = jobs.load_state(job.workdir), load_policy(job.workdir)
  specs = policy.model.specs
  own, base = (part(specs, state.params) for part in (P.trained, P.frozen))
  assert all(np.asarray(x).any() for x in jax.tree.leaves(own))
  start = load_policy(pretrained.workdir).params
  at_first = jax.jit(lambda start: adapters.adapt(specs, start, jax.random.key(3)))(start)
  jax.tree.map(lambda now, then: np.testing.assert_allclose(
      now.astype(float), then.astype(float), rtol=1e-6), base, P.frozen(specs, at_first))
  assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * sum(
      x.size for x in jax.tree.leaves(own))
  found = metrics.read_rows(job.workdir / metrics.FILE)
  assert found[-1]['validation/loss'] < found[0]['validation/loss']
