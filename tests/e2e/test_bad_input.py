"""Every mistake of a user: one sentence that names it, exit code 2, nothing lost."""

from collections.abc import Callable
import os
from pathlib import Path
import resource
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

from jaxrl_pt import checkpoint
from jaxrl_pt.jobs.open import load_state
from jaxrl_pt.main import main
from tests.e2e.conftest import RL, RPT, Job


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
  """The one line that a mistake prints."""
  code = main(argv)
  err = capsys.readouterr().err
  lines = [line for line in err.splitlines() if line.startswith('jaxrl-pt: ')]
  assert code == 2, err
  assert len(lines) == 1, err
  assert 'Traceback' not in err
  return lines[0]


def train_argv(job: Job, *bindings: str) -> list[str]:
  return ['train', '--gin_file', str(job.gin_file), '--workdir', str(job.workdir),
          *(flag for b in bindings for flag in ('--gin_bindings', b))]


@pytest.mark.parametrize(('binding', 'expected'), [
    ('cfg.Model.d_modle = 64', ['d_modle', 'd_model']),
    ('cfg.Modle.d_model = 64', ['Modle', 'Model']),
    ("cfg.Model.d_model = 'wide'", ['Model.d_model', "'wide'", 'whole number']),
    ('cfg.Train.batch_size = 0', ['Train.batch_size', '0', 'at least 1']),
    ('cfg.Data.validation_fraction = 0.9', ['Data.validation_fraction', '0.9', '0.5']),
    ('cfg.Model.num_kv_heads = 3', ['num_kv_heads', 'multiple']),
    ('cfg.Quant.hadamard = 1', ['Quant.hadamard', 'True or False']),
    ('cfg.Run.objective = @cfg.Sampler()', ['Run.objective', 'NextToken']),
    ("cfg.TextFiles.glob = '/nowhere/*.txt'", ['/nowhere/*.txt']),
    ('cfg.Mesh.tensor = 3', ['tensor', '3']),
    ('cfg.Model.vocab_size = 256', ['257', 'Model.vocab_size', '256']),
    ("cfg.Data.long_documents = 'error'", ['32', 'long_documents']),
    ('cfg.Train.batch_size = 4096', ['4096']),
])
def test_a_wrong_setting(make_job: Callable[..., Job], capsys: pytest.CaptureFixture[str],
                         binding: str, expected: list[str]):
  line = complaint(capsys, *train_argv(make_job(), binding))
  for part in expected:
    assert part in line, line


@pytest.mark.parametrize(('binding', 'expected'), [
    ('cfg.Cosine.peak_rate = 1e309', 'beyond what 64 bits can express'),
    ('cfg.Rollouts.response_tokens = 2147483648', 'would take at least 128 GiB'),
    ('cfg.Arithmetic.size = 9223372036854775808', 'at most 10000000'),
    ('cfg.VerifierPool.wall_seconds = 1e308', 'from 0.01 to 86400'),
])
def test_a_value_at_the_edge_in_a_process_of_its_own(make_job: Callable[..., Job], binding: str,
                                                     expected: str):
  job = make_job(RL, start_from='nowhere', bindings=(binding,))
  done = job.run()
  assert done.returncode == 2 and expected in done.stderr and 'Traceback' not in done.stderr
  assert not job.workdir.exists()


def test_several_hosts_without_a_cluster(make_job: Callable[..., Job]):
  job = make_job()
  outside = {name: value for name, value in job.environment.items()
             if not name.startswith(('SLURM_', 'OMPI_', 'JAX_COORDINATOR', 'KUBERNETES_'))}
  done = subprocess.run([*job.command(), '--multihost'], env=outside, capture_output=True,
                        text=True, timeout=120, check=False)
  assert done.returncode == 2
  assert done.stderr.count('jaxrl-pt: --multihost found no cluster to join') == 1
  assert 'Traceback' not in done.stderr and not job.workdir.exists()


def test_a_missing_gin_file(capsys: pytest.CaptureFixture[str], tmp_path: Path):
  line = complaint(capsys, 'train', '--gin_file', 'gin/run/pretrain_tinny.gin', '--workdir',
                   str(tmp_path))
  assert 'pretrain_tinny' in line and 'pretrain_tiny.gin' in line


def test_an_unreadable_file(make_job: Callable[..., Job], capsys: pytest.CaptureFixture[str],
                            tmp_path: Path):
  (tmp_path / 'a.txt').mkdir()
  line = complaint(capsys, *train_argv(make_job(), f"cfg.TextFiles.glob = '{tmp_path}/a.txt'"))
  assert 'a.txt' in line


def test_a_file_that_is_not_utf8(make_job: Callable[..., Job],
                                 capsys: pytest.CaptureFixture[str], tmp_path: Path):
  (tmp_path / 'good.txt').write_text('text ' * 50)
  (tmp_path / 'latin.txt').write_bytes('naïve café'.encode('latin-1'))
  line = complaint(capsys, *train_argv(make_job(), f"cfg.TextFiles.glob = '{tmp_path}/*.txt'"))
  assert 'latin.txt' in line and 'UTF-8' in line


def test_an_unwritable_work_directory(make_job: Callable[..., Job],
                                      capsys: pytest.CaptureFixture[str], tmp_path: Path):
  """Below a regular file: also for root, whom permissions do not stop."""
  (tmp_path / 'file').write_text('')
  argv = ['train', '--gin_file', str(make_job().gin_file), '--workdir',
          str(tmp_path / 'file' / 'work')]
  assert 'cannot be written' in complaint(capsys, *argv)


