"""The quantisers against their equations, and the quantised product against integers."""

import fractions

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.config import Quant
from jaxrl_pt.nn import quant
from jaxrl_pt.nn.linear import linear, normed_linear
from jaxrl_pt.nn.norm import rms_norm
from jaxrl_pt.nn.ops import Ops

KINDS = ('int8', 'int4', 'int4_absmax')
RANGES = {'int8': (-128, 127), 'int4': (-8, 7), 'int4_absmax': (-8, 7)}

finite = st.floats(-2.0**99, 2.0**99, width=32)
rows = hnp.arrays(np.float32, (2, 9), elements=finite)
matrices = hnp.arrays(np.float32, (5, 3), elements=finite)

ternary = jax.jit(quant.ternary)
activations = jax.jit(quant.activations, static_argnums=1)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bit_matmul(x, w, kind):
  """The product with its own quantisation of x, as the layers call it."""
  codes, scale = quant.activations(x, kind)
  return quant.bit_matmul(x, w, codes, scale, kind, Ops().product, ('embed', 'ff'))


# --- By hand --------------------------------------------------------------------


def test_ternary_by_hand():
  # mean|W| = (0.1 + 0.9 + 2 + 1) / 4 = 1; 0.1 → 0, −0.9 → −1, 2 → clipped to 1, −1 → −1.
  codes, scale = quant.ternary(jnp.array([[0.1, -0.9], [2.0, -1.0]]))
  np.testing.assert_array_equal(codes, [[0, -1], [1, -1]])
  assert scale.shape == (1, 1) and float(scale[0, 0]) == pytest.approx(1.0)


def test_ternary_rounds_half_to_even():
  # mean|W| = 1, so ±0.5 lie on the boundary and go to 0.
  codes, _ = quant.ternary(jnp.array([[0.5, -0.5], [1.5, -1.5]]))
  np.testing.assert_array_equal(codes, [[0, 0], [1, -1]])


def test_int8_by_hand():
  # γ = 127, so codes are the rounded values.
  codes, scale = quant.activations(jnp.array([[127.0, -126.6, 0.4, 63.5]]), 'int8')
  np.testing.assert_array_equal(codes, [[127, -127, 0, 64]])
  assert float(scale[0, 0]) == pytest.approx(1.0)


def test_int4_by_hand():
  # β = (1 + 1 + 2 + 12 + 14) / 5 = 6, step 6 / √7 = 2.268: 0.44, −0.44, 0.88, 5.29, −6.17.
  x = jnp.array([[1.0, -1.0, 2.0, 12.0, -14.0]])
  codes, scale = quant.activations(x, 'int4')
  np.testing.assert_array_equal(codes, [[0, 0, 1, 5, -6]])
  assert float(scale[0, 0]) == pytest.approx(6 / 7**0.5)
  # One large entry among zeros: β = X / 8, √7 · 8 = 21 is clipped to 7 or −8.
  codes, _ = quant.activations(jnp.array([[8.0] + [0.0] * 7, [-8.0] + [0.0] * 7]), 'int4')
  np.testing.assert_array_equal(codes[:, 0], [7, -8])


def test_int4_absmax_by_hand():
  codes, scale = quant.activations(jnp.array([[14.0, -14.0, 5.1, -1.0]]), 'int4_absmax')
  np.testing.assert_array_equal(codes, [[7, -7, 3, 0]])  # step 2; −0.5 rounds to even
  assert float(scale[0, 0]) == pytest.approx(2.0)


def test_scale_is_one_per_token_and_one_per_matrix():
  x = jnp.asarray(normal(2, 3, 8))
  for kind in KINDS:
    codes, scale = quant.activations(x, kind)
    alone, alone_scale = quant.activations(x[1, 2], kind)
    assert scale.shape == (2, 3, 1)
    np.testing.assert_array_equal(codes[1, 2], alone)
    np.testing.assert_allclose(scale[1, 2], alone_scale, rtol=1e-6)  # another order of sums
  w = jnp.asarray(normal(2, 4, 6))
  codes, scale = quant.ternary(w)
  assert scale.shape == (2, 1, 1)
  np.testing.assert_array_equal(codes[1], quant.ternary(w[1])[0])


def test_none_leaves_activations_alone():
  x = jnp.asarray(normal(3, 5))
  codes, scale = quant.activations(x, 'none')
  np.testing.assert_array_equal(codes, x)
  np.testing.assert_array_equal(scale, np.ones((3, 1)))


