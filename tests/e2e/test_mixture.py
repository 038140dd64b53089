"""A mixture as real processes: exact counts in the metrics, and bit-identical after a kill."""

from collections.abc import Callable
import json
from pathlib import Path
import random
import signal

import jax
import numpy as np
import pytest

from jaxrl_pt import metrics
from jaxrl_pt.jobs.open import load_state
from tests.e2e.conftest import PRETRAIN, Job

STEPS, WEIGHTS = 20, {'words': 0.5, 'more words': 0.3, 'sums': 0.2}
MIXTURE = PRETRAIN.replace('cfg.Train.num_steps = 60', f'cfg.Train.num_steps = {STEPS}').replace(
    'cfg.Checkpoint.every = 10', 'cfg.Checkpoint.every = 4').replace(
        'cfg.Data.source = @cfg.TextFiles()', f"""
cfg.Data.source = @cfg.Mixture()
cfg.Mixture.names = {list(WEIGHTS)}
cfg.Mixture.sources = [@words/cfg.TextFiles(), @more/cfg.Jsonl(), @cfg.Demonstrations()]
cfg.Mixture.weights = {list(WEIGHTS.values())}
more/cfg.Jsonl.glob = '{{rows}}'
cfg.Demonstrations.source = @cfg.Arithmetic()
cfg.Arithmetic.size = 200
""").replace('cfg.TextFiles.glob', 'words/cfg.TextFiles.glob')


@pytest.fixture(scope='module')
def job(make_job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory
        ) -> Callable[[], Job]:
  rows = tmp_path_factory.mktemp('rows') / 'rows.jsonl'
  rows.write_text(''.join(json.dumps({'text': f'row {i} has words ' * (1 + i % 4)}) + '\n'
                          for i in range(120)))
  return lambda *bindings: make_job(MIXTURE, rows=str(rows), bindings=bindings)


@pytest.fixture(scope='module')
def whole(job: Callable[..., Job]) -> Job:
  made = job()
  done = made.run()
  assert done.returncode == 0, done.stdout + done.stderr
  return made


def test_metrics_count_each_source(whole: Job):
  counts = {name: np.cumsum([row[f'examples/{name}'] for row in whole.rows()]) for name in WEIGHTS}
  examples = 8 * np.arange(1, STEPS + 1)
  for name, weight in WEIGHTS.items():
    assert np.abs(counts[name] - weight * examples).max() < 1
  for row in whole.rows():
    tokens = [row[f'tokens/{name}'] for name in WEIGHTS]
    assert all(0 <= n <= 32 * row[f'examples/{name}'] for n, name in zip(tokens, WEIGHTS,
                                                                         strict=True))
    assert sum(tokens) > 0
  assert 'validation/loss' in whole.rows()[-1]


def test_killed_at_a_random_step_it_goes_on_bit_for_bit(job: Callable[..., Job], whole: Job):
  again = job()
  code, output = again.run_until(random.SystemRandom().randint(1, STEPS - 4), signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  done = again.run()
  assert done.returncode == 0, done.stderr
  rows, others = ([metrics.deterministic(row) for row in one.rows()] for one in (again, whole))
  assert rows == others
  for ours, theirs in zip(*(jax.tree.leaves(load_state(one.workdir)) for one in (again, whole)),
                          strict=True):
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_other_weights_do_not_go_on(job: Callable[..., Job], whole: Job, tmp_path: Path):
  del tmp_path
  other = job('cfg.Mixture.weights = [0.2, 0.3, 0.5]')
  again = Job(other.gin_file, whole.workdir, other.environment,
              (*other.bindings, f'cfg.Train.num_steps = {STEPS + 4}'))
  done = again.run()
  assert done.returncode == 2 and 'Mixture.weights' in done.stderr, done.stderr
