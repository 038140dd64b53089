"""Meshes on the TPU compiler's own topologies: slices, and what the hosts of each read."""

import importlib.util

import numpy as np
import pytest

from jaxrl_pt.tpu import child
from tests.tpu.hosts_of_slices import CASES

pytestmark = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                                reason='libtpu is not installed: make libtpu')


def test_hosts_read_what_their_chips_hold_and_slices_are_joined_by_data_then_fsdp():
  [result] = child.rows('tests.tpu.hosts_of_slices')
  assert 'cannot span 2 slices' in result['refused']
  for (topology, slices, shape), found in zip(CASES, result['cases'], strict=True):
    case = topology, slices, shape
    assert found['hosts'] == np.prod(shape) / 4, case
    # No host reads a token that it does not need.
    assert found['exact'] == found['hosts'], case
    # `tensor` and `context` stay inside a slice; each slice is one stretch of data × fsdp.
    assert found['whole'], case
    grid = np.array(found['slices'])
    over_data = min(shape[0], slices)
    expected = np.arange(slices).reshape(over_data, slices // over_data)
    parts = shape[0] // over_data, shape[1] // (slices // over_data)
    np.testing.assert_array_equal(grid, np.kron(expected, np.ones(parts, int)), str(case))
  # Rows by a host's number are wrong wherever an axis replicates over hosts or splits tokens.
  assert result['cases'][1]['by_number'] == 0
