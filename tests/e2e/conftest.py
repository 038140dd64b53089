"""A complete small run as real `jaxrl-pt` processes: model, corpus, commands."""

from collections.abc import Callable
from dataclasses import dataclass
import os
from pathlib import Path
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxrl_pt import metrics
from tests.xla_flags import QUICK

PRETRAIN = """
cfg.Run.seed = 3
cfg.Run.model = @cfg.Model()
cfg.Run.data = @cfg.Data()
cfg.Run.objective = @cfg.NextToken()
cfg.Run.optimizer = @cfg.AdamW()
cfg.Run.train = @cfg.Train()
cfg.Run.checkpoint = @cfg.Checkpoint()
cfg.Run.mesh = @cfg.Mesh()
cfg.Run.compute = @cfg.Compute()
cfg.Model.quant = @cfg.Quant()
cfg.Quant.weights = 'ternary'
cfg.Quant.activations = 'int8'
cfg.Model.num_layers = 1
cfg.Model.d_model = 32
cfg.Model.d_ff = 64
cfg.Model.num_heads = 2
cfg.Model.num_kv_heads = 1
cfg.Model.head_dim = 16
cfg.Model.vocab_size = 257
cfg.Data.source = @cfg.TextFiles()
cfg.Data.tokenizer = @cfg.Bytes()
cfg.Data.seq_len = 32
cfg.Data.validation_fraction = 0.1
cfg.TextFiles.glob = '{corpus}/*.txt'
cfg.AdamW.schedule = @cfg.Cosine()
cfg.Cosine.peak_rate = 0.01
cfg.Train.num_steps = 60
cfg.Train.batch_size = 8
cfg.Train.eval_every = 15
cfg.Train.eval_batches = 2
cfg.Train.log_every = 20
cfg.Train.tensorboard = False
cfg.Checkpoint.every = 10
"""

RPT = PRETRAIN.replace('cfg.Run.objective = @cfg.NextToken()', """
cfg.Run.objective = @cfg.RPT()
cfg.RPT.start_from = '{start_from}'
cfg.RPT.rollouts = @cfg.Rollouts()
cfg.Rollouts.num_prompts = 16
cfg.Rollouts.group_size = 8
cfg.Rollouts.prompt_len = 16
cfg.Rollouts.response_tokens = 1
cfg.RPT.scored_examples = 32
cfg.RPT.eval_positions = 64
""").replace('cfg.Cosine.peak_rate = 0.01', 'cfg.Cosine.peak_rate = 0.002').replace(
    'cfg.Train.eval_batches = 2\n', '')  # Not read by RPT.

RL = PRETRAIN.replace('cfg.Run.objective = @cfg.NextToken()', """
cfg.Run.objective = @cfg.RL()
cfg.RL.start_from = '{start_from}'
cfg.RL.problems = @cfg.Problems()
cfg.Problems.source = @cfg.Arithmetic()
cfg.Arithmetic.size = 200
cfg.RL.verifier = @cfg.LengthVerifier()
cfg.LengthVerifier.min_chars = 2
cfg.LengthVerifier.max_chars = 9
cfg.RL.rollouts = @cfg.Rollouts()
cfg.RL.pool = @cfg.VerifierPool()
cfg.VerifierPool.num_workers = 1
cfg.Rollouts.num_prompts = 4
cfg.Rollouts.group_size = 4
cfg.Rollouts.prompt_len = 16
cfg.Rollouts.response_tokens = 8
cfg.RL.eval_problems = 8
""").replace('cfg.Train.num_steps = 60', 'cfg.Train.num_steps = 8').replace(
    'cfg.Train.eval_every = 15', 'cfg.Train.eval_every = 4').replace(
        'cfg.Checkpoint.every = 10', 'cfg.Checkpoint.every = 2').replace(
            'cfg.Train.log_every = 20', 'cfg.Train.log_every = 2').replace(
                # Not read by RL.
                'cfg.Train.batch_size = 8\n', '').replace('cfg.Train.eval_batches = 2\n', '')

