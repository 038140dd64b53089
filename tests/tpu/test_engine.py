"""The sampling engine on a TPU: its pool is updated where it lies, packed weights stay packed."""

import importlib.util

import pytest

from jaxrl_pt.tpu import child


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='libtpu is not installed: make libtpu')
@pytest.mark.parametrize('dtype', [
    pytest.param('bfloat16', marks=pytest.mark.slow), 'int8'])
def test_no_step_and_no_admission_copies_the_pool(dtype):
  (row,) = child.rows('tests.tpu.compiled_engine', 'v5e:2x2', dtype)
  assert row['copies'] == [] and row['widened'] == []
  assert row['in_place'] >= row['pool'] > 2**26
