"""Chips, topology names, and the sentence without a compiler."""

import pytest

from jaxrl_pt.errors import UserError
from jaxrl_pt.tpu import child, chips
from pallas_kernels.dispatch import GENERATIONS
from pallas_kernels.tuning import Cost


@pytest.mark.parametrize('generation, macs_per_cycle', [
    # MXUs of 128 × 128 (v6e and tpu7x 256 × 256), a multiply-add per cell and cycle.
    ('v4', 2 * 4 * 128 * 128), ('v5e', 4 * 128 * 128), ('v5p', 2 * 4 * 128 * 128)])
def test_clocks_agree_with_the_mxu_width(generation, macs_per_cycle):
  cycles = chips.chip(generation).mxu_cycles(Cost({'bf16': 1_000_000 * macs_per_cycle}, 0))
  assert cycles == pytest.approx(1_000_000, rel=5e-3)


def test_the_first_measurements_of_the_design_come_out():
  cost = Cost({'bf16': 2048 * 2560 * 6912}, 0)
  assert chips.chip('v5e').mxu_cycles(cost) == pytest.approx(553e3, rel=5e-3)
  assert chips.chip('v6e').mxu_cycles(cost) == pytest.approx(138e3, rel=5e-3)
  # HBM cycles of the 2-bit weights.
  assert chips.chip('v5e').hbm_cycles(2560 * 6912 / 4) == pytest.approx(8.1e3, rel=1e-2)
  assert chips.chip('v6e').hbm_cycles(2560 * 6912 / 4) == pytest.approx(4.7e3, rel=1e-2)


def test_every_generation_has_a_chip():
  for generation in GENERATIONS:
    chip = chips.chip(generation)
    assert chip.hbm_bytes > 16e9 and chip.macs_per_second['bf16'] > 9e13
  assert chips.chip('v5e').hbm_bytes == pytest.approx(16e9, rel=0.1)
  assert chips.chip('v5p').hbm_bytes == pytest.approx(95 * 2**30, rel=0.1)


@pytest.mark.parametrize('name', ['v5e', 'v3:2x2', 'v5e:2', 'v5e:2xa', 'v5e:0x2', 'v5p:2x2', ''])
def test_a_wrong_topology_is_one_sentence(name):
  with pytest.raises(UserError, match='v5e:2x2|v5p:2x2x2') as found:
    chips.generation_of_topology(name)
  assert '\n' not in str(found.value)


def test_generations_of_topologies():
  assert chips.generation_of_topology('v5e:16x16') == 'v5e'
  assert chips.generation_of_topology('tpu7x:2x2x1') == 'tpu7x'


def test_without_the_compiler_one_sentence_says_what_to_install(monkeypatch):
  monkeypatch.setattr(child.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='pip install libtpu'):
    child.check_libtpu()


def test_a_compiler_that_aborts_is_one_sentence():
  pytest.importorskip('libtpu')
  with pytest.raises(UserError, match='SIGABRT.*Check failed: buffer') as found:
    list(child.rows('tests.tpu.aborting'))
  assert '\n' not in str(found.value)
