"""The scaling law on curves whose parameters are known."""

import numpy as np
import pytest

from jaxrl_pt.scaling import fit

COMPUTE = np.array([1.0, 2, 4, 8, 16, 32, 64])
RISING = fit.PowerLaw(amplitude=-0.3, exponent=0.5, limit=0.6)


@pytest.mark.parametrize('law', [
    RISING, fit.PowerLaw(0.4, 0.7, 0.1),  # falling: A > 0
    fit.PowerLaw(-0.2, 2.5, 0.9)])
def test_finds_the_law_of_an_exact_curve_in_any_unit(law):
  for unit in (1.0, 1e20):
    found = fit.fit_law(COMPUTE * unit, law(COMPUTE))
    np.testing.assert_allclose(found.exponent, law.exponent, rtol=1e-4)
    np.testing.assert_allclose(found.limit, law.limit, atol=1e-5)
    np.testing.assert_allclose(found.amplitude * unit ** -found.exponent, law.amplitude, rtol=1e-4)
    assert np.sign(found.amplitude) == np.sign(law.amplitude)


def test_by_hand():
  # 0.5 − 0.4/C at C = 1, 2, 4: 0.1, 0.3, 0.4.
  found = fit.fit_law(np.array([1.0, 2, 4]), np.array([0.1, 0.3, 0.4]))
  np.testing.assert_allclose([found.amplitude, found.exponent, found.limit], [-0.4, 1, 0.5],
                             rtol=1e-4)
  np.testing.assert_allclose(found(np.array([8.0])), 0.45, rtol=1e-4)


def test_the_limit_of_an_accuracy_stays_in_the_unit_interval():
  # A line in log C: without the bound the limit runs away.
  found = fit.fit_law(COMPUTE, 0.1 + 0.1 * np.log(COMPUTE))
  assert 0 <= found.limit <= 1
  # At a fixed exponent the bounded pair is a minimum: no neighbour inside the bound is better.
  power = COMPUTE ** -0.5
  accuracy = 1.3 - 0.5 * power
  bounded = fit._given_exponent(COMPUTE, accuracy, 0.5)
  assert bounded.limit == 1
  cost = lambda a, limit: np.square(a * power + limit - accuracy).sum()
  best = cost(bounded.amplitude, 1.0)
  for a in np.linspace(-1, 1, 41):
    for limit in np.linspace(0, 1, 21):
      assert cost(a, limit) >= best - 1e-12


# One run cannot show how much of the noise its points share.
@pytest.mark.parametrize('num_runs, shared', [
    (1, 0.0), pytest.param(3, 0.0, marks=pytest.mark.slow), (3, 0.5)])
def test_intervals_hold_the_truth_as_often_as_they_say(num_runs, shared):
  # The computes of 2506.08007.
  compute, law = np.array([1.0, 2, 4, 8, 10, 12]), fit.PowerLaw(-0.25, 0.5, 0.5)
  rng, num_trials, held, narrowest = np.random.default_rng(0), 100, [], np.inf
  for _ in range(num_trials):
    own, common = rng.normal(size=(num_runs, len(compute))), rng.normal(size=(num_runs, 1))
    noise = np.sqrt(1 - shared) * own + np.sqrt(shared) * common
    runs = law(compute) + 0.003 * noise
    found, forecast = fit.fit(compute, runs), fit.forecast_last(compute, runs)
    held.append([interval.low <= truth <= interval.high for interval, truth in (
        (found.amplitude, -0.25), (found.exponent, 0.5), (found.limit, 0.5),
        (forecast.interval, law(compute[-1])),
        (forecast.measured_interval, forecast.measured))])
    for interval, value in ((found.amplitude, found.law.amplitude),
                            (found.exponent, found.law.exponent),
                            (found.limit, found.law.limit),
                            (forecast.interval, forecast.predicted)):
      assert interval.low < value < interval.high
    narrowest = min(narrowest, found.limit.high - found.limit.low)
  # 95 less 3.2 standard errors of a count; the last may hold more than it says.
  assert np.all(np.sum(held, 0) >= 88) and np.all(np.sum(held, 0)[:4] < num_trials), np.sum(held, 0)
  assert narrowest < 0.5  # Not by holding everything.


