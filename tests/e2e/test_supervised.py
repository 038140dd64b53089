"""Supervised stages as real processes: killed and resumed bit for bit, on any number of devices."""

from collections.abc import Callable
import dataclasses
import json
from pathlib import Path
import random
import shutil
import signal

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings, metrics
from jaxrl_pt.jobs.open import load_state
from jaxrl_pt.main import main
from jaxrl_pt.run import start
from tests import xla_flags
from tests.e2e.conftest import PRETRAIN, Job
from tests.e2e.test_bad_input import complaint, train_argv

STEPS = 24
_SHORT = PRETRAIN.replace('cfg.Train.num_steps = 60', f'cfg.Train.num_steps = {STEPS}').replace(
    'cfg.Checkpoint.every = 10', 'cfg.Checkpoint.every = 4').replace(
        'cfg.Train.eval_every = 15', 'cfg.Train.eval_every = 12').replace(
            'cfg.Data.source = @cfg.TextFiles()', "cfg.Data.long_documents = 'cut'").replace(
                "cfg.TextFiles.glob = '{corpus}/*.txt'\n", '').replace(
                    'cfg.Data.tokenizer = @cfg.Bytes()',
                    'cfg.Data.tokenizer = @cfg.PolicyTokenizer()')
SFT = _SHORT.replace('cfg.Run.objective = @cfg.NextToken()', """
cfg.Run.objective = @cfg.SFT()
cfg.SFT.start_from = '{start_from}'
cfg.SFT.loss = 'sum'
cfg.Data.source = @cfg.WeightedConversations()
cfg.WeightedConversations.sources = [@cfg.Conversations(), @cfg.Demonstrations()]
cfg.WeightedConversations.weights = [1.0, 0.5]
cfg.Conversations.glob = '{rows}'
cfg.Demonstrations.source = @cfg.Arithmetic()
cfg.Arithmetic.size = 300
""")


_SPLIT = ('cfg.Mesh.data = 2', 'cfg.Mesh.fsdp = 2', 'cfg.Mesh.tensor = 1', 'cfg.Mesh.context = 2',
          'cfg.Train.accumulation = 2')


def on_eight_devices(job: Job) -> Job:
  return dataclasses.replace(
      job, environment={**job.environment, 'XLA_FLAGS': xla_flags.with_devices(8)})


