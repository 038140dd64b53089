"""The runs at the papers' scale: which of them decode with the kernel of branches, and who says."""

import importlib.util

import pytest

from jaxrl_pt.tpu import child

RUNS = ('grpo_7b', 'opo_7b', 'short_rl_7b', 'rpt_14b')


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='libtpu is not installed: make libtpu')
def test_groups_of_16_decode_with_the_kernel_and_others_say_that_they_do_not():
  rows = list(child.rows('tests.tpu.pod_kernels', *RUNS))
  assert [row['name'] for row in rows] == list(RUNS)
  for row in rows:
    # One reason for all stages of a response, whose slots are the same everywhere.
    passed_over = row['group'] % 16 and [
        f'branch_decode: {row["group"]} branches are no multiple of 16']
    assert row['left'] == (passed_over or []), row