def test_intervals_do_not_depend_on_the_unit_of_compute():
  runs = RISING(COMPUTE) + np.random.default_rng(3).normal(0, 0.01, (3, len(COMPUTE)))
  one, other = (fit.fit(COMPUTE * unit, runs) for unit in (1.0, 1e20))
  for name in ('exponent', 'limit'):
    a, b = getattr(one, name), getattr(other, name)
    np.testing.assert_allclose((a.low, a.high), (b.low, b.high), rtol=1e-3)
  # A = a · unit^exponent for each law of the region: a power of the unit apart.
  assert np.log10(other.amplitude.low / other.amplitude.high) > 1


def test_ends_of_the_intervals_by_refitting():
  # At an end of the limit's interval the best law with that limit costs exactly the budget:
  # R · (cost − best cost) = t² · s², here with one run, 7 points, 4 degrees of freedom.
  run = RISING(COMPUTE) + np.random.default_rng(4).normal(0, 0.01, len(COMPUTE))
  found = fit.fit(COMPUTE, run[None])
  cost_of = lambda law: np.square(law(COMPUTE) - run).sum()
  best = cost_of(found.law)
  budget = best * (1 + 2.7764451 ** 2 / 4)  # t of 0.975 with 4 degrees of freedom
  exponents = np.geomspace(*fit.EXPONENTS, 20_001)
  powers = COMPUTE ** -exponents[:, None]
  for limit in (found.limit.low, found.limit.high):
    amplitudes = (powers * (run - limit)).sum(1) / np.square(powers).sum(1)
    costs = np.square(amplitudes[:, None] * powers + limit - run).sum(1)
    np.testing.assert_allclose(costs.min(), budget, rtol=1e-3)
  for exponent in (found.exponent.low, found.exponent.high):
    np.testing.assert_allclose(cost_of(fit._given_exponent(COMPUTE, run, exponent)), budget,
                               rtol=1e-6)


def test_without_noise_or_without_freedom():
  exact = fit.fit(COMPUTE, RISING(COMPUTE)[None])
  assert exact.limit.high - exact.limit.low < 1e-4
  # Three points of one run fit exactly whatever the noise: nothing can be said.
  three = fit.fit(COMPUTE[:3], RISING(COMPUTE[:3])[None])
  assert (three.limit.low, three.limit.high) == (0, 1)
  assert (three.amplitude.low, three.amplitude.high) == (-np.inf, np.inf)
  np.testing.assert_allclose((three.exponent.low, three.exponent.high), fit.EXPONENTS)
  flat = fit.fit(COMPUTE, np.full((3, len(COMPUTE)), 0.25))
  assert flat.r_squared == 0


def test_a_limit_beyond_the_bound_ends_the_interval_at_the_bound():
  # A line in log C has no limit: any from some value on, up to 1, will do.
  runs = 0.1 + 0.1 * np.log(COMPUTE) + np.random.default_rng(5).normal(0, 0.01, (4, len(COMPUTE)))
  found = fit.fit(COMPUTE, runs)
  assert found.limit.low < 1 == found.limit.high
  for interval in (found.amplitude, found.exponent):
    assert interval.low < interval.high


def test_forecast_of_the_last_point():
  rng = np.random.default_rng(2)
  runs = RISING(COMPUTE) + rng.normal(0, 0.005, (5, len(COMPUTE)))
  forecast = fit.forecast_last(COMPUTE, runs)
  assert abs(forecast.error) < 0.02
  assert forecast.interval.low <= forecast.predicted <= forecast.interval.high
  assert forecast.measured_interval.low < forecast.interval.low
  assert forecast.measured_interval.high > forecast.interval.high
  np.testing.assert_allclose(forecast.measured, runs[:, -1].mean())
  np.testing.assert_allclose(forecast.spread, runs[:, -1].std(ddof=1))
  # The last point is not seen: another there changes only the error.
  moved = runs.copy()
  moved[:, -1] += 0.1
  other = fit.forecast_last(COMPUTE, moved)
  assert (other.predicted, other.interval) == (forecast.predicted, forecast.interval)
  np.testing.assert_allclose(other.error, forecast.error - 0.1)
  assert np.isnan(fit.forecast_last(COMPUTE, runs[:1]).spread)


def test_too_few_points():
  with pytest.raises(ValueError, match='three different computes'):
    fit.fit_law(np.array([1.0, 2, 2]), np.array([0.1, 0.2, 0.2]))
  with pytest.raises(ValueError, match='all above 0'):
    fit.fit_law(np.array([0.0, 1, 2]), np.array([0.1, 0.2, 0.2]))