def same_run(one: Job, other: Job) -> None:
  first, second = (jax.tree_util.tree_leaves_with_path(load_state(j.workdir))
                   for j in (one, other))
  for (path, a), (_, b) in zip(first, second, strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
  rows, others = ([metrics.deterministic(r) for r in j.rows()] for j in (one, other))
  assert rows == others and [r['step'] for r in rows] == list(range(STEPS + 1))


def same_metrics(one: Job, other: Job, names: tuple[str, ...], **tolerance: float) -> None:
  """Both runs have the same rows with about the same metrics."""
  for ours, theirs in zip(one.rows(), other.rows(), strict=True):
    for name in names:
      assert (name in ours) == (name in theirs)
      if name in ours:
        assert ours[name] == pytest.approx(theirs[name], **tolerance), (name, ours['step'])


@pytest.fixture(scope='module')
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
  path = tmp_path_factory.mktemp('rows') / 'rows.jsonl'
  path.write_text(''.join(json.dumps({'prompt': f'say {i % 50}: ', 'completion': f'{i % 50}!'})
                          + '\n' for i in range(300)))
  return path


@pytest.fixture(scope='module')
def tuned(make_job: Callable[..., Job], pretrained: Job, conversations: Path) -> Job:
  job = make_job(SFT, start_from=str(pretrained.workdir), rows=str(conversations))
  done = job.run()
  assert done.returncode == 0, done.stdout + done.stderr
  return job


def test_sft_learns(tuned: Job):
  rows = tuned.rows()
  assert rows[0]['step'] == 0  # The start policy is measured too.
  assert rows[-1]['validation/loss'] < rows[0]['validation/loss'] - 0.3


@pytest.mark.slow  # The same job is killed with pairs below, and its loader in `test_mixture.py`.
def test_sft_killed_at_a_random_step_is_bit_identical(
    make_job: Callable[..., Job], pretrained: Job, tuned: Job, conversations: Path):
  job = make_job(SFT, start_from=str(pretrained.workdir), rows=str(conversations))
  code, output = job.run_until(random.SystemRandom().randint(1, STEPS - 4), signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  done = job.run()
  assert done.returncode == 0, done.stderr
  same_run(job, tuned)


@pytest.mark.slow
def test_sft_on_eight_devices_and_in_micro_batches_gives_the_same_losses(
    make_job: Callable[..., Job], pretrained: Job, tuned: Job, conversations: Path):
  job = on_eight_devices(make_job(SFT, start_from=str(pretrained.workdir), rows=str(conversations),
                                  bindings=_SPLIT))
  done = job.run()
  assert done.returncode == 0, done.stderr
  same_metrics(job, tuned, ('loss', 'validation/loss'), rel=2e-3)


def test_a_tuned_policy_is_evaluated_sampled_and_started_from(
    tuned: Job, capsys: pytest.CaptureFixture[str]):
  workdir = str(tuned.workdir)
  assert main(['eval', '--workdir', workdir, '--json']) == 0
  whole = json.loads(capsys.readouterr().out)
  assert whole['loss'] < 3 and whole['bits_per_byte'] > 0
  assert main(['sample', '--workdir', workdir, '--prompt', 'say 7: ', '--num_tokens', '4']) == 0


def test_the_flag_start_from_keeps_the_data_of_a_stage(
    make_job: Callable[..., Job], pretrained: Job, conversations: Path):
  job = make_job(SFT, start_from='elsewhere', rows=str(conversations))
  given = ['cfg.Model.d_ff = 7']  # Of another model than the policy's.
  taken = start.bindings(pretrained.workdir, [str(job.gin_file)], given)
  run, _ = gin_bindings.load([str(job.gin_file)], taken)
  assert run.objective.start_from == str(pretrained.workdir) and run.model.d_ff == 64
  assert run.data.tokenizer == cfg.PolicyTokenizer()
  assert isinstance(run.data.source, cfg.WeightedConversations)


@pytest.mark.parametrize('binding, expected', [
    ("cfg.SFT.start_from = 'nowhere'", 'nowhere holds no config.gin'),
    ("cfg.Conversations.glob = 'no.jsonl'", 'No file matches'),
    ('cfg.Model.d_ff = 32', 'Model.d_ff = 32, but the policy in'),
])
def test_wrong_settings(make_job: Callable[..., Job], pretrained: Job, conversations: Path,
                        capsys: pytest.CaptureFixture[str], binding: str, expected: str):
  job = make_job(SFT, start_from=str(pretrained.workdir), rows=str(conversations))
  assert expected in complaint(capsys, *train_argv(job, binding))


def test_another_start_policy_is_refused_on_resume(
    make_job: Callable[..., Job], tuned: Job, conversations: Path,
    capsys: pytest.CaptureFixture[str]):
  job = Job(tuned.gin_file, tuned.workdir, tuned.environment)
  line = complaint(capsys, *train_argv(job, f"cfg.SFT.start_from = '{tuned.workdir}'",
                                       f'cfg.Train.num_steps = {STEPS + 1}'))
  assert 'The policy in start_from is not the one' in line


# --- Preferences ------------------------------------------------------------------

PAIRS = _SHORT.replace('cfg.Run.objective = @cfg.NextToken()', """
cfg.Run.objective = @cfg.{objective}()
cfg.{objective}.start_from = '{start_from}'
cfg.Data.source = @cfg.Preferences()
cfg.Preferences.glob = '{rows}'
""").replace('cfg.Cosine.peak_rate = 0.01', 'cfg.Cosine.peak_rate = 0.002').replace(
    'cfg.Train.eval_batches = 2', 'cfg.Train.eval_batches = 0')


@pytest.fixture(scope='module')
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
  path = tmp_path_factory.mktemp('rows') / 'pairs.jsonl'
  path.write_text(''.join(
      json.dumps({'prompt': f'say {i}: ', 'chosen': 'good word', 'rejected': 'bad byte'}) + '\n'
      for i in range(200)))
  return path


def check_eval(job: Job, start: Job, objective: str, capsys: pytest.CaptureFixture[str],
               tmp_path: Path) -> None:
  """`eval` finds what the run found of all held-out pairs, and measures others too."""
  def found(*bindings: str) -> dict:
    capsys.readouterr()
    given = [flag for text in bindings for flag in ('--gin_bindings', text)]
    assert main(['eval', '--workdir', str(job.workdir), '--json', *given]) == 0
    return json.loads(capsys.readouterr().out)

  own, row = found(), job.rows()[-1]
  assert own['step'] == STEPS and 0 < own['num_pairs'] < 60
  for name, value in row.items():
    if name.startswith('validation/'):
      assert own[name.removeprefix('validation/')] == pytest.approx(value, rel=1e-5)
  turned = tmp_path / 'turned.jsonl'
  glob = f"cfg.Preferences.glob = '{turned}'"
  rows = [json.dumps({'prompt': f'say {i}: ', 'chosen': 'bad byte', 'rejected': 'good word'}) + '\n'
          for i in range(100)]
  turned.write_text(''.join(rows))
  others = found(glob)
  assert others['accuracy'] == 0 and others['margin'] < -0.05
  if objective == 'DPO':
    away = start.workdir.with_name('away')
    start.workdir.rename(away)
    assert found() == own  # What it says of the run's own pairs is known.
    shutil.copytree(job.workdir, start.workdir)
    turned.write_text(''.join(rows[:90]))
    assert 'is not the one that this run started from' in complaint(
        capsys, 'eval', '--workdir', str(job.workdir), '--gin_bindings', glob)
    shutil.rmtree(start.workdir)
    away.rename(start.workdir)


@pytest.mark.slow
@pytest.mark.parametrize('objective', ['DPO', 'RewardModel'])
def test_preferences_are_learned_and_a_killed_run_is_bit_identical(
    make_job: Callable[..., Job], pretrained: Job, preferences: Path, objective: str,
    capsys: pytest.CaptureFixture[str], tmp_path: Path):
  fields = {'start_from': str(pretrained.workdir), 'rows': str(preferences),
            'objective': objective}
  whole, job = make_job(PAIRS, **fields), make_job(PAIRS, **fields)
  done = whole.run()
  assert done.returncode == 0, done.stdout + done.stderr
  rows = whole.rows()
  assert rows[-1]['validation/accuracy'] == 1 and rows[-1]['validation/margin'] > 0.05
  check_eval(whole, pretrained, objective, capsys, tmp_path)
  if objective == 'DPO':  # Before the first step the policy is its own reference.
    assert rows[0]['validation/loss'] == pytest.approx(np.log(2), abs=1e-3)
  code, output = job.run_until(random.SystemRandom().randint(1, STEPS - 4), signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  done = job.run()
  assert done.returncode == 0, done.stderr
  same_run(job, whole)
  score = ('score', '--workdir', str(whole.workdir), str(tmp_path / 'rows.jsonl'))
  (tmp_path / 'rows.jsonl').write_text(''.join(
      json.dumps({'prompt': 'say 7: ', 'completion': text}) + '\n'
      for text in ('good word', 'bad byte')))
  if objective == 'DPO':
    assert 'holds a run of DPO' in complaint(capsys, *score)
    return
  assert main(score) == 0
  good, bad = map(json.loads, capsys.readouterr().out.splitlines())
  assert good['reward'] > bad['reward'] and good['place'].endswith('rows.jsonl:1')
  assert good['tokens'] == len('say 7: good word') + 2


@pytest.mark.slow
@pytest.mark.parametrize('objective', ['DPO', 'RewardModel'])
@pytest.mark.parametrize('adapter', [
    (), ('cfg.Model.adapter = @cfg.LoRA()', 'cfg.LoRA.rank = 4')], ids=['whole', 'adapters'])
def test_pairs_on_eight_devices_and_in_micro_batches_give_the_same_losses(
    make_job: Callable[..., Job], pretrained: Job, preferences: Path, objective: str,
    adapter: tuple[str, ...]):
  fields = {'start_from': str(pretrained.workdir), 'rows': str(preferences),
            'objective': objective}
  short = ('cfg.Train.num_steps = 6', 'cfg.Train.eval_every = 6', *adapter)
  one = make_job(PAIRS, bindings=short, **fields)
  split = on_eight_devices(make_job(PAIRS, bindings=(*short, *_SPLIT), **fields))
  for job in (one, split):
    done = job.run()
    assert done.returncode == 0, done.stderr
  assert one.rows()[-1]['loss'] < one.rows()[1]['loss']
  same_metrics(split, one, ('loss', 'margin', 'validation/loss', 'validation/margin'), rel=5e-3,
               abs=2e-4)
