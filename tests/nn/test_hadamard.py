"""The rotation: orthonormal, Sylvester's, its own inverse; and why 4 bits need it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import transformer
from jaxrl_pt.nn import quant

POWERS = (1, 2, 4, 8, 64, 128, 256, 1024, 4096)
OTHERS = (12, 20, 192, 384, 2560, 6912)


def matrix(n):
  """H with X_r = X Hᵀ, from the rotation of the unit vectors."""
  return np.asarray(quant.hadamard(jnp.eye(n))).T


@pytest.mark.parametrize('n', [*POWERS, *OTHERS])
def test_factors_are_hadamard_matrices(n):
  factors = quant.hadamard_factors(n)
  assert np.prod([f.shape[0] for f in factors]) == n
  for f in factors:
    assert np.isin(f, [-1, 1]).all()
    np.testing.assert_array_equal(f @ f.T, f.shape[0] * np.eye(f.shape[0]))


@pytest.mark.parametrize('n', [1, 2, 8, 12, 20, 128, 192, 256, 384, 1024])
def test_rotation_is_the_kronecker_product_and_orthonormal(n):
  h = matrix(n).astype(np.float64)  # The product below rounds differently on every processor.
  kron = np.ones((1, 1))
  for f in quant.hadamard_factors(n):
    kron = np.kron(kron, f)
  np.testing.assert_allclose(h, kron / n**0.5, atol=1e-6)
  np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-6)


@pytest.mark.parametrize('n', [2560, 6912, 4096])
def test_wide_rotations_keep_lengths_and_angles(n):
  x = np.random.default_rng(0).standard_normal((8, n)).astype(np.float32)
  y = np.asarray(quant.hadamard(jnp.asarray(x)), np.float64)
  # ‖HHᵀ − I‖ seen through eight vectors: inner products of size n, float32 rounding.
  np.testing.assert_allclose(y @ y.T, x.astype(np.float64) @ x.T.astype(np.float64),
                             atol=1e-5 * n)


@pytest.mark.parametrize('n', [1, 2, 4, 64, 256, 1024])
def test_powers_of_two_are_sylvester_symmetric_and_own_inverse(n):
  h = matrix(n)
  np.testing.assert_allclose(h, scipy.linalg.hadamard(n) / n**0.5, atol=1e-6)
  np.testing.assert_array_equal(h, h.T)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((3, n)), jnp.float32)
  np.testing.assert_allclose(quant.hadamard(quant.hadamard(x)), x, atol=2e-6)


@pytest.mark.parametrize('n', [12, 20, 64, 192])
def test_gradient_is_the_transpose(n):
  x, dy = np.random.default_rng(0).standard_normal((2, 3, n)).astype(np.float32)
  y, vjp = jax.vjp(quant.hadamard, jnp.asarray(x))
  np.testing.assert_allclose(y, x @ matrix(n).T, atol=1e-5)
  np.testing.assert_allclose(vjp(jnp.asarray(dy))[0], dy @ matrix(n), atol=1e-5)
  if n in (12, 20):  # Paley factors are not symmetric, so the transpose is no formality
    assert np.abs(matrix(n) - matrix(n).T).max() > 0.1


@pytest.mark.parametrize('n', [3, 6, 10, 28, 52, 172, 2561])
def test_impossible_widths_raise(n):
  with pytest.raises(ValueError, match=f'order {n} '):
    quant.hadamard(jnp.ones((1, n)))


@pytest.mark.parametrize('heads, ff, words', [
    (4, 172, r'd_ff = 172.*use a width of 2\^k'),
    (7, 128, r'num_heads × head_dim = 28.*Quant.hadamard = False'),
])
def test_impossible_widths_stop_the_build_with_a_sentence(heads, ff, words):
  config = cfg.Model(num_layers=1, d_model=32, d_ff=ff, num_heads=heads, num_kv_heads=1,
                     head_dim=4, vocab_size=8, quant=cfg.Quant('ternary', 'int8', hadamard=True))
  with pytest.raises(UserError, match=words):
    transformer.build(config)


def test_bfloat16_is_rotated_in_float32():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 256)), jnp.bfloat16)
  y = quant.hadamard(x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, quant.hadamard(x.astype(jnp.float32)).astype(jnp.bfloat16))


# --- The mechanism of the paper (docs/methods/bitnet_v2.md) ---------------------

WIDTH, TOKENS = 4096, 64


def inputs(name):
  random = np.random.default_rng(0)
  a, b = random.standard_normal((2, TOKENS, WIDTH)).astype(np.float32)
  match name:
    case 'gaussian':
      x = a
    case 'outlier_channels':
      x = a.copy()
      x[:, random.choice(WIDTH, 8, replace=False)] *= 60
    case 'silu_gated':  # of a gate of standard deviation 2
      x = 2 * a / (1 + np.exp(-2 * a)) * b
    case _:
      x = np.maximum(a, 0)**2 * b
  return jnp.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True)), jnp.float32)


def sqnr_db(x, kind, rotate):
  x = quant.hadamard(x) if rotate else x
  codes, scale = quant.activations(x, kind)
  signal, noise = jnp.square(x).mean(), jnp.square(codes * scale - x).mean()
  return float(10 * jnp.log10(signal / noise))


@pytest.mark.parametrize('name, kind, plain, rotated', [
    ('gaussian', 'int4', 18.8, 18.8), ('outlier_channels', 'int4', 1.0, 20.4),
    ('silu_gated', 'int4', 4.7, 18.9), ('relu2_gated', 'int4', 2.3, 18.9),
    ('gaussian', 'int4_absmax', 16.1, 16.0), ('outlier_channels', 'int4_absmax', 8.2, 17.9),
    ('silu_gated', 'int4_absmax', 10.8, 16.1), ('relu2_gated', 'int4_absmax', 9.9, 16.1),
    ('gaussian', 'int8', 41.2, 41.2), ('outlier_channels', 'int8', 21.2, 43.1),
    ('silu_gated', 'int8', 32.5, 41.3), ('relu2_gated', 'int8', 32.2, 41.3),
])
def test_signal_to_quantisation_noise(name, kind, plain, rotated):
  x = inputs(name)
  assert sqnr_db(x, kind, False) == pytest.approx(plain, abs=0.5)
  assert sqnr_db(x, kind, True) == pytest.approx(rotated, abs=0.5)


@pytest.mark.parametrize('name', ['silu_gated', 'relu2_gated'])
def test_rotation_makes_activations_gaussian(name):
  def kurtosis(x):
    return float((x**4).mean() / (x**2).mean()**2)
  x = inputs(name)
  assert kurtosis(x) > 10
  assert kurtosis(quant.hadamard(x)) == pytest.approx(3.0, abs=0.1)
