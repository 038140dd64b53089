"""Pages on a TPU: written where they lie and read by a kernel, in a sampler's shards."""

import importlib.util

import pytest

from jaxrl_pt.tpu import child


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='libtpu is not installed: make libtpu')
@pytest.mark.parametrize('topology, dtype, num_new', [
    ('v5e:2x2', 'int8', 1), *[pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('v5e:2x2', 'bfloat16', 1), ('v6e:2x2', 'int8', 256), ('v6e:2x2', 'bfloat16', 256))]])
def test_no_layer_copies_pages_or_scales(topology, dtype, num_new):
  (row,) = child.rows('tests.tpu.compiled_pages', topology, dtype, str(num_new))
  assert row['passed over'] == [] and row['kernels'] == 1
  assert row['copies'] == []
  assert row['in_place'] >= row['pool'] > 2**31
