"""Ternary weights with one scale for 128 inputs of an output, against their plain definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.config import Mesh, Model, Quant
from jaxrl_pt.errors import UserError
from jaxrl_pt.nn import quant
from jaxrl_pt.nn.linear import linear
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.parallel import kernels
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.parallel.rules import TRAIN
from pallas_kernels.ternary_matmul import ternary_matmul

AXES = ('embed', 'ff')


def draw(num_in, num_out, seed=0):
  """Codes, scales of float16 with one group of zeros, and the weights that they stand for."""
  random = np.random.default_rng(seed)
  codes = random.integers(-1, 2, (num_in, num_out)).astype(np.float32)
  codes[:128, 0] = 0
  scale = random.uniform(1e-3, 2, (num_in // 128, num_out)).astype(np.float16).astype(np.float32)
  scale = np.where(np.abs(codes).reshape(-1, 128, num_out).max(1) > 0, scale, 0)
  return codes, scale, codes * np.repeat(scale, 128, 0)


def test_ternary_weights_are_read_to_the_last_bit():
  codes, scale, w = draw(384, 5)
  for weights in (w, np.stack([w, 2 * w])):
    found, found_scale = jax.jit(quant.ternary_128)(jnp.asarray(weights))
    first = (lambda x: x) if weights.ndim == 2 else (lambda x: x[0])
    np.testing.assert_array_equal(first(found), codes)
    np.testing.assert_array_equal(first(found_scale), scale)
    np.testing.assert_array_equal(quant.dequantised(found, found_scale), weights)


def test_other_weights_take_the_nearest_of_three_values():
  w = np.zeros((256, 2), np.float32)
  w[:4, 0], w[128:131, 1] = [-2.0, 1.0, 0.9, 1.1], [4.0, -1.9, -2.1]
  codes, scale = quant.ternary_128(jnp.asarray(w))
  np.testing.assert_array_equal(scale, [[2, 0], [0, 4]])
  np.testing.assert_array_equal(codes[:4, 0], [-1, 0, 0, 1])  # 1.0 is halfway: to even
  np.testing.assert_array_equal(codes[128:131, 1], [1, 0, -1])


# In the shape 256 × 2 the scales are 2 × 2 and would broadcast against the outputs.
@pytest.mark.parametrize('num_in, num_out', [(128, 3), (256, 2), (384, 128)])
@pytest.mark.parametrize('kind', ['none', 'int8', 'int4'])
def test_the_product_is_the_definition(num_in, num_out, kind):
  codes, scale, w = draw(num_in, num_out)
  x = np.random.default_rng(1).standard_normal((4, num_in)).astype(np.float32)
  x_codes, x_scale = quant.activations(jnp.asarray(x), kind)
  parts = np.float64(x_codes).reshape(4, -1, 128, 1) * codes.reshape(1, -1, 128, num_out)
  expected = (parts.sum(2) * scale).sum(1) * np.float64(x_scale)
  packed = quant.TernaryWeight(jnp.asarray(codes, jnp.int2), jnp.asarray(scale))
  interpreted = kernels.kernel_ops(make_mesh(Mesh()), TRAIN, 'v5e', interpret=True)
  for weight in (jnp.asarray(w), packed):
    for ops in (Ops(), interpreted):
      y = linear(jnp.asarray(x), weight, Quant('ternary_128', kind), ops, AXES)
      np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


def test_gradients_are_straight_through():
  codes, scale, w = draw(256, 2)
  random = np.random.default_rng(2)
  x, dy = (random.standard_normal(s).astype(np.float32) for s in ((3, 256), (3, 2)))
  run = lambda x, w: linear(x, w, Quant('ternary_128'), Ops(), AXES)
  _, pull = jax.vjp(run, jnp.asarray(x), jnp.asarray(w))
  dx, dw = pull(jnp.asarray(dy))
  np.testing.assert_allclose(dx, dy @ w.T, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dw, x.T @ dy, rtol=1e-5, atol=1e-5)
  packed = quant.TernaryWeight(jnp.asarray(codes, jnp.int2), jnp.asarray(scale))
  dx = jax.grad(lambda x: (run(x, packed) * dy).sum())(jnp.asarray(x))
  np.testing.assert_allclose(dx, dy @ w.T, rtol=1e-5, atol=1e-5)


def test_the_kernel_refuses_such_scales():
  codes, scale, _ = draw(256, 128)
  with pytest.raises(ValueError, match='w_scale must be'):
    ternary_matmul(jnp.zeros((8, 256), jnp.int8), jnp.ones((8, 1)), jnp.asarray(codes, jnp.int2),
                   jnp.asarray(scale), activations='int8', out_dtype=jnp.float32, generation='v5e')


def test_what_has_no_such_groups_is_refused():
  with pytest.raises(UserError, match='d_ff = 64 is no multiple of 128'):
    Model(num_layers=1, d_model=128, d_ff=64, num_heads=2, num_kv_heads=1, head_dim=64,
          vocab_size=9, quant=Quant('ternary_128'))
  with pytest.raises(UserError, match="no imported model with 'ternary_128'"):
    Quant('ternary_128', 'int8', hadamard=True)
