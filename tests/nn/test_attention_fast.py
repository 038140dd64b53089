"""The fast paths of nn equal their definitions, in value and in gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.nn.attention import attention, causal_attention, packed_mask
from jaxrl_pt.nn.linear import matmul

# One range of queries, one and a bit, four ragged ones, and ranges of two blocks and a ragged end.
LENGTHS = [1, 64, 65, 301, 700]


def _inputs(length, num_heads=6, num_kv_heads=2, head_dim=8, dtype=jnp.float32):
  rng = np.random.default_rng(length)
  def draw(heads):
    return jnp.asarray(rng.normal(size=(2, length, heads, head_dim)), dtype)
  segments = jnp.asarray(np.sort(rng.integers(0, 4, (2, length)), axis=1)[:, ::-1])
  return (draw(num_heads), draw(num_kv_heads), draw(num_kv_heads)), segments, draw(num_heads)


def _value_and_gradient(attend, qkv, d_out):
  @jax.jit
  def both(qkv, d_out):
    out, vjp = jax.vjp(attend, *qkv)
    return out, *vjp(d_out)

  return both(tuple(qkv), d_out)


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('num_heads,num_kv_heads', [(4, 4), (6, 2)])
def test_causal_attention_equals_the_definition(length, num_heads, num_kv_heads):
  qkv, segments, d_out = _inputs(length, num_heads, num_kv_heads)
  mask = packed_mask(segments)
  slow = _value_and_gradient(lambda *a: attention(*a, mask), qkv, d_out)
  fast = _value_and_gradient(lambda *a: causal_attention(*a, segments), qkv, d_out)
  for expected, actual in zip(slow, fast, strict=True):
    # Float32 sums of up to 301 terms of size ~1 in another order.
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-5)


def test_causal_attention_is_safe_for_large_scores():
  (q, k, v), segments, d_out = _inputs(65)
  mask = packed_mask(segments)
  qkv = (300 * q, 300 * k, v)
  slow = attention(*qkv, mask)
  fast, *gradient = _value_and_gradient(lambda *a: causal_attention(*a, segments), qkv, d_out)
  np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=2e-5)
  assert all(bool(jnp.isfinite(g).all()) for g in gradient)


def test_causal_attention_in_bfloat16_is_about_as_near_float32_as_the_definition():
  qkv, segments, d_out = _inputs(130, dtype=jnp.bfloat16)
  mask = packed_mask(segments)
  exact = _value_and_gradient(lambda *a: attention(*a, mask),
                              [x.astype(jnp.float32) for x in qkv], d_out.astype(jnp.float32))
  slow = _value_and_gradient(lambda *a: attention(*a, mask), qkv, d_out)
  fast = _value_and_gradient(lambda *a: causal_attention(*a, segments), qkv, d_out)
  for reference, one, other in zip(exact, slow, fast, strict=True):
    assert other.dtype == jnp.bfloat16
    errors = [float(jnp.linalg.norm(x.astype(jnp.float32) - reference)) for x in (one, other)]
    # The backward pass starts from the output as rounded to bfloat16, the definition's does not.
    assert errors[1] <= 1.5 * errors[0]


def test_matmul_and_its_gradient_are_the_plain_product():
  rng = np.random.default_rng(0)
  x, w, dy = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 8), (8, 6), (2, 5, 6)))
  slow = _value_and_gradient(jnp.matmul, (x, w), dy)
  fast = _value_and_gradient(matmul, (x, w), dy)
  for expected, actual in zip(slow, fast, strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
