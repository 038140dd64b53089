"""Episodes on a mesh: an engine for each shard of the data draws what one device draws."""

import json
import os
import subprocess
import sys

import pytest

from tests import xla_flags

# Data, fsdp, tensor, context; the first one takes a step of the learner too.
SOME = '2,1,2,1', '1,2,1,1'
OTHERS = '2,2,2,1', '4,2,1,1', '1,4,1,2', '1,1,8,1', '8,1,1,1', '2,1,2,2'


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize('meshes', [SOME, OTHERS])
def test_every_mesh_plays_the_same_episodes(meshes):
  environment = {**os.environ, 'XLA_FLAGS': xla_flags.with_devices(8), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-m', 'tests.environments.turn_shards', *meshes],
                        env=environment, text=True, capture_output=True, timeout=550, check=False)
  assert done.returncode == 0, done.stderr[-4000:]
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert [row['mesh'] for row in rows] == [list(map(int, mesh.split(','))) for mesh in meshes]
  for row in rows:
    assert all(row['same'].values()) and row['same_verdict'] and row['logp'] < 1e-4, row
    assert row['held_out'] < 1e-6 and row['turns'] == [1, 2, 3] and not row['repeated'], row
    # Each engine has the devices of its shard and slots for its rows, and all of them have drawn.
    assert row['devices'] == [sorted(shard) for shard in row['shards']]
    num_shards = row['mesh'][0] * row['mesh'][1]
    assert row['slots'] == [16 // num_shards] * num_shards and all(row['drawn']), row
    assert row['preflight'], row
  metrics = rows[0]['metrics']
  assert rows[0]['is_split'] and metrics['verified'] == 1
  assert 1 <= metrics['mismatch'] <= 1 + 1e-4 and 1 < metrics['turns'] < 3
