"""Data-parallel sampling: every mesh draws what one device draws, and no data shard waits."""

import json
import os
import subprocess
import sys

import pytest

from tests import xla_flags

SOME = '8,1,1', '1,4,2', '2,1,4'
OTHERS = '1,1,8', '1,2,4', '1,8,1', '2,2,2', '2,4,1', '4,1,2', '4,2,1'


@pytest.mark.timeout(600)
@pytest.mark.parametrize('module, meshes', [
    ('shards', SOME), pytest.param('shards', OTHERS, marks=pytest.mark.slow),
    pytest.param('shards', ('--sparse', *SOME), marks=pytest.mark.slow, id='sparse'),
    pytest.param('in_flight_shards', SOME, marks=pytest.mark.slow, id='in_flight')])
def test_every_mesh_draws_the_same_without_collectives_between_data_shards(module, meshes):
  environment = {**os.environ, 'XLA_FLAGS': xla_flags.with_devices(8), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-m', f'tests.sampling.{module}', *meshes],
                        env=environment, text=True, capture_output=True, timeout=550, check=False)
  assert done.returncode == 0, done.stderr[-4000:]
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(rows) == len([argument for argument in meshes if argument != '--sparse'])
  for row in rows:
    assert row['same'] and row['logp'] < 1e-4, row
    assert len(row['lengths']) > 2  # Shards end at different times.
    # What is joined at all is joined within the tensor shards of one part of the data.
    parts = [set(part) for part in row['tensor']]
    assert all(any(set(group) <= part for part in parts) for group in row['joined']), row
    assert bool([g for g in row['joined'] if len(g) > 1]) == (row['mesh'][2] > 1), row


@pytest.mark.timeout(600)
def test_a_sync_moves_adapters_alone_after_the_first_on_every_mesh():
  environment = {**os.environ, 'XLA_FLAGS': xla_flags.with_devices(8), 'JAX_PLATFORMS': 'cpu'}
  meshes = '1,8,1', '2,2,2'
  done = subprocess.run([sys.executable, '-m', 'tests.sampling.adapter_shards', *meshes],
                        env=environment, text=True, capture_output=True, timeout=550, check=False)
  assert done.returncode == 0, done.stderr[-4000:]
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(rows) == len(meshes)
  for row in rows:
    assert row['first'] == row['all'] > 4 * row['adapters']
    assert row['second'] == row['adapters'] and row['same']
    assert row['difference'] < 1e-4, row
