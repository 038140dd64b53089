"""Pretraining on two and four hosts, as processes with a device each, against one process.

Whatever axis spans the hosts, the devices must get the same global batch and learn the same.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxrl_pt import metrics
from tests.e2e.conftest import PRETRAIN, Job, run_on_hosts

AXES = ('data', 'fsdp', 'tensor', 'context')
SMALL = (PRETRAIN.replace('cfg.Model.num_heads = 2', 'cfg.Model.num_heads = 4')
         .replace('cfg.Model.num_kv_heads = 1', 'cfg.Model.num_kv_heads = 4')
         .replace('cfg.Model.head_dim = 16', 'cfg.Model.head_dim = 8')
         .replace('cfg.Model.vocab_size = 257', 'cfg.Model.vocab_size = 260')
         # Codes of a quantised model may flip where sums are split.
         .replace("'ternary'", "'none'").replace("'int8'", "'none'")
         .replace('cfg.Train.num_steps = 60', 'cfg.Train.num_steps = 6')
         .replace('cfg.Train.eval_every = 15', 'cfg.Train.eval_every = 3')
         .replace('cfg.Checkpoint.every = 10', 'cfg.Checkpoint.every = 6'))
# The rows of 8 and tokens of 32 that one of the hosts reads.
READS = {2: {'2x1x1x1': (4, 32), '1x2x1x1': (4, 32), '1x1x2x1': (8, 32), '1x1x1x2': (8, 16)},
         4: {'1x2x2x1': (4, 32), '2x1x1x2': (4, 16)}}


def train(job: Job, count: int, meshes: list[str]) -> Path:
  """Trains on `count` hosts with each of the meshes; returns where."""
  run_on_hosts(job, 'tests.e2e.pretrain_on_hosts', count, str(job.gin_file), str(job.workdir),
               *meshes)
  return job.workdir


@pytest.fixture(scope='module')
def one_process(make_job: Callable[..., Job]) -> Path:
  return train(make_job(SMALL), 1, ['1x1x1x1']) / '1x1x1x1'


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
def test_every_axis_may_span_hosts(make_job: Callable[..., Job], one_process: Path, count: int):
  directory = train(make_job(SMALL), count, list(READS[count]))
  expected = metrics.read_rows(one_process / metrics.FILE)
  assert len(expected) == 6 and expected[-1]['loss'] < expected[0]['loss'] - 0.5
  for mesh, reads in READS[count].items():
    with np.load(directory / mesh / 'batches.npz') as ours, \
         np.load(one_process / 'batches.npz') as theirs:
      assert (int(ours['num_rows']), int(ours['num_tokens'])) == reads, mesh
      for name in set(theirs.files) - {'num_rows', 'num_tokens'}:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f'{mesh} {name}')
    rows = metrics.read_rows(directory / mesh / metrics.FILE)
    for row, wanted in zip(rows, expected, strict=True):
      assert row.keys() == wanted.keys()
      for name, value in metrics.deterministic(wanted).items():
        assert row[name] == pytest.approx(value, rel=1e-4), (mesh, name)
      # Speeds count the tokens of all hosts.
      tokens, wanted_tokens = (r['time/tokens_per_second'] * r['time/seconds']
                               for r in (row, wanted))
      assert tokens == pytest.approx(wanted_tokens, rel=1e-6), mesh
