"""Dispatch falls through what an implementation does not take, and says so once."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, tuning
from pallas_kernels.dispatch import Implementation


def refuse(x):
  raise NotImplementedError('odd widths')


def double(x):
  return 2 * x


@pytest.fixture
def lines(caplog):
  dispatch._say_once.cache_clear()
  caplog.set_level(logging.INFO, logger='pallas_kernels')
  return lambda: caplog.messages


def test_the_next_implementation_takes_over_with_one_line(lines):
  implementations = [Implementation('tpu', refuse), Implementation('reference', double)]
  for _ in range(3):
    result = dispatch.first_supported('scale', implementations, jnp.ones(3))
  np.testing.assert_array_equal(result, 2 * np.ones(3))
  assert lines() == ['scale: tpu does not take float32[3] (odd widths); using reference.']


def test_the_line_names_arrays_among_other_arguments(lines):
  def refuse(x, kind):
    raise NotImplementedError(kind)
  implementations = [Implementation('tpu', refuse), Implementation('xla', lambda x, kind: x)]
  jax.jit(lambda x: dispatch.first_supported('scale', implementations, x, 'int3'))(jnp.ones(3))
  assert lines() == ['scale: tpu does not take float32[3] (int3); using xla.']


def test_a_supported_case_says_nothing(lines):
  result = dispatch.first_supported('scale', [Implementation('tpu', double),
                                              Implementation('reference', refuse)], jnp.ones(2))
  np.testing.assert_array_equal(result, [2, 2])
  assert lines() == []


def test_nothing_is_approximated_when_no_implementation_takes_it():
  with pytest.raises(NotImplementedError, match='odd widths'):
    dispatch.first_supported('scale', [Implementation('tpu', refuse)], jnp.ones(3))


def test_an_error_is_not_a_reason_to_fall_through():
  def broken(x):
    raise ValueError('wrong shape')
  with pytest.raises(ValueError, match='wrong shape'):
    dispatch.first_supported('scale', [Implementation('tpu', broken),
                                       Implementation('reference', double)], jnp.ones(3))


def test_a_cpu_has_no_generation():
  assert dispatch.generation_of(jax.devices('cpu')[0]) is None


def test_bytes_of_packed_integers():
  assert tuning.num_bytes(jax.ShapeDtypeStruct((3, 5), jnp.int2)) == 4  # 30 bits
  assert tuning.num_bytes(jax.ShapeDtypeStruct((3, 5), jnp.int4)) == 8  # 60 bits
  assert tuning.num_bytes(jax.ShapeDtypeStruct((4,), jnp.bfloat16),
                          jax.ShapeDtypeStruct((4,), jnp.int8)) == 12


def test_a_block_is_moved_each_time_its_index_changes():
  grid = (3, 4)
  moved = lambda index_map: tuning.moved_bytes(grid, (8, 128), jnp.int8, index_map)
  assert moved(lambda i, j: (0, 0)) == 1024
  assert moved(lambda i, j: (i, 0)) == 3 * 1024
  assert moved(lambda i, j: (0, j)) == 12 * 1024


def test_what_is_passed_over_is_noted_by_op_and_reason(caplog):
  """Once each, also what was said before, and without a line in the log."""
  implementations = [Implementation('tpu', refuse), Implementation('reference', double)]
  dispatch.first_supported('scale', implementations, jnp.ones(3))
  caplog.clear()
  for _ in range(2):
    with dispatch.noting() as lines:
      for width in (3, 5):
        dispatch.first_supported('scale', implementations, jnp.ones(width))
    assert lines == ['scale: odd widths']
  assert caplog.messages == []
