"""Every branch of the length rewards, by hand, and what the gate does over time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.rl import shaping

ONES = jnp.ones((1, 4))


def test_overlong_by_hand():
  lengths = jnp.array([[1.0, 80, 81, 90, 100, 130]])
  np.testing.assert_allclose(shaping.overlong(lengths, 100, 20), [[0, 0, -0.05, -0.5, -1, -1]],
                             rtol=1e-6)


def test_kimi_by_hand():
  lengths = jnp.array([[10.0, 20, 30, 50], [7, 7, 7, 7], [10, 50, 20, 999]])
  correct = jnp.array([[1.0, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 1]])
  valid = jnp.ones((3, 4)).at[2, 3].set(0)
  # λ = 0.5, 0.25, 0, −0.5: a short wrong answer gains nothing, a long one loses.
  np.testing.assert_allclose(shaping.kimi(lengths, correct, valid),
                             [[0.5, 0, 0, -0.5], [0] * 4, [0, -0.5, 0.25, 0]], atol=1e-6)


def test_short_reward_by_hand():
  lengths = jnp.array([[10.0, 30, 50, 5]])
  correct = jnp.array([[1.0, 1, 1, 0]])
  short = functools.partial(shaping.correct_and_short, lengths, correct, ONES)
  np.testing.assert_allclose(short(0), [[0.5, 0, -0.5, 0]], atol=1e-5)
  np.testing.assert_allclose(short(20), [[0.5, 0.5, -0.5, 0]], atol=1e-5)  # ℓ_min + τ included
  np.testing.assert_allclose(short(40), [[0.5, 0.5, 0.5, 0]], atol=1e-5)
  np.testing.assert_allclose(short(39), [[0.5, 0.5, -0.5, 0]], atol=1e-5)  # the cliff at τ


def test_short_reward_of_equal_lengths_of_none_and_of_one():
  lengths = jnp.array([[9.0, 9, 9, 9], [1, 2, 3, 4], [8, 2, 9, 4]])
  correct = jnp.array([[1.0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]])
  valid = jnp.ones((3, 4)).at[2, 3].set(0)
  np.testing.assert_allclose(shaping.correct_and_short(lengths, correct, valid, 0),
                             [[0.5, 0.5, 0, 0.5], [0] * 4, [0.5, 0, 0, 0]], atol=1e-6)


def test_without_the_correctness_gate_short_wrong_answers_are_paid():
  lengths = jnp.array([[10.0, 30, 50, 5]])
  np.testing.assert_allclose(shaping.correct_and_short(lengths, ONES, ONES, 0)[0, 3], 0.5)


def run_gate(accuracies, slack, ema=0.0):
  """Whether the gate is open at each step, and acc_ref after it."""
  def step(reference, accuracy):
    is_open, reference = shaping.accuracy_gate(reference, accuracy, slack, ema)
    return reference, (is_open, reference)

  return jax.lax.scan(step, jnp.zeros(()), jnp.asarray(accuracies, jnp.float32))[1]


def test_gate_of_the_maximum_by_hand():
  is_open, best = run_gate([0.5, 0.45, 0.4, 0.7, 0.64, 0.66, 0.9], 0.05)
  # The new maxima 0.7 and 0.9 open it at once: the update comes before the test.
  np.testing.assert_array_equal(is_open, [1, 1, 0, 1, 0, 1, 1])
  np.testing.assert_allclose(best, [0.5, 0.5, 0.5, 0.7, 0.7, 0.7, 0.9])


def test_gate_of_the_average_by_hand():
  is_open, average = run_gate([0.8, 0.4, 0.3, 0.5], 0.05, ema=0.5)
  np.testing.assert_allclose(average, [0.4, 0.4, 0.35, 0.425])
  np.testing.assert_array_equal(is_open, [1, 1, 1, 1])
  is_open, _ = run_gate([0.8, 0.8, 0.8, 0.3], 0.05, ema=0.5)
  np.testing.assert_array_equal(is_open, [1, 1, 1, 0])


@pytest.mark.parametrize('num_prompts, low, high', [(8, 0.0, 0.1), (512, 0.8, 1.0)])
def test_a_maximum_closes_the_gate_of_small_batches(num_prompts, low, high):
  # The accuracy rises from 0.10 to 0.85 over 1,687 steps of 8 samples (docs/methods/short_rl.md).
  random = np.random.default_rng(0)
  mean = np.linspace(0.10, 0.85, 1687)[:, None]
  prompt = random.beta(2 * mean, 2 * (1 - mean), (1687, num_prompts))
  accuracy = random.binomial(8, prompt).mean(-1) / 8
  by_maximum = float(run_gate(accuracy, 0.05)[0].mean())
  by_average = float(run_gate(accuracy, 0.05, ema=0.9)[0].mean())
  assert low <= by_maximum <= high
  assert by_average > 0.6


def test_short_rl_adds_nothing_behind_a_closed_gate_and_keeps_its_state():
  lengths = jnp.array([[10.0, 30, 50, 5]])
  hook = jax.jit(functools.partial(shaping.short_rl, slack_tokens=0, slack_accuracy=0.05))
  right = jnp.array([[1.0, 1, 1, 0]])
  bonus, is_open, state = hook(jnp.zeros(()), lengths, right, ONES)
  np.testing.assert_allclose(bonus, [[0.5, 0, -0.5, 0]], atol=1e-5)
  assert (float(is_open), float(state)) == (1, 0.75)
  bonus, is_open, state = hook(state, lengths, right.at[0, 0].set(0), ONES)
  np.testing.assert_array_equal(bonus, 0)
  assert (float(is_open), float(state)) == (0, 0.75)
  # Accuracy counts valid rows: one wrong row not verified, 2 of 3 are right, under 0.75 − 0.05.
  valid = ONES.at[0, 3].set(0)
  _, is_open, after = hook(state, lengths, right.at[0, 0].set(0), valid)
  assert (float(is_open), float(after)) == (0, 0.75)
  _, is_open, after = hook(state, lengths, right, valid)
  assert (float(is_open), float(after)) == (1, 1)


def test_a_batch_that_nobody_verified_leaves_the_gate_alone():
  for ema in (0.0, 0.9):
    bonus, is_open, state = shaping.short_rl(
        jnp.float32(0.5), jnp.array([[10.0, 30, 50, 5]]), ONES, 0 * ONES, slack_tokens=5,
        slack_accuracy=1.0, ema=ema)
    np.testing.assert_array_equal(bonus, 0)
    assert (float(is_open), float(state)) == (0, 0.5)