def test_no_run_in_the_work_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path):
  for command in ('eval', 'sample'):
    prompt = ['--prompt', 'x'] if command == 'sample' else []
    assert str(tmp_path) in complaint(capsys, command, '--workdir', str(tmp_path), *prompt)


def copy_of(job: Job, tmp_path: Path) -> Job:
  workdir = tmp_path / 'work'
  shutil.copytree(job.workdir, workdir)
  return Job(job.gin_file, workdir, job.environment)


def state_bytes(workdir: Path) -> list[bytes]:
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(load_state(workdir))]


def settings(job: Job) -> str:
  return (job.workdir / 'config.gin').read_text()


def test_a_checkpoint_of_another_model(pretrained: Job, capsys: pytest.CaptureFixture[str],
                                       tmp_path: Path):
  job = copy_of(pretrained, tmp_path)
  line = complaint(capsys, *train_argv(job, 'cfg.Model.d_ff = 96', 'cfg.Train.num_steps = 90'))
  assert 'another model' in line and '64' in line and '96' in line
  assert settings(job) == settings(pretrained)
  assert checkpoint.steps(job.workdir / 'checkpoints') == checkpoint.steps(
      pretrained.workdir / 'checkpoints')


def test_a_tokenizer_that_does_not_match_the_checkpoint(
    pretrained: Job, capsys: pytest.CaptureFixture[str], tmp_path: Path):
  """The same vocabulary size with other pieces: only the fingerprint can tell."""
  job = copy_of(pretrained, tmp_path)
  line = complaint(capsys, *train_argv(
      job, 'cfg.Data.tokenizer = @cfg.TrainedBPE()', 'cfg.TrainedBPE.vocab_size = 257'))
  assert 'tokenizer' in line.lower()
  assert state_bytes(pretrained.workdir)  # the original is as it was


def test_a_work_directory_of_another_objective(
    pretrained: Job, make_job: Callable[..., Job], capsys: pytest.CaptureFixture[str],
    tmp_path: Path):
  taken = copy_of(pretrained, tmp_path)
  job = make_job(RPT, start_from=str(pretrained.workdir))
  line = complaint(capsys, *train_argv(Job(job.gin_file, taken.workdir, job.environment)))
  assert 'holds a run of NextToken' in line and 'RPT' in line and str(taken.workdir) in line
  assert settings(taken) == settings(pretrained)
  assert state_bytes(taken.workdir) == state_bytes(pretrained.workdir)


def test_a_policy_of_another_shape(pretrained: Job, make_job: Callable[..., Job],
                                   capsys: pytest.CaptureFixture[str]):
  job = make_job(RPT, start_from=str(pretrained.workdir))
  line = complaint(capsys, *train_argv(job, "cfg.Quant.activations = 'int4'"))
  assert 'quant' in line and str(pretrained.workdir) in line


def test_a_missing_policy(make_job: Callable[..., Job], capsys: pytest.CaptureFixture[str]):
  job = make_job(RPT, start_from='/nowhere')
  assert '/nowhere' in complaint(capsys, *train_argv(job))


def test_a_diverging_run_stops_with_step_batch_and_checkpoint(
    make_job: Callable[..., Job], capsys: pytest.CaptureFixture[str]):
  job = make_job()
  line = complaint(capsys, *train_argv(
      job, "cfg.Quant.weights = 'none'", "cfg.Quant.activations = 'none'",
      'cfg.AdamW.schedule = @cfg.ConstantRate()', 'cfg.ConstantRate.learning_rate = 1e30',
      'cfg.AdamW.clip_norm = 0.0'))
  assert 'non-finite at step' in line and 'examples [' in line and 'checkpoint' in line
  assert not checkpoint.steps(job.workdir / 'checkpoints')


def test_a_full_disk_while_checkpointing(pretrained: Job, tmp_path: Path):
  """A limit on file sizes fails like a full disk, at a point only arrays reach."""
  job = copy_of(pretrained, tmp_path)
  before = state_bytes(job.workdir)
  # The rows of 20 steps more fit, and the save after 10 of them has failed by then: its arrays,
  # 200 KB, lie in a few files at most.
  size = int((job.workdir / 'metrics.jsonl').stat().st_size * 1.4)

  def limit() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

  environment = {k: v for k, v in job.environment.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
  done = subprocess.run([*job.command(), '--gin_bindings', 'cfg.Train.num_steps = 90'],
                        env=environment, capture_output=True, text=True, timeout=240,
                        preexec_fn=limit, check=False)
  assert done.returncode == 2, done.stderr
  assert 'no space left' in done.stderr and 'step 60' in done.stderr
  assert 'Traceback' not in done.stderr, done.stderr
  assert state_bytes(job.workdir) == before


def test_a_pickle_is_never_loaded(tmp_path: Path):
  """A pickle in a position table's place is refused, not run."""
  import pickle

  from jaxrl_pt.data import next_token

  class Evil:
    def __reduce__(self):
      return (os.mkdir, (str(tmp_path / 'owned'),))

  table = tmp_path / 'positions.npz'
  np.savez(table, key=np.array('k'), example=np.array([Evil()], dtype=object), t=np.zeros(1),
           entropy=np.zeros(1))
  (tmp_path / 'raw.npz').write_bytes(pickle.dumps(Evil()))
  empty = next_token.concatenate([])
  for path in (table, tmp_path / 'raw.npz'):
    next_token.load_or_score(path, 'k', lambda: empty)
  assert not (tmp_path / 'owned').exists()
