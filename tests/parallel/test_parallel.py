"""Every mesh computes what one device computes; rules and meshes refuse what cannot be."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
from jax.sharding import PartitionSpec
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel import mesh as meshes
from jaxrl_pt.parallel import rules
from tests import xla_flags

# Float32 sums of a few hundred terms, split and reordered: about 10 · 2⁻²⁴ a sum, over some
# twenty operations in a row.
PLAIN = 2e-5
# A quantised model's scales (sums or maxima over a split dimension) may differ in the last
# bit. A value within 2⁻²³ of a rounding boundary then takes the neighbouring code: for
# 8 rows × 16 tokens × 2 layers × 7 inputs of 32–64 channels (about 7·10⁴ codes of up to
# 127 · 2⁻²³ relative uncertainty) about one code in the whole batch is expected to flip. One
# flip moves one entry of one token by 1/127 of its maximum: below 1e-2 in one token's loss of
# 128, hence 1e-4 in the mean, and ten times that in the gradient's norm. A wrong collective
# (a partial sum taken for the whole, one shard's scale for the matrix's) shows in the first
# digits.
QUANTISED_LOSS, QUANTISED_NORM = 3e-4, 3e-3
# Ordered factorisations of 8 devices over four axes: all, and those into equal factors.
NUM_MESHES = {'all': 20, 'equal': 8}


def run_child(*arguments):
  environment = {**os.environ, 'XLA_FLAGS': xla_flags.with_devices(8), 'JAX_PLATFORMS': 'cpu'}
  script = Path(__file__).with_name('axis_combinations.py')
  done = subprocess.run([sys.executable, str(script), *arguments], env=environment, text=True,
                        capture_output=True, timeout=900, check=False)
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(900)
@pytest.mark.parametrize('name, which, loss_rtol, norm_rtol', [
    pytest.param('plain', 'all', PLAIN, PLAIN, marks=pytest.mark.slow),
    pytest.param('w158a8', 'all', QUANTISED_LOSS, QUANTISED_NORM, marks=pytest.mark.slow),
    ('w158a8', 'equal', QUANTISED_LOSS, QUANTISED_NORM)])
def test_every_axis_combination_equals_one_device(name, which, loss_rtol, norm_rtol):
  result = run_child(name, which)
  assert result['devices'] == 8
  loss, norm = result['one_device']
  assert loss > 3 and norm > 0.05
  assert len(result['meshes']) == NUM_MESHES[which]
  for shape, (mesh_loss, mesh_norm, init_gap, share) in result['meshes'].items():
    assert mesh_loss == pytest.approx(loss, rel=loss_rtol), shape
    assert mesh_norm == pytest.approx(norm, rel=norm_rtol), shape
    # Every device draws the same numbers; XLA may round stddev · z in another fusion.
    assert init_gap <= 1e-7, shape
    _, fsdp, tensor, _ = map(int, shape.split('x'))
    # Matrices are split over fsdp × tensor; norms (1 % of this tiny model) are replicated.
    assert share <= 1 / (fsdp * tensor) + 0.03, shape


def test_mesh_that_does_not_cover_the_devices():
  devices = jax.devices()[:1]
  for mesh in (cfg.Mesh(data=2), cfg.Mesh(fsdp=3), cfg.Mesh(tensor=2, context=2)):
    with pytest.raises(UserError, match='does not cover the 1 devices'):
      meshes.make_mesh(mesh, devices)
  assert meshes.make_mesh(cfg.Mesh(), devices).size == 1


def test_partition_specs_and_collisions():
  spec = rules.partition_spec(('layers', 'embed', 'heads'), rules.TRAIN)
  assert spec == PartitionSpec(None, 'fsdp', 'tensor')
  assert rules.partition_spec(('batch', 'sequence', None), rules.TRAIN) == PartitionSpec(
      ('data', 'fsdp'), 'context', None)
  assert rules.partition_spec(('embed', 'heads'), rules.SAMPLE) == PartitionSpec(None, 'tensor')
  with pytest.raises(ValueError, match='twice'):
    rules.partition_spec(('heads', 'ff'), rules.TRAIN)
  with pytest.raises(ValueError, match='twice'):
    rules.partition_spec(('batch', 'embed'), rules.TRAIN)


def test_constrain_is_the_identity_on_one_device():
  constrain = rules.make_constrain(meshes.make_mesh(cfg.Mesh(), jax.devices()[:1]))
  x = jax.numpy.ones((2, 3))
  assert constrain(x, ('batch', None)) is x


def test_frozen_codes_are_refused_for_tpus_alone():
  of = lambda quant, adapter: cfg.Model(1, 8, 8, 1, 1, 8, 8, quant=quant, adapter=adapter)
  ternary, adapter = cfg.Quant('ternary', 'int8'), cfg.LoRA(2)
  with pytest.raises(UserError, match="LoRA over Quant.weights = 'ternary' does not train on TPUs"):
    rules.check_compiles(of(ternary, adapter), 'tpu')
  rules.check_compiles(of(ternary, adapter), 'cpu')
  rules.check_compiles(of(ternary, cfg.NoAdapter()), 'tpu')
  rules.check_compiles(of(cfg.Quant(), adapter), 'tpu')