# --- Properties -----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_ternary_codes_are_ternary_and_finite(w):
  codes, scale = map(np.asarray, ternary(jnp.asarray(w)))
  assert np.isin(codes, [-1, 0, 1]).all()
  assert np.isfinite(scale).all() and (scale >= 1e-5 * 0.999).all()
  assert (codes * np.sign(w) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(rows, st.sampled_from(KINDS))
def test_activation_codes_are_integers_in_range(x, kind):
  codes, scale = map(np.asarray, activations(jnp.asarray(x), kind))
  low, high = RANGES[kind]
  assert (codes == np.round(codes)).all() and codes.min() >= low and codes.max() <= high
  assert np.isfinite(scale).all() and (scale > 0).all()
  if kind != 'int4':  # absmax never clips: the error is at most half a step
    error = np.abs(codes.astype(np.float64) * scale - x)
    assert (error <= 0.5 * scale.astype(np.float64) * (1 + 1e-4)).all()


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, (2, 16), elements=st.floats(-8, 8, width=16)),
       st.sampled_from(KINDS), st.integers(-8, 8))
def test_codes_do_not_change_with_the_scale_of_the_input(x, kind, exponent):
  x = np.where(np.abs(x).max(-1, keepdims=True) < 0.1, 1.0, x).astype(np.float32)
  factor = 2.0**exponent  # exact in floating point, and above the clamp of 1e-5
  codes, scale = activations(jnp.asarray(x), kind)
  scaled_codes, scaled_scale = activations(jnp.asarray(x * factor), kind)
  np.testing.assert_array_equal(codes, scaled_codes)
  np.testing.assert_array_equal(scale * factor, scaled_scale)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float32, (6, 5), elements=st.floats(-8, 8, width=16)), st.integers(-6, 6))
def test_ternary_codes_do_not_change_with_the_scale(w, exponent):
  w = np.where(np.abs(w).mean() < 0.05, w + 1, w).astype(np.float32)
  factor = 2.0**exponent
  np.testing.assert_array_equal(ternary(jnp.asarray(w))[0],
                                ternary(jnp.asarray(w * factor))[0])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('value', [0.0, 1e-30, 1e-6, 1e30, -1e30])
def test_constant_and_extreme_rows(kind, value):
  x = jnp.full((2, 16), value, jnp.float32)
  w = jnp.full((16, 4), value, jnp.float32)
  y, vjp = jax.vjp(lambda x, w: bit_matmul(x, w, kind), x, w)
  if abs(value) < 1e10:
    assert np.isfinite(y).all() and all(np.isfinite(g).all() for g in vjp(jnp.ones_like(y)))
  if value == 0.0:
    np.testing.assert_array_equal(y, np.zeros((2, 4)))
  codes, scale = activations(x, kind)
  assert np.isfinite(codes).all() and np.isfinite(scale).all()


# --- The quantised product ------------------------------------------------------


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('num_in', [64, 2560, 6912])
def test_product_equals_integers_bit_for_bit(kind, num_in, dtype):
  x = jnp.asarray(normal(5, num_in), dtype)
  w = jnp.asarray(normal(num_in, 24, seed=1))

  def with_codes(x, w):
    return bit_matmul(x, w, kind), quant.activations(x, kind), quant.ternary(w)

  for run, ulps in ((with_codes, 0), (jax.jit(with_codes), 3)):
    y, (x_codes, x_scale), (w_codes, w_scale) = run(x, w)
    assert y.dtype == dtype
    integers = np.asarray(x_codes, np.int32) @ np.asarray(w_codes, np.int32)
    scales = np.asarray(x_scale) * np.asarray(w_scale)[0]
    expected = jnp.asarray(integers.astype(np.float32) * scales).astype(dtype)
    # Compiled, XLA may multiply γ · (1/127) · α in another order: the integers stay exact
    # and only the roundings of the three products differ.
    tolerance = ulps * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(expected, np.float32),
                               rtol=tolerance, atol=0)


@pytest.mark.parametrize('num_in', [2560, 6912])
def test_compiled_sums_of_codes_are_exact_integers(num_in):
  # With max|X| = 127 and mean|W| = 1 both scales are 1, so Y must be the integer itself.
  random = np.random.default_rng(0)
  x = random.integers(-127, 128, (5, num_in)).astype(np.float32)
  x[:, 0] = 127
  w = random.choice([-1.0, 1.0], (num_in, 24)).astype(np.float32)
  y = jax.jit(bit_matmul, static_argnums=2)(jnp.asarray(x), jnp.asarray(w), 'int8')
  np.testing.assert_array_equal(y, x.astype(np.int64) @ w.astype(np.int64))


def test_largest_possible_sum_is_exact():
  # 127 · 6912 = 877,824 < 2²⁴: every code 127, every weight 1 (docs/methods/bitnet.md).
  y = bit_matmul(jnp.full((1, 6912), 3.0), jnp.full((6912, 1), 2.0), 'int8')
  exact = fractions.Fraction(3) * 2 * 6912
  assert float(y[0, 0]) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize('kind', ['none', *KINDS])
