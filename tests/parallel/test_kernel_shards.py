"""Kernels inside a `shard_map` over rows, as a sampler's shards call them."""

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

from tests import xla_flags

# Sums of float32 in another order. In a model a few codes lie beside their rounding boundary.
EXACT, MODEL = 2e-6, 1e-2


@pytest.mark.parametrize('which, devices', [
    ('some', 4), pytest.param('everything', 8, marks=pytest.mark.slow)])
def test_a_shard_computes_its_rows_as_the_whole_does(which, devices):
  environment = {**os.environ, 'XLA_FLAGS': xla_flags.with_devices(devices),
                 'JAX_PLATFORMS': 'cpu'}
  script = Path(__file__).with_name('kernel_shards.py')
  done = subprocess.run([sys.executable, str(script), which], env=environment, text=True,
                        capture_output=True, timeout=280, check=False)
  assert done.returncode == 0, done.stderr[-4000:]
  result = json.loads(done.stdout.splitlines()[-1])
  assert result['passed over'] == []
  assert {'product', 'chunk'} <= result['off'].keys()
  for name, off in result['off'].items():
    assert off < (MODEL if name.startswith('model') else EXACT), name
