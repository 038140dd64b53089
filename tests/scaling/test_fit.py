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


def test_intervals_cover_the_truth_as_often_as_they_say():
  rng = np.random.default_rng(0)
  covered, num_trials = 0, 30
  for trial in range(num_trials):
    runs = RISING(COMPUTE) + rng.normal(0, 0.01, (8, len(COMPUTE)))
    found = fit.fit(COMPUTE, runs, num_bootstrap=60, level=0.9, seed=trial)
    covered += found.limit.low <= RISING.limit <= found.limit.high
    assert found.exponent.low <= found.law.exponent <= found.exponent.high
    assert found.r_squared > 0.95
  # Eight runs resampled undercover somewhat: 90 % nominal.
  assert 0.6 * num_trials <= covered < num_trials


def test_one_run_resamples_its_residuals():
  rng = np.random.default_rng(1)
  noise = rng.normal(0, 0.01, len(COMPUTE))
  rough = fit.fit(COMPUTE, (RISING(COMPUTE) + noise)[None], num_bootstrap=100)
  exact = fit.fit(COMPUTE, RISING(COMPUTE)[None], num_bootstrap=20)
  assert exact.limit.high - exact.limit.low < 1e-4 < rough.limit.high - rough.limit.low


def test_forecast_of_the_last_point():
  rng = np.random.default_rng(2)
  runs = RISING(COMPUTE) + rng.normal(0, 0.005, (5, len(COMPUTE)))
  forecast = fit.forecast_last(COMPUTE, runs, num_bootstrap=100)
  assert abs(forecast.error) < 0.02
  assert forecast.interval.low <= forecast.predicted <= forecast.interval.high
  np.testing.assert_allclose(forecast.measured, runs[:, -1].mean())
  np.testing.assert_allclose(forecast.spread, runs[:, -1].std(ddof=1))
  # The last point is not seen: another there changes only the error.
  moved = runs.copy()
  moved[:, -1] += 0.1
  other = fit.forecast_last(COMPUTE, moved, num_bootstrap=100)
  assert other.predicted == forecast.predicted
  np.testing.assert_allclose(other.error, forecast.error - 0.1)


def test_too_few_points():
  with pytest.raises(ValueError, match='three different computes'):
    fit.fit_law(np.array([1.0, 2, 2]), np.array([0.1, 0.2, 0.2]))
  with pytest.raises(ValueError, match='all above 0'):
    fit.fit_law(np.array([0.0, 1, 2]), np.array([0.1, 0.2, 0.2]))
