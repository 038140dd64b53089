"""The rotating quantiser: the kernel's codes are the definition's, up to rounding boundaries."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import testing
from pallas_kernels.hadamard_quantize import hadamard_quantize, kernel_tpu, reference, tuning

KINDS = ('int8', 'int4', 'int4_absmax')
# MXUs of both sizes, and a program that is split over two cores.
TARGETS = (tuning.Target(128, 1), tuning.Target(256, 1), tuning.Target(128, 2))
# By the kernel's docstring: how near to a rounding boundary a value must lie to take the
# neighbouring code, relative to the row's largest |code|.
NEAR = 2.0**-14
# The two bfloat16 terms of a value leave out at most 2⁻¹⁶ of it; the rest is float32's own.
SCALE = 2.0**-16 + 2.0**-20


def rows(seed, M, D, dtype, heavy=False):
  x = np.random.default_rng(seed).standard_normal((M, D)).astype(np.float32)
  if heavy:  # A gated product: most channels small, few large.
    x = np.maximum(x, 0) ** 2 * np.roll(x, 1, 1)
  return jnp.asarray(x, dtype)


def normalised(x, gain):
  """The definition's norm, float64 of x's dtype, and how far its rounding may move each row.

  float32 sums in another order move 1/√mean by some last bits. An entry within 2⁻²¹ of a
  boundary of bfloat16 may so round to its neighbour, 2⁻⁷ of it away at most, and the rotation
  spreads that over the row, 1/√D to each value.
  """
  if gain is None:
    return np.asarray(x, np.float64), np.zeros((x.shape[0], 1))
  x64 = np.asarray(x, np.float64)
  exact = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(gain, np.float64)
  rounded = np.asarray(jnp.asarray(exact, jnp.float32).astype(x.dtype), np.float64)
  if x.dtype == jnp.float32:
    return rounded, np.abs(rounded).sum(-1, keepdims=True) * 2.0**-21 / np.sqrt(x.shape[1])
  low, high = (np.asarray(jnp.asarray(exact * (1 + d), jnp.float32).astype(x.dtype), np.float64)
               for d in (-(2.0**-21), 2.0**-21))
  moved = np.where(low != high, np.abs(rounded) * 2.0**-7, 0.0).sum(-1, keepdims=True)
  return rounded, moved / np.sqrt(x.shape[1])


def unrounded(x, gain, kind):
  """value / scale in float64 before rounding, the scale, and what the norm may add to both."""
  normed, moved = normalised(x, gain)
  # By the Kronecker product of the factors: each rotates an axis of its own.
  factors = reference.hadamard_factors(x.shape[-1])
  value = normed.reshape(-1, *(len(factor) for factor in factors))
  for axis, factor in enumerate(factors, 1):
    value = np.moveaxis(np.tensordot(value, np.asarray(factor, np.float64), (axis, 1)), -1, axis)
  value = value.reshape(x.shape) / np.sqrt(x.shape[-1])
  size = np.abs(value)
  statistic, most = {'int8': (size.max(-1), 127), 'int4': (size.mean(-1), np.sqrt(7.0)),
                     'int4_absmax': (size.max(-1), 7)}[kind]
  scale = np.maximum(statistic, reference.EPSILON)[:, None] / most
  return value / scale, scale, moved / np.maximum(statistic, reference.EPSILON)[:, None]


def check(x, gain, kind, target, interpret):
  codes, scale = kernel_tpu.hadamard_quantize(
      x, gain, activations=kind, epsilon=1e-5, target=target, blocks=tuning.Blocks(32, 2),
      interpret=interpret)
  exact, exact_scale, moved = unrounded(x, gain, kind)
  assert (np.abs(scale / exact_scale - 1) <= SCALE + moved).all()
  codes = np.asarray(codes.astype(jnp.int32))
  low, high = (-128, 127) if kind == 'int8' else (-8, 7)
  expected = np.clip(np.round(exact), low, high)
  boundary = np.abs(np.abs(exact - np.floor(exact)) - 0.5)
  wrong = codes != expected
  near = boundary <= (NEAR + 2 * moved) * np.abs(exact).max(-1, keepdims=True)
  assert not (wrong & ~near).any()
  assert np.abs(codes - expected).max() <= 1 and wrong.mean() < 0.01


# In 768 = 12 · 64 and 6912 = 108 · 64 two rows share the lanes of a tile.
@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(M=st.integers(1, 100), D=st.sampled_from((128, 256, 768)),
       dtype=st.sampled_from((jnp.bfloat16, jnp.float32)), has_gain=st.booleans(),
       heavy=st.booleans(), target=st.sampled_from(TARGETS), seed=st.integers(0, 99))
def test_codes_in_the_tpu_interpreter(M, D, dtype, has_gain, heavy, target, seed):
  gain = jnp.linspace(0.5, 2, D) if has_gain else None
  check(rows(seed, M, D, dtype, heavy), gain, 'int8', target, testing.tpu_interpreter())
  assert not testing.races_found()


# The TPU interpreter takes no 4-bit integers.
@settings(max_examples=3, deadline=None)
@given(M=st.integers(1, 200), D=st.sampled_from((256, 768)), kind=st.sampled_from(KINDS),
       has_gain=st.booleans(), dtype=st.sampled_from((jnp.bfloat16, jnp.float32)),
       target=st.sampled_from(TARGETS), seed=st.integers(0, 99))
def test_codes_in_the_plain_interpreter(M, D, kind, has_gain, dtype, target, seed):
  gain = jnp.linspace(0.5, 2, D) if has_gain else None
  check(rows(seed, M, D, dtype), gain, kind, target, testing.PLAIN)


@pytest.mark.slow  # Rows of 768 share lanes in the same way.
@pytest.mark.parametrize('target', TARGETS)
def test_the_widest_factors(target):
  check(rows(0, 2, 6912, jnp.bfloat16), jnp.ones(6912), 'int4', target, testing.PLAIN)


@pytest.mark.parametrize('target', [
    TARGETS[0], pytest.param(TARGETS[1], marks=pytest.mark.slow), TARGETS[2]])
def test_rows_that_fill_their_blocks(target):
  check(rows(1, 192, 768, jnp.bfloat16), jnp.ones(768), 'int8', target, testing.PLAIN)


@pytest.mark.parametrize('kind, M', [('int8', 1), ('int4', 3), ('int4_absmax', 1)])
def test_rows_of_zeros_and_one_row(kind, M):
  codes, scale = kernel_tpu.hadamard_quantize(
      jnp.zeros((M, 128)), None, activations=kind, epsilon=1e-5, target=TARGETS[0],
      blocks=tuning.Blocks(32, 2), interpret=testing.PLAIN)
  np.testing.assert_array_equal(codes.astype(jnp.int32), np.zeros((M, 128)))
  most = {'int8': 127, 'int4': np.sqrt(7.0), 'int4_absmax': 7}[kind]
  np.testing.assert_allclose(scale, np.full((M, 1), 1e-5 / most), rtol=1e-6)


@pytest.mark.parametrize('kind, most', [
    pytest.param('int8', 5e-4, marks=pytest.mark.slow), ('int4', 5e-5)])
def test_how_many_codes_lie_beside_a_boundary(kind, most):
  """1.2e-4 and 1e-5 here: of what a TPU trains, a CPU reads nearly every code as it was."""
  x, gain = rows(0, 256, 768, jnp.bfloat16), jnp.linspace(0.5, 2, 768)
  ours, plain = (np.asarray(hadamard_quantize(
      x, gain, activations=kind, epsilon=1e-5, generation=generation,
      interpret=testing.PLAIN)[0].astype(jnp.int32)) for generation in ('v5e', None))
  assert (ours != plain).mean() < most and np.abs(ours - plain).max() <= 1


def test_dispatch_and_definition_agree():
  x = rows(3, 5, 256, jnp.bfloat16)
  gain = jnp.linspace(0.5, 2, 256)
  ours = hadamard_quantize(x, gain, activations='int8', epsilon=1e-5, generation='v5e',
                           interpret=testing.PLAIN)
  plain = hadamard_quantize(x, gain, activations='int8', epsilon=1e-5, generation=None)
  assert (np.asarray(ours[0]) != np.asarray(plain[0])).mean() < 0.01
  np.testing.assert_allclose(ours[1], plain[1], rtol=SCALE)


def test_a_width_without_fitting_factors_lands_on_the_reference():
  x = rows(4, 3, 96, jnp.float32)  # 12 · 8
  with pytest.raises(NotImplementedError):
    kernel_tpu.factors(96)
  ours = hadamard_quantize(x, None, activations='int4', epsilon=1e-5, generation='v5e')
  plain = hadamard_quantize(x, None, activations='int4', epsilon=1e-5, generation=None)
  for a, b in zip(ours, plain):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize('x, gain, kind, message', [
    (jnp.zeros((2, 3, 128)), None, 'int8', r'x must be \[M, D\]'),
    (jnp.zeros((2, 128), jnp.int8), None, 'int8', 'bfloat16 or float32'),
    (jnp.zeros((2, 128)), jnp.ones(64), 'int8', r'gain must be \[128\]'),
    (jnp.zeros((2, 128)), None, 'int3', 'one of'),
    (jnp.zeros((2, 100)), None, 'int8', 'no Hadamard matrix of order 100')])
def test_arguments_that_do_not_fit_are_one_sentence(x, gain, kind, message):
  with pytest.raises(ValueError, match=message):
    hadamard_quantize(x, gain, activations=kind, epsilon=1e-5, generation=None)
