"""A sharded model computes the same with kernels as without: loss and every gradient."""

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

from tests import xla_flags

# Codes on a rounding boundary may differ between the two (a kernel does not round the rotated
# row, and sums in another order): a step of 1/127 of a row's maximum at 8 bits, of about 1/9
# at 4 bits, in few of 10⁵ codes. What is wrong in a shard or a collective shows in the first
# digit.
LOSS, GRADIENT = 3e-4, {'int8': 1e-2, 'int4': 3e-2}


@pytest.mark.parametrize('quant, mesh', [
    # fsdp and tensor: gathered codes, contractions split over chips.
    pytest.param('int8', '1x4x2x1', marks=pytest.mark.slow),
    # The sequence is split: attention falls back to XLA.
    pytest.param('int4', '2x2x1x2', marks=pytest.mark.slow)])
def test_kernels_change_nothing(quant, mesh):
  environment = {**os.environ, 'XLA_FLAGS': xla_flags.with_devices(8), 'JAX_PLATFORMS': 'cpu'}
  script = Path(__file__).with_name('kernel_ops.py')
  done = subprocess.run([sys.executable, str(script), quant, mesh], env=environment, text=True,
                        capture_output=True, timeout=280, check=False)
  assert done.returncode == 0, done.stderr[-4000:]
  result = json.loads(done.stdout.splitlines()[-1])
  assert result['found'] == pytest.approx(result['expected'], rel=LOSS)
  assert len(result['distance']) == 13
  for name, distance in result['distance'].items():
    assert distance < GRADIENT[quant], name
