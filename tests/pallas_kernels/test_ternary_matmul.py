"""The ternary product: every implementation gives the bits of an integer product."""

import functools
import logging

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, testing
from pallas_kernels import ternary_matmul as op
from pallas_kernels.ternary_matmul import kernel_tpu, packing, tuning

GENERATIONS = tuple(g for g in dispatch.GENERATIONS if g != 'v4')
# The loop emitters that tests take by default (tests/xla_flags.py) crash on 2-bit integers.
compiled = functools.partial(jax.jit, compiler_options={'xla_cpu_use_fusion_emitters': True})


def arguments(seed, M, K, N, activations, per_column=False):
  rng = np.random.default_rng(seed)
  low, high = (-128, 128) if activations == 'int8' else (-8, 8)
  x, w = rng.integers(low, high, (M, K)), rng.integers(-1, 2, (K, N))
  x_scale = rng.uniform(0.1, 2, (M, 1))
  w_scale = rng.uniform(0.1, 2, (1, N) if per_column else (1, 1))
  return (jnp.asarray(x, activations), jnp.asarray(x_scale, jnp.float32),
          jnp.asarray(w, jnp.int2), jnp.asarray(w_scale, jnp.float32))


def sums(args):
  return np.asarray(args[0]).astype(np.int64) @ np.asarray(args[2]).astype(np.int64)


def scaled(args, dtype):
  scale = np.asarray(args[1]) * np.asarray(args[3])
  return jnp.asarray(sums(args).astype(np.float32) * scale).astype(dtype)


# The plain interpreter: the TPU interpreter takes no 2- and 4-bit integers.
@settings(max_examples=12, deadline=None)
@given(M=st.integers(1, 70) | st.integers(129, 300), K=st.integers(1, 300), N=st.integers(1, 300),
       activations=st.sampled_from(('int8', 'int4')), per_column=st.booleans(),
       generation=st.sampled_from(GENERATIONS),
       out_dtype=st.sampled_from((jnp.bfloat16, jnp.float32, jnp.int32)),
       seed=st.integers(0, 99))
def test_kernel_is_the_integer_product(M, K, N, activations, per_column, generation, out_dtype,
                                       seed):
  args = arguments(seed, M, K, N, activations, per_column)
  if M <= kernel_tpu.FEW_ROWS:
    blocks = tuning.Blocks(min(64, M), 128, 32)
  else:  # All rows, and blocks of rows.
    blocks = tuning.Blocks(M if M <= 256 else 256, 384, 128)
  out = compiled(functools.partial(
      kernel_tpu.ternary_matmul, out_dtype=out_dtype, generation=generation, blocks=blocks,
      interpret=testing.PLAIN))(*args)
  expected = sums(args) if out_dtype == jnp.int32 else scaled(args, out_dtype)
  assert out.dtype == out_dtype
  np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))


@pytest.mark.parametrize('M, K, N', [(1, 128, 128), (33, 200, 130), (130, 128, 300),
                                     (600, 128, 128)])
@pytest.mark.parametrize('activations', ['int8', 'int4'])
def test_kernel_equals_the_reference_bit_for_bit(M, K, N, activations):
  args = arguments(1, M, K, N, activations)
  multiply = lambda **how: compiled(functools.partial(
      op.ternary_matmul, activations=activations, out_dtype=jnp.bfloat16, **how))(*args)
  for generation in GENERATIONS:
    np.testing.assert_array_equal(multiply(generation=generation, interpret=testing.PLAIN),
                                  multiply(generation=None))


def test_sums_at_their_largest_are_exact():
  # 127 · 6912 = 877,824 < 2²⁴.
  K = 6912
  args = (jnp.full((1, K), 127, jnp.int8), jnp.ones((1, 1), jnp.float32),
          jnp.ones((K, 128), jnp.int2), jnp.ones((), jnp.float32))
  for generation in GENERATIONS:
    out = op.ternary_matmul(*args, activations='int8', out_dtype=jnp.int32,
                            generation=generation, interpret=testing.PLAIN)
    np.testing.assert_array_equal(out, np.full((1, 128), 127 * K))


