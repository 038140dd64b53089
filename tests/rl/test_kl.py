"""KL estimators: values and gradients in expectation, all tokens enumerated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.rl import kl

LOGITS = jnp.array([0.3, -1.0, 0.8, 0.1])
REFERENCE = jax.nn.log_softmax(jnp.array([-0.2, 0.4, 0.1, -1.5]))
POLICY = jax.nn.log_softmax(LOGITS)
PROBABILITY = jnp.exp(POLICY)


def test_by_hand():
  logp, reference = jnp.log(jnp.array([[[0.5]]])), jnp.log(jnp.array([[[0.25]]]))
  np.testing.assert_allclose(kl.k1(logp, reference), [[[np.log(2)]]], rtol=1e-6)
  np.testing.assert_allclose(kl.k2(logp, reference), [[[np.log(2)**2 / 2]]], rtol=1e-6)
  np.testing.assert_allclose(kl.k3(logp, reference), [[[0.5 + np.log(2) - 1]]], rtol=1e-6)


@pytest.mark.parametrize('estimator', [kl.k1, kl.k2, kl.k3])
def test_zero_where_the_policies_agree(estimator):
  np.testing.assert_array_equal(estimator(POLICY, POLICY), 0)


@pytest.mark.parametrize('distance', [1.0, 0.1])
def test_k1_and_k3_are_unbiased_and_k3_scatters_less_near_the_reference(distance):
  reference = jax.nn.log_softmax(POLICY + distance * (REFERENCE - POLICY))
  true = float((PROBABILITY * (POLICY - reference)).sum())
  spread = {}
  for estimator in (kl.k1, kl.k3):
    terms = estimator(POLICY, reference)
    assert float((PROBABILITY * terms).sum()) == pytest.approx(true, rel=1e-3)
    assert float(terms.min()) >= 0 or estimator is kl.k1
    spread[estimator] = float((PROBABILITY * jnp.square(terms - true)).sum())
  assert (spread[kl.k3] < spread[kl.k1]) == (distance == 0.1)


@pytest.mark.parametrize('estimator, divergence', [
    (kl.k1, lambda logits: 0.0 * logits.sum()),
    (kl.k2, lambda logits: (jax.nn.softmax(logits)
                            * (jax.nn.log_softmax(logits) - REFERENCE)).sum()),
    (kl.k3, lambda logits: (jnp.exp(REFERENCE)
                            * (REFERENCE - jax.nn.log_softmax(logits))).sum()),
])
def test_what_each_descends_in_a_loss(estimator, divergence):
  def loss(logits):  # tokens drawn by the policy, as data
    return (PROBABILITY * estimator(jax.nn.log_softmax(logits), REFERENCE)).sum()

  np.testing.assert_allclose(jax.grad(loss)(LOGITS), jax.grad(divergence)(LOGITS), atol=1e-6)


@pytest.mark.parametrize('distance', [-1e30, -1e4, -89.0, -21.0, 21.0, 89.0, 1e4, 1e30])
def test_k3_of_policies_however_far_apart_is_finite(distance):
  value, gradient = jax.value_and_grad(kl.k3)(jnp.float32(distance), jnp.float32(0.0))
  assert np.isfinite(value) and value > 19.9
  # No gradient beyond the bound of e^u; where e^u vanishes it is that of −u.
  assert gradient == (distance > 0)
