"""Objectives against numbers worked out by hand and finite differences."""

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from jaxrl_pt.rl import objectives as obj
from jaxrl_pt.rl import token_advantages

LOGP = jnp.array([[[-1.0, -2.0], [-3.0, -9.0]]])
ADVANTAGE = jnp.array([[[1.0, 1.0], [-2.0, -2.0]]])
MASK = jnp.array([[[1.0, 1.0], [1.0, 0.0]]])


@pytest.mark.parametrize('aggregate, expected', [
    # Token terms −A·logp: 1, 2 and −6.
    (obj.token_mean, (1 + 2 - 6) / 3),
    (obj.sequence_mean_token_mean, (1.5 - 6) / 2),
    (obj.sequence_mean_token_sum, (1 + 2 - 6) / 2),
    (obj.token_sum_over(4.0), (1 + 2 - 6) / 4),
])
def test_policy_gradient_by_hand(aggregate, expected):
  got = obj.policy_gradient(LOGP, ADVANTAGE)
  np.testing.assert_allclose(aggregate(got.terms, MASK), expected, rtol=1e-6)
  assert not got.clipped.any() and not got.beyond.any()


def test_gradient_reaches_masked_tokens_alone_and_never_the_advantage():
  def loss(logp, advantage):
    return obj.token_sum_over(2.0)(obj.policy_gradient(logp, advantage).terms, MASK)

  by_logp, by_advantage = jax.grad(loss, (0, 1))(LOGP, ADVANTAGE)
  np.testing.assert_allclose(by_logp, [[[-0.5, -0.5], [1.0, 0.0]]])
  np.testing.assert_array_equal(by_advantage, 0)


def test_wrong_shapes_are_refused():
  with pytest.raises(AssertionError):
    obj.policy_gradient(LOGP, ADVANTAGE[..., 0])


def test_sums_count_responses_differently():
  mask = MASK * jnp.array([1.0, 0])[:, None]  # the second response does not count
  np.testing.assert_allclose(obj.sequence_mean_token_sum(LOGP, mask), -3)
  np.testing.assert_allclose(obj.token_sum_over(2.0)(LOGP, mask), -1.5)
  for aggregate in (obj.token_mean, obj.sequence_mean_token_sum, obj.sequence_mean_token_mean):
    np.testing.assert_array_equal(aggregate(LOGP, 0 * MASK), 0)


# --- Ratios -----------------------------------------------------------------------

# ρ = 2, 0.5, 1.1, 0.9 under a positive and under a negative advantage.
RATIO = np.array([[[2.0, 0.5, 1.1, 0.9], [2.0, 0.5, 1.1, 0.9]]], np.float32)
OLD = np.array([[[-1.0, -2.0, -0.5, -3.0], [-1.5, -0.2, -2.5, -1.0]]], np.float32)
NEW = OLD + np.log(RATIO)
SIGNS = np.array([[[1.0] * 4, [-2.0] * 4]], np.float32)
ALL = np.ones_like(NEW)


def test_ppo_clip_by_hand():
  got = obj.ppo_clip(NEW, OLD, SIGNS, low=0.2, high=0.28)
  # A = 1: only ρ above 1.28 is cut. A = −2: only ρ below 0.8 is, and min keeps −2 · 2.
  np.testing.assert_allclose(got.terms, [[[-1.28, -0.5, -1.1, -0.9], [4, 1.6, 2.2, 1.8]]],
                             rtol=1e-5)
  np.testing.assert_array_equal(got.clipped, [[[1, 0, 0, 0], [0, 1, 0, 0]]])


def test_dual_clip_by_hand():
  got = obj.dual_clip(NEW, OLD, SIGNS, low=0.2, high=0.28, bound=1.5)
  np.testing.assert_allclose(got.terms, [[[-1.28, -0.5, -1.1, -0.9], [3, 1.6, 2.2, 1.8]]],
                             rtol=1e-5)
  np.testing.assert_array_equal(got.clipped, [[[1, 0, 0, 0], [1, 1, 0, 0]]])


