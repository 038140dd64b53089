"""The runs at the papers' scale: they decode with the kernel of pages."""

import importlib.util

import pytest

from jaxrl_pt.tpu import child

RUNS = ('grpo_7b', 'opo_7b', 'short_rl_7b', 'rpt_14b')


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='libtpu is not installed: make libtpu')
def test_pods_decode_with_the_kernel_of_pages():
  rows = list(child.rows('tests.tpu.pod_kernels', *RUNS))
  assert [row['name'] for row in rows] == list(RUNS)
  for row in rows:
    assert not [line for line in row['left'] if line.startswith('paged_attention')], row
