"""Scores of given tokens: by hand, chunked ≡ whole, and no [B, T, V] in float32."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.models.logprobs import score, token_logprobs

B, T, D, V = 3, 7, 8, 50


def draw():
  keys = jax.random.split(jax.random.key(0), 3)
  return (jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V)),
          jax.random.randint(keys[2], (B, T), 0, V))


def test_by_hand():
  # p = (1/2, 1/4, 1/4): entropy = 1.5 bits.
  logits = jnp.log(jnp.asarray([[2.0, 1.0, 1.0]])) + 5
  for target, p in ((0, 0.5), (1, 0.25)):
    scores = score(logits, jnp.asarray([target]))
    assert float(scores.logp[0]) == pytest.approx(math.log(p), abs=1e-6)
    assert float(scores.entropy[0]) == pytest.approx(1.5 * math.log(2), abs=1e-6)
    assert float(scores.correct[0]) == (target == 0)


def test_transform_acts_on_logits_in_every_chunk():
  hidden, head, targets = draw()
  expected = score(hidden @ head / 0.7, targets)
  for chunk in (0, 4):
    actual = token_logprobs(hidden, head, targets, chunk, lambda logits, _: logits / 0.7)
    np.testing.assert_allclose(actual.logp, expected.logp, atol=1e-5)
    np.testing.assert_allclose(actual.entropy, expected.entropy, atol=1e-5)


def test_huge_logits_stay_finite():
  scores = score(jnp.asarray([[1e4, -1e4, 0.0]]), jnp.asarray([1]))
  assert float(scores.logp[0]) == -2e4 and float(scores.entropy[0]) == 0.0


# 5 does not divide the 21 tokens, 21 and 100 take them all at once.
@pytest.mark.parametrize('chunk', [1, 4, 5, 7, 21, 100])
def test_chunked_equals_whole_in_value_and_gradient(chunk):
  hidden, head, targets = draw()
  weights = jax.random.uniform(jax.random.key(3), (B, T))

  def total(hidden, head, chunk):
    scores = token_logprobs(hidden, head, targets, chunk)
    return (scores.logp * weights).sum() + (scores.entropy * weights).sum()

  whole, chunked = (token_logprobs(hidden, head, targets, c) for c in (0, chunk))
  for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole)):
    assert a.shape == (B, T)
    np.testing.assert_allclose(a, b, atol=1e-5)
  grads = [jax.grad(total, (0, 1))(hidden, head, c) for c in (0, chunk)]
  for a, b in zip(*grads):
    np.testing.assert_allclose(a, b, atol=2e-5)


def compiled_gradient(chunk, num_rows=8, length=64, width=16, vocab=4096):
  def loss(hidden, head, targets):
    return token_logprobs(hidden, head, targets, chunk).logp.sum()

  arguments = (jax.ShapeDtypeStruct((num_rows, length, width), jnp.float32),
               jax.ShapeDtypeStruct((width, vocab), jnp.float32),
               jax.ShapeDtypeStruct((num_rows, length), jnp.int32))
  return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()


def largest_float32(compiled):
  shapes = re.findall(r'f32\[([\d,]+)\]', compiled.as_text())
  return max(math.prod(map(int, shape.split(','))) for shape in shapes)


def test_no_float32_array_of_all_logits_exists():
  all_logits, chunk_logits = 8 * 64 * 4096, 32 * 4096
  whole, chunked = compiled_gradient(0), compiled_gradient(32)
  assert largest_float32(whole) == all_logits  # the check can see them
  assert largest_float32(chunked) == chunk_logits
  # A few live arrays of one chunk's logits; 16 chunks would be four times the bound.
  assert chunked.memory_analysis().temp_size_in_bytes < 4 * 4 * chunk_logits + 4 * 2 * 16 * 4096
  assert whole.memory_analysis().temp_size_in_bytes >= 4 * all_logits