def test_straight_through_gradients(kind):
  x, w = jnp.asarray(normal(2, 3, 16)), jnp.asarray(normal(16, 6, seed=1))
  x = x.at[0, 0, 0].set(40.0)  # clipped by int4 absmean
  w = w.at[0, 0].set(9.0)  # clipped by ternary
  dy = jnp.asarray(normal(2, 3, 6, seed=2))
  _, vjp = jax.vjp(lambda x, w: bit_matmul(x, w, kind), x, w)
  dx, dw = vjp(dy)
  x_codes, x_scale = quant.activations(x, kind)
  w_codes, w_scale = quant.ternary(w)
  # The last digits differ by where the scales multiply in.
  np.testing.assert_allclose(dx, dy @ (w_codes * w_scale).T, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dw, jnp.einsum('bti,bto->io', x_codes * x_scale, dy), rtol=1e-5,
                             atol=1e-5)
  if kind == 'int4':
    assert x_codes[0, 0, 0] == 7 and np.abs(dx[0, 0, 0]) > 0
  assert w_codes[0, 0] == 1 and np.abs(dw[0, 0]) > 0


@pytest.mark.parametrize('kind', KINDS)
def test_gradient_is_that_of_the_detach_form(kind):
  """X + stop_gradient(Q(X) − X) is how the authors write the estimator."""
  x, w = jnp.asarray(normal(4, 16)), jnp.asarray(normal(16, 6, seed=1))

  def detach_form(x, w):
    x_codes, x_scale = quant.activations(x, kind)
    w_codes, w_scale = quant.ternary(w)
    x_q = x + jax.lax.stop_gradient(x_codes * x_scale - x)
    w_q = w + jax.lax.stop_gradient(w_codes * w_scale - w)
    return jnp.sum(jnp.sin(x_q @ w_q))

  ours = jax.grad(lambda x, w: jnp.sum(jnp.sin(bit_matmul(x, w, kind))), (0, 1))(x, w)
  for a, b in zip(ours, jax.grad(detach_form, (0, 1))(x, w)):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_bfloat16_gradients_keep_the_dtypes():
  x, w = jnp.asarray(normal(4, 16), jnp.bfloat16), jnp.asarray(normal(16, 6, seed=1))
  dx, dw = jax.grad(lambda x, w: bit_matmul(x, w, 'int8').sum().astype(jnp.float32),
                    (0, 1))(x, w)
  assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32


def test_linear_dispatch():
  x, w = jnp.asarray(normal(4, 16)), jnp.asarray(normal(16, 6, seed=1))
  gain = jnp.asarray(normal(16, seed=2))
  plain, bit = Quant(), Quant('ternary', 'int8')
  rotated = Quant('ternary', 'int8', hadamard=True)
  ops, axes = Ops(), ('ff', 'embed')
  normed = rms_norm(x, gain, 1e-5)
  equal = np.testing.assert_array_equal
  equal(linear(x, w, plain, ops, axes), x @ w)
  equal(linear(x, w, rotated, ops, axes), bit_matmul(x, w, 'int8'))
  equal(normed_linear(x, None, 1e-5, w, plain, ops, axes), x @ w)
  equal(normed_linear(x, gain, 1e-5, w, plain, ops, axes), normed @ w)
  equal(normed_linear(x, gain, 1e-5, w, bit, ops, axes), bit_matmul(normed, w, 'int8'))
  equal(normed_linear(x, gain, 1e-5, w, rotated, ops, axes),
        bit_matmul(quant.hadamard(normed), w, 'int8'))


# --- Packed weights -------------------------------------------------------------


def test_packed_weights_are_two_bits_and_give_the_same_product():
  w = jnp.asarray(normal(3, 16, 6))  # stacked over 3 layers
  tree = {'layers': {'w': w, 'norm': jnp.ones((3, 16))}}
  packed = quant.pack(tree, lambda path: path[-1].key == 'w')
  leaf = packed['layers']['w']
  assert leaf.codes.dtype == jnp.int2 and leaf.scale.shape == (3, 1, 1)
  assert packed['layers']['norm'] is tree['layers']['norm']
  x = jnp.asarray(normal(4, 16, seed=1))
  for layer in range(3):
    one = jax.tree.map(lambda a, layer=layer: a[layer], leaf)
    np.testing.assert_array_equal(bit_matmul(x, one, 'int8'), bit_matmul(x, w[layer], 'int8'))


def test_packed_weights_pass_the_gradient_to_the_activations():
  w, x = jnp.asarray(normal(16, 6)), jnp.asarray(normal(4, 16, seed=1))
  packed = quant.pack({'w': w}, lambda path: True)['w']
  loss = lambda x, w: jnp.sin(bit_matmul(x, w, 'int4')).sum()
  np.testing.assert_array_equal(jax.grad(loss)(x, packed), jax.grad(loss)(x, w))