def test_gspo_by_hand():
  mask = np.array([[[1.0, 1, 0, 0], [1, 1, 1, 1]]])
  # s = √(2 · ½) = 1 on the first; (2 · ½ · 1.1 · 0.9)^¼ on the second.
  s = 0.99**0.25
  got = obj.gspo(NEW, OLD, SIGNS, mask, low=0.1, high=0.1)
  np.testing.assert_allclose(got.terms, [[[-1.0] * 4, [2 * s] * 4]], rtol=1e-5)
  np.testing.assert_array_equal(got.clipped, np.zeros((1, 2, 4)))
  tight = obj.gspo(NEW, OLD, SIGNS, mask, low=1e-3, high=1e-3)
  np.testing.assert_allclose(tight.terms[0, 1], [2 * 0.999] * 4, rtol=1e-5)
  np.testing.assert_array_equal(tight.clipped[0, 1], [1] * 4)
  # (1/G) Σ s A of the paper, by the sequence mean.
  np.testing.assert_allclose(obj.sequence_mean_token_mean(got.terms, mask), (-1 + 2 * s) / 2,
                             rtol=1e-5)


def test_cispo_by_hand():
  got, gradient = jax.value_and_grad(
      lambda logp: obj.cispo(logp, OLD, SIGNS, low=0.4, high=0.28).terms.sum())(NEW)
  weight = np.array([1.28, 0.6, 1.1, 0.9])
  by_hand = -weight * SIGNS * NEW
  np.testing.assert_allclose(got, by_hand.sum(), rtol=1e-5)
  np.testing.assert_allclose(gradient, -weight * SIGNS, rtol=1e-5)  # no token lost its own
  np.testing.assert_array_equal(obj.cispo(NEW, OLD, SIGNS, low=0.4, high=0.28).clipped,
                                [[[1, 1, 0, 0]] * 2])
  # The paper's form has no lower bound.
  assert float(obj.cispo(NEW, OLD, SIGNS, low=1.0, high=0.2).clipped.sum()) == 2


SURROGATES = {
    'ppo': lambda logp, old: obj.ppo_clip(logp, old, SIGNS, low=0.2, high=0.28),
    'dual': lambda logp, old: obj.dual_clip(logp, old, SIGNS, low=0.2, high=0.28, bound=1.5),
    'gspo': lambda logp, old: obj.gspo(logp, old, SIGNS, ALL, low=0.2, high=0.28),
    'cispo': lambda logp, old: obj.cispo(logp, old, SIGNS, low=0.4, high=0.28),
}


@pytest.mark.parametrize('name', ['ppo', 'dual', 'gspo'])
def test_gradients_equal_finite_differences(name):
  def loss(logp):
    return obj.token_mean(SURROGATES[name](logp, OLD).terms, ALL)

  check_grads(loss, (jnp.asarray(NEW),), order=1, modes=['rev'], eps=1e-2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', ['ppo', 'dual'])
def test_clipped_tokens_have_no_gradient_and_the_others_do(name):
  gradient = jax.grad(lambda logp: SURROGATES[name](logp, OLD).terms.sum())(NEW)
  np.testing.assert_array_equal(gradient == 0, SURROGATES[name](NEW, OLD).clipped == 1)


@pytest.mark.parametrize('name', SURROGATES)
@pytest.mark.parametrize('aggregate', [
    obj.token_mean, obj.sequence_mean_token_sum, obj.sequence_mean_token_mean,
    obj.token_sum_over(3.0)])
def test_at_one_step_per_batch_all_share_the_gradient(name, aggregate):
  mask = np.array([[[1.0, 1, 1, 0], [1, 1, 0, 0]]], np.float32)
  on_policy = jax.grad(lambda logp: aggregate(obj.policy_gradient(logp, SIGNS).terms, mask))(NEW)
  if name == 'gspo':
    surrogate = lambda logp: obj.gspo(logp, NEW, SIGNS, mask, low=0.2, high=0.28)
  else:
    surrogate = lambda logp: SURROGATES[name](logp, NEW)
  got = jax.grad(lambda logp: aggregate(surrogate(logp).terms, mask))(NEW)
  np.testing.assert_allclose(got, on_policy, rtol=1e-5, atol=1e-7)
  assert float((surrogate(NEW).clipped * mask).sum()) == 0


FAR = np.array([-1e25, -1e4, -89.0, -21.0, 0.0, 21.0, 89.0, 1e4, 1e25], np.float32)


@pytest.mark.parametrize('name', ['ppo', 'dual', 'gspo', 'cispo'])
@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_however_far_apart_the_policies_are_nothing_overflows(name, sign):
  """exp of a log ratio above 88 is infinite, and a `where` behind it leaves a NaN gradient."""
  old = jnp.zeros((1, len(FAR), 1))
  ones = jnp.full(old.shape, sign)
  call = {
      'ppo': lambda logp: obj.ppo_clip(logp, old, ones, low=0.2, high=0.2),
      'dual': lambda logp: obj.dual_clip(logp, old, ones, low=0.2, high=0.2, bound=3.0),
      'gspo': lambda logp: obj.gspo(logp, old, ones, jnp.ones_like(old), low=0.2, high=0.2),
      'cispo': lambda logp: obj.cispo(logp, old, ones, low=1.0, high=1e30)}[name]
  logp = jnp.asarray(FAR)[None, :, None]
  terms, pull_back = jax.vjp(lambda x: call(x).terms, logp)
  gradient, = pull_back(jnp.ones_like(terms))
  assert np.isfinite(terms).all() and np.isfinite(gradient).all()
  far = np.abs(FAR) > 20
  np.testing.assert_array_equal(call(logp).beyond[0, :, 0], far)
  if name != 'cispo':  # Whose weight is a constant: a token keeps its gradient.
    np.testing.assert_array_equal(gradient[0, far, 0], 0)
    np.testing.assert_allclose(terms[0, FAR == 0, 0], -sign)


def test_the_ratio_of_a_token_that_was_all_but_impossible():
  """logp 0, old −89, A = 1: clipped to 1.2, and no gradient."""
  zeros, ones = jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))
  call = lambda logp: obj.ppo_clip(logp, zeros - 89, ones, low=0.2, high=0.2)
  np.testing.assert_allclose(call(zeros).terms, -1.2, rtol=1e-6)
  np.testing.assert_array_equal(jax.grad(lambda x: call(x).terms.sum())(zeros), 0)


