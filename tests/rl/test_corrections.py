"""Trainer–sampler corrections: by hand, and unbiased where they are not truncated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.rl import corrections

SAMPLER = np.array([[[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]]], np.float32)
LOGP = SAMPLER + np.log(np.array([[[3.0, 0.5, 1.0], [0.25, 0.5, 1.0]]], np.float32))
MASK = np.array([[[1.0, 1, 1], [1, 1, 0]]], np.float32)
ALL = (lambda *x: corrections.token_truncated(*x, 2.0),
       lambda *x: corrections.sequence_truncated(*x, 2.0),
       lambda *x: corrections.rejected(*x, 1.0, 1.0))


def test_by_hand():
  np.testing.assert_allclose(corrections.token_truncated(LOGP, SAMPLER, MASK, 2.0),
                             [[[2, 0.5, 1], [0.25, 0.5, 0]]], rtol=1e-5)
  # Products 1.5 and 0.125.
  np.testing.assert_allclose(corrections.sequence_truncated(LOGP, SAMPLER, MASK, 2.0),
                             [[[1.5] * 3, [0.125, 0.125, 0]]], rtol=1e-5)
  np.testing.assert_allclose(corrections.sequence_truncated(LOGP, SAMPLER, MASK, 1.2)[0, 0],
                             [1.2] * 3, rtol=1e-5)
  # Geometric means 1.5^⅓ = 1.145 and 0.125^½ = 0.354.
  for low, high, expected in ((0.5, 2.0, [1, 0]), (0.3, 2.0, [1, 1]), (0.3, 1.1, [0, 1])):
    np.testing.assert_array_equal(corrections.rejected(LOGP, SAMPLER, MASK, low, high),
                                  MASK * np.array(expected)[:, None])


@pytest.mark.parametrize('correction', ALL)
def test_identity_where_trainer_and_sampler_agree(correction):
  np.testing.assert_allclose(correction(LOGP, LOGP, MASK), MASK)


@pytest.mark.parametrize('correction', ALL)
def test_a_constant_of_the_gradient_that_ignores_masked_tokens(correction):
  gradient = jax.grad(lambda x: correction(x, SAMPLER, MASK).sum())(LOGP)
  np.testing.assert_array_equal(gradient, 0)
  np.testing.assert_array_equal(correction(np.where(MASK > 0, LOGP, -np.inf), SAMPLER, MASK),
                                correction(LOGP, SAMPLER, MASK))


def test_a_sequence_weight_without_truncation_restores_the_expectation():
  # Two tokens of two kinds; the second depends on the first. E_sampler[w f] = E_trainer[f].
  def joint(first, second):
    return {(a, b): first[a] * second[a][b] for a, b in itertools.product(range(2), range(2))}

  sampler = joint([0.5, 0.5], [[0.7, 0.3], [0.4, 0.6]])
  trainer = joint([0.8, 0.2], [[0.5, 0.5], [0.9, 0.1]])
  pairs = list(sampler)
  f = np.array([1.0, -2.0, 0.5, 4.0])

  def token_logs(table):
    first = [sum(p for q, p in table.items() if q[0] == a) for a in range(2)]
    return np.log([[first[a], table[a, b] / first[a]] for a, b in pairs], dtype=np.float32)[None]

  weights = corrections.sequence_truncated(token_logs(trainer), token_logs(sampler),
                                           np.ones((1, 4, 2), np.float32), 100.0)[0, :, 0]
  expected = sum(trainer[p] * x for p, x in zip(pairs, f, strict=True))
  got = sum(sampler[p] * float(w) * x for p, w, x in zip(pairs, weights, f, strict=True))
  assert got == pytest.approx(expected, rel=1e-5)
  assert jnp.all(corrections.sequence_truncated(
      token_logs(trainer), token_logs(sampler), np.ones((1, 4, 2), np.float32), 1.0) <= 1)


@pytest.mark.parametrize('cap', [1.0, 2.0, 1e30, 1e300])
def test_no_cap_lets_a_weight_overflow(cap):
  far = np.array([[[-1e30, -89.0, 89.0], [1e4, 1e30, 1e30]]], np.float32)
  for weights in (corrections.token_truncated(far, 0 * far, MASK, cap),
                  corrections.sequence_truncated(far, 0 * far, MASK, cap),
                  corrections.rejected(far, 0 * far, MASK, 1e-300, cap)):
    assert np.isfinite(weights).all() and (weights[0, 1, 2] == 0).all()
