"""The guard of a judge on curves that are known: deceived, honest, and noise."""

import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.rollouts.judge_guard import Guard, Point, is_deceived, trends

SETTINGS = cfg.JudgeGuard(window=5)


def alarms(rewards, accuracies, num=200, settings=SETTINGS, every=10) -> list[int]:
  """The numbers of the evaluations at which a run of these curves is warned."""
  guard = Guard(settings, num)
  return [k for k, both in enumerate(zip(rewards, accuracies, strict=True))
          if guard.note(k * every, *both)[1]]


def test_a_judge_that_is_deceived_is_noticed_once_the_window_is_full():
  rising, falling = np.linspace(0.5, 0.9, 9), np.linspace(0.6, 0.2, 9)
  assert alarms(rising, falling) == [4, 5, 6, 7, 8]


@pytest.mark.parametrize('rewards, accuracies', [
    (np.linspace(0.5, 0.9, 9), np.linspace(0.2, 0.6, 9)),  # Both rise.
    (np.linspace(0.9, 0.5, 9), np.linspace(0.6, 0.2, 9)),  # Both fall.
    (np.full(9, 0.5), np.linspace(0.6, 0.2, 9)),  # A judge without an opinion.
    (np.linspace(0.5, 0.9, 9), np.full(9, 0.4)),
    (np.linspace(0.5, 0.9, 4), np.linspace(0.6, 0.2, 4)),  # Too few of them.
    (np.linspace(0.5, 1.0, 9), np.zeros(9)), (np.ones(9), np.ones(9))])
def test_other_curves_give_no_alarm(rewards, accuracies):
  assert not alarms(rewards, accuracies)


def test_noise_gives_none_or_hardly_one():
  rng = np.random.default_rng(0)
  drawn = lambda share: rng.binomial(200, share, (4000, 5)) / 200
  found = [alarms(r, a) for r, a in zip(drawn(0.5), drawn(0.3), strict=True)]
  assert np.mean([bool(one) for one in found]) < 0.002  # 0.0005 by the normal distribution


def test_a_slope_within_noise_is_none_and_the_same_slope_of_more_problems_is_one():
  rewards, accuracies = np.linspace(0.5, 0.58, 5), np.linspace(0.5, 0.42, 5)
  assert not alarms(rewards, accuracies, num=100) and alarms(rewards, accuracies, num=2000) == [4]


def test_the_trends_are_slopes_in_units_of_their_error():
  points = [Point(10 * k, 0.5 + 0.02 * k, 0.5 - 0.01 * k, 10_000) for k in range(5)]
  found = trends(points, 5)
  # Σ (t − t̄)² = 1000; a slope of 0.002 a step, and of −0.001, with p (1 − p) / n near 25e-6.
  assert found.reward == pytest.approx(0.002 / np.sqrt(0.54 * 0.46 / 1e4 / 1000), rel=1e-3)
  assert found.accuracy == pytest.approx(-0.001 / np.sqrt(0.48 * 0.52 / 1e4 / 1000), rel=1e-3)
  assert trends([Point(-10, 0.9, 0.1, 10_000), *points], 5) == found  # What came before is over.
  assert trends(points, 6) == (0, 0) and is_deceived(found, 6.0) and not is_deceived(found, 7.0)


def test_a_guard_goes_on_from_its_checkpoint_as_if_it_had_never_stopped():
  rising, falling = np.linspace(0.5, 0.9, 9), np.linspace(0.6, 0.2, 9)
  whole, first = Guard(SETTINGS, 50), Guard(SETTINGS, 50)
  said = [whole.note(k, r, a) for k, (r, a) in enumerate(zip(rising, falling, strict=True))]
  for k in range(6):
    first.note(k, rising[k], falling[k])
  again = Guard(SETTINGS, 50)
  again.resume(first.saved())
  assert [again.note(k, rising[k], falling[k]) for k in range(6, 9)] == said[6:]
  assert 'has risen from 0.700 to 0.900' in said[-1][1] and 'step 4' in said[-1][1]