def test_no_gradient_reaches_the_old_policy_or_the_advantage():
  for call in (
      lambda old, a: obj.ppo_clip(NEW, old, a, low=0.2, high=0.2),
      lambda old, a: obj.dual_clip(NEW, old, a, low=0.2, high=0.2, bound=3.0),
      lambda old, a: obj.gspo(NEW, old, a, ALL, low=0.2, high=0.2),
      lambda old, a: obj.cispo(NEW, old, a, low=0.2, high=0.2)):
    for gradient in jax.grad(lambda *x, call=call: call(*x).terms.sum(), (0, 1))(OLD, SIGNS):
      np.testing.assert_array_equal(gradient, 0)


# --- Measures ---------------------------------------------------------------------


def test_gap():
  sampler = LOGP + jnp.array([[[jnp.log(2.0), -jnp.log(3.0)], [0.0, -jnp.inf]]])
  mismatch = obj.sampler_trainer_mismatch(LOGP, sampler, MASK)
  np.testing.assert_allclose(mismatch.mean(), (2 + 3 + 1) / 3, rtol=1e-6)
  np.testing.assert_allclose(obj.sampler_trainer_mismatch(LOGP, LOGP, MASK).mean(), 1)
  assert np.isfinite(obj.sampler_trainer_mismatch(LOGP - 1e30, LOGP, MASK).mean())


def test_zero_advantage_groups():
  advantage = jnp.array([[0.0, 0.0], [1.0, -1.0], [0.0, 0.0], [1e-8, -1e-8]])
  valid = jnp.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
  silent = obj.zero_advantage_groups(advantage, valid)
  assert (float(silent.sum), float(silent.count)) == (2, 3)


def test_gradient_variance_by_hand_and_against_autodiff():
  advantage = jnp.array([[[2.0, 2.0], [-1.0, -1.0]], [[3.0, 0.0], [1.0, 1.0]]])
  mask = jnp.array([[[1.0, 1], [1, 0]], [[0, 0], [1, 1]]])
  got = obj.gradient_variance(advantage, jnp.ones_like(mask), mask)
  assert (float(got.sum), float(got.count)) == (4 + 4 + 1 + 1 + 1, 3)

  logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4, 5)), jnp.float32)
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, 5, (1, 3, 4)))
  weights = jnp.asarray(np.random.default_rng(2).normal(size=(1, 3, 4)), jnp.float32)

  def log_likelihood(logits):
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    return (weights * logp).sum(), logp

  gradient, logp = jax.grad(log_likelihood, has_aux=True)(logits)
  collision = jnp.square(jax.nn.softmax(logits)).sum(-1)
  got = obj.gradient_variance(weights, token_advantages.score_norm(logp, collision),
                              jnp.ones_like(logp))
  np.testing.assert_allclose(got.sum, jnp.square(gradient).sum(), rtol=1e-5)
