"""The filters keep exactly the tokens that their definitions name."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.config import Sampler
from jaxrl_pt.models.logprobs import score
from jaxrl_pt.sampling import policies

LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.05, 0.2], np.float32)) + 3.0


def probabilities(sampler, logits=LOGITS):
  return np.asarray(jax.nn.softmax(policies.filtered_logits(jnp.asarray(logits), sampler)))


def slow(logits, sampler):
  """The definition, token by token."""
  if sampler.temperature == 0:
    p = np.zeros(len(logits))
    p[int(np.argmax(logits))] = 1.0
    return p
  z = np.asarray(logits, np.float64) / sampler.temperature
  p = np.exp(z - z.max())
  kept = sorted(range(len(z)), key=lambda i: -z[i])
  if sampler.top_k:
    kept = kept[:sampler.top_k]
  total, mass, nucleus = sum(p[i] for i in kept), 0.0, []
  for i in kept:
    if mass / total >= sampler.top_p:
      break
    nucleus.append(i)
    mass += p[i]
  out = np.zeros(len(z))
  out[nucleus] = p[nucleus]
  return out / out.sum()


@pytest.mark.parametrize('sampler, expected', [
    (Sampler(), [0.4, 0.05, 0.3, 0.05, 0.2]),
    (Sampler(temperature=0.0), [1, 0, 0, 0, 0]),
    (Sampler(top_k=2), [4 / 7, 0, 3 / 7, 0, 0]),
    (Sampler(top_p=0.65), [4 / 7, 0, 3 / 7, 0, 0]),
    (Sampler(top_p=0.75), [4 / 9, 0, 3 / 9, 0, 2 / 9]),
    (Sampler(top_p=0.01), [1, 0, 0, 0, 0]),
    (Sampler(top_k=3, top_p=0.5), [4 / 7, 0, 3 / 7, 0, 0]),
    (Sampler(top_k=4), [0.4, 0.05, 0.3, 0.05, 0.2]),  # the fourth and fifth tie
    (Sampler(top_k=99), [0.4, 0.05, 0.3, 0.05, 0.2]),
    (Sampler(temperature=0.5), np.square([0.4, 0.05, 0.3, 0.05, 0.2]) / 0.295),
])
def test_hand_computed_distributions(sampler, expected):
  np.testing.assert_allclose(probabilities(sampler), expected, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-400, 400), min_size=8, max_size=8, unique=True),
       st.floats(0.3, 2.0), st.integers(0, 8), st.sampled_from([0.2, 0.5, 0.77, 0.93, 1.0]))
def test_equals_the_slow_definition(values, temperature, top_k, top_p):
  sampler = Sampler(temperature, top_k, top_p)
  logits = np.array(values, np.float32) / 100
  expected = slow(logits, sampler)
  got = probabilities(sampler, logits)
  # A nucleus whose mass meets top_p up to round-off may hold one token more or less.
  if ((expected > 0) == (got > 0)).all():
    np.testing.assert_allclose(got, expected, atol=1e-5)
  else:
    assert abs(min(expected[expected > 0].sum(), 1) - 1) < 1e-5
    scaled = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    assert np.abs(np.cumsum(np.sort(scaled)[::-1]) - top_p).min() < 1e-5


def test_batched_rows_are_independent():
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), jnp.float32)
  sampler = Sampler(0.8, 5, 0.9)
  together = policies.filtered_logits(rows, sampler)
  for row, got in zip(rows, together):
    np.testing.assert_array_equal(policies.filtered_logits(row, sampler), got)


@pytest.mark.parametrize('sampler', [
    Sampler(), Sampler(0.7), Sampler(0.9, 3), Sampler(1.0, 0, 0.6)])
def test_learner_equals_sampler_on_drawn_tokens(sampler):
  logits = jnp.asarray(LOGITS)
  for token in np.flatnonzero(probabilities(sampler) > 0):
    learner = policies.learner_logits(logits, jnp.asarray(token), sampler)
    np.testing.assert_array_equal(learner, policies.filtered_logits(logits, sampler))


def test_learner_keeps_a_token_that_round_off_moved_out():
  learner = policies.learner_logits(jnp.asarray(LOGITS), jnp.asarray(4), Sampler(top_k=2))
  np.testing.assert_allclose(jax.nn.softmax(learner), [4 / 9, 0, 3 / 9, 0, 2 / 9], atol=1e-6)


@pytest.mark.parametrize('sampler', [Sampler(0.0), Sampler(0.7, 2), Sampler(1.0, 0, 0.6)])
def test_scores_and_gradients_of_filtered_logits_are_finite(sampler):
  def total(logits):
    scores = score(policies.learner_logits(logits, jnp.asarray(0), sampler), jnp.asarray(0))
    return scores.logp + scores.entropy

  value, gradient = jax.value_and_grad(total)(jnp.asarray(LOGITS))
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()