def test_gradients_are_those_of_the_dequantised_product():
  args = arguments(2, 5, 40, 24, 'int4')
  x_hat = args[0].astype(jnp.float32) * args[1]
  w_hat = args[2].astype(jnp.float32) * args[3]
  noise = jnp.asarray(np.random.default_rng(3).standard_normal((5, 24)), jnp.float32)

  multiply = functools.partial(op.ternary_matmul, activations='int4', out_dtype=jnp.float32,
                               generation='v5e', interpret=testing.PLAIN)

  def ours(x, w):
    y = op.straight_through(multiply, x, w, *args)
    return (jnp.sin(y) * noise).sum()

  # The carriers' values are never read: whatever they are, the gradients stay.
  found = jax.grad(ours, (0, 1))(jnp.full_like(x_hat, jnp.nan), jnp.full_like(w_hat, jnp.nan))
  expected = jax.grad(lambda x, w: (jnp.sin(x @ w) * noise).sum(), (0, 1))(x_hat, w_hat)
  # |Y| reaches 10²: float32 rounds it by 4e-6, and a gradient sums some 24 such cosines times
  # weights or activations of up to 2 · 8.
  for a, b in zip(found, expected):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=24 * 16 * 4e-6)


def test_v4_lands_on_the_reference_and_says_so(caplog):
  dispatch._say_once.cache_clear()
  args = arguments(4, 3, 16, 8, 'int8')
  with caplog.at_level(logging.INFO, logger='pallas_kernels'):
    out = op.ternary_matmul(*args, activations='int8', out_dtype=jnp.float32, generation='v4')
  np.testing.assert_array_equal(out, scaled(args, jnp.float32))
  [line] = caplog.messages
  assert 'ternary_matmul: tpu does not take' in line and 'using reference' in line


@pytest.mark.parametrize('change, message', [
    (dict(x_codes_MK=jnp.zeros((3, 16), jnp.int4)), r'x_codes must be int8\[M, K\]'),
    (dict(w_codes_KN=jnp.zeros((17, 8), jnp.int2)), r'w_codes must be int2\[16, N\]'),
    (dict(x_scale_M1=jnp.ones((3,))), r'x_scale must be float32\[3, 1\]'),
    (dict(w_scale=jnp.ones((1, 7))), r'w_scale must be float32\[\], \[1, 1\] or \[1, 8\]'),
    (dict(activations='int2'), r'activations must be one of int8, int4')])
def test_arguments_that_do_not_fit_are_one_sentence(change, message):
  names = ('x_codes_MK', 'x_scale_M1', 'w_codes_KN', 'w_scale')
  call = dict(zip(names, arguments(5, 3, 16, 8, 'int8')), activations='int8') | change
  with pytest.raises(ValueError, match=message):
    op.ternary_matmul(**call, out_dtype=jnp.bfloat16, generation=None)


# --- The exchange format ----------------------------------------------------------


def test_planar_bytes_of_a_released_checkpoint():
  # Rows are outputs; docs/methods/bitnet.md has the layout.
  packed = jnp.array([[161, 24], [144, 10]], jnp.uint8)
  expected = [(0, -1), (-1, 1), (-1, 1), (-1, 1), (1, 0), (0, -1), (1, -1), (1, -1)]
  codes = packing.unpack_planar(packed.T, 8)
  np.testing.assert_array_equal(codes.astype(jnp.int8).T, expected)
  np.testing.assert_array_equal(packing.pack_planar(codes), packed.T)


@settings(max_examples=20, deadline=None)
@given(K=st.integers(1, 19), N=st.integers(1, 19), axis=st.integers(0, 1),
       seed=st.integers(0, 99))
def test_planar_bytes_come_back(K, N, axis, seed):
  codes = jnp.asarray(np.random.default_rng(seed).integers(-1, 2, (K, N)), jnp.int2)
  packed = packing.pack_planar(codes, axis)
  assert packed.shape[axis] == -(-(K, N)[axis] // 4) and packed.dtype == jnp.uint8
  back = packing.unpack_planar(packed, (K, N)[axis], axis)
  np.testing.assert_array_equal(back.astype(jnp.int8), codes.astype(jnp.int8))
