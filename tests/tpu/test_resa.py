"""Rectified sparse decoding on a TPU: its kernels, and pages that stay where they are."""

import importlib.util

import pytest

from jaxrl_pt.tpu import child


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='libtpu is not installed: make libtpu')
@pytest.mark.slow
def test_no_step_and_no_rectification_copies_the_pages():
  (row,) = child.rows('tests.tpu.compiled_resa', 'v5e:2x2')
  assert row['copies'] == [] and row['pages'] > 2**24
  # Two layers, 64 steps: the first feeds the prompt's last token.
  assert {name: row['kernels'][f'sparse_decode_{name}'] for name in (
      'scores', 'select', 'attention')} == dict.fromkeys(('scores', 'select', 'attention'), 128)