WORDS = 'the model reads a ternary word and then predicts another byte of it while resuming'.split()


@dataclass(frozen=True)
class Job:
  """One `jaxrl-pt train` command."""

  gin_file: Path
  workdir: Path
  environment: dict[str, str]
  bindings: tuple[str, ...] = ()

  def command(self) -> list[str]:
    flags = [flag for binding in self.bindings for flag in ('--gin_bindings', binding)]
    return [sys.executable, '-m', 'jaxrl_pt.main', 'train', '--gin_file', str(self.gin_file),
            '--workdir', str(self.workdir), *flags]

  def run(self, *, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(self.command(), env=self.environment, capture_output=True, text=True,
                          timeout=timeout, check=False)

  def run_until(self, step: int, number: signal.Signals) -> tuple[int, str]:
    """Sends the signal once the row of `step` is written; returns exit code and output."""
    process = subprocess.Popen(self.command(), env=self.environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    try:
      self.wait_for(step, process)
      process.send_signal(number)
      output, _ = process.communicate(timeout=120)
    finally:
      process.kill()
    return process.returncode, output

  def wait_for(self, step: int, *processes: subprocess.Popen[str], seconds: float = 240) -> None:
    """Returns once the row of `step` is written; fails when one of its processes has ended."""
    deadline = time.monotonic() + seconds
    while self.last_step() < step:
      for process in processes:
        assert process.poll() is None, process.communicate()
      assert time.monotonic() < deadline, 'the run does not get on'
      time.sleep(0.01)

  def rows(self) -> list[dict]:
    path = self.workdir / 'metrics.jsonl'
    return metrics.read_rows(path) if path.is_file() else []

  def last_step(self) -> int:
    rows = self.rows()
    return int(rows[-1]['step']) if rows else 0


def free_port() -> int:
  """A port of this machine that nobody listens on."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def run_on_hosts(job: Job, module: str, count: int, *arguments: str) -> list[str]:
  """Runs `python -m MODULE HOST COUNT PORT ARGUMENTS` as every host; returns what each said."""
  port = str(free_port())
  hosts = [subprocess.Popen(
      [sys.executable, '-m', module, str(host), str(count), port, *arguments], text=True,
      env=job.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
           for host in range(count)]
  try:
    said = [host.communicate(timeout=400)[0] for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  assert all(host.returncode == 0 for host in hosts), '\n'.join(said)
  return said


@pytest.fixture(scope='session')
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """One compilation cache for all children of the session, and cheap compilation."""
  cache = tmp_path_factory.mktemp('compilation_cache')
  return {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_PLATFORMS': 'cpu',
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
          'XLA_FLAGS': QUICK}


@pytest.fixture(scope='session')
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
  rng = random.Random(0)
  directory = tmp_path_factory.mktemp('corpus')
  for i in range(120):
    text = ' '.join(rng.choice(WORDS) for _ in range(rng.randint(5, 80)))
    (directory / f'{i:03d}.txt').write_text(text + '.\n')
  return directory


@pytest.fixture(scope='session')
def make_job(corpus: Path, environment: dict[str, str],
             tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
  def make(text: str = PRETRAIN, *, bindings: tuple[str, ...] = (), **fields: str) -> Job:
    workdir = tmp_path_factory.mktemp('job')
    gin_file = workdir / 'run.gin'
    gin_file.write_text(text.format(corpus=corpus, **fields))
    return Job(gin_file, workdir / 'work', environment, bindings)
  return make


@pytest.fixture(scope='session')
def pretrained(make_job: Callable[..., Job]) -> Job:
  """The uninterrupted pretraining run."""
  job = make_job()
  done = job.run()
  assert done.returncode == 0, done.stdout + done.stderr
  return job


@pytest.fixture(scope='session')
def reinforced(make_job: Callable[..., Job], pretrained: Job) -> Job:
  """The uninterrupted RPT run of that policy."""
  job = make_job(RPT, start_from=str(pretrained.workdir))
  done = job.run()
  assert done.returncode == 0, done.stdout + done.stderr
  return job
