"""The sampling engine on a TPU: its pool is updated where it lies, packed weights stay packed."""

import importlib.util

import pytest

from jaxrl_pt.tpu import child


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='libtpu is not installed: make libtpu')
@pytest.mark.parametrize('kv', [pytest.param('model', marks=pytest.mark.slow), 'int8'])
def test_no_step_and_no_admission_copies_the_pool(kv):
  (row,) = child.rows('tests.tpu.compiled_engine', 'v5e:2x2', kv)
  assert row['copies'] == [] and row['widened'] == []
  assert row['in_place'] >= row['pool'] > 2**26


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='libtpu is not installed: make libtpu')
@pytest.mark.slow
@pytest.mark.parametrize('kv', ['int4', 'int3'])
def test_pages_of_few_bits_compile_and_weights_stay_packed(kv):
  """No kernel reads them. XLA updates the pool in place, and yet copies it in some loops."""
  (row,) = child.rows('tests.tpu.compiled_engine', 'v5e:2x2', kv)
  assert row['widened'] == []
  assert row['in_place'] >= row['pool'] > 2**24
