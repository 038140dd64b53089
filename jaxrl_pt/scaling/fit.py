"""Scaling of an accuracy with compute: a saturating power law, its intervals, a forecast.

    P(C) = A / C^α + P*

A rising curve has A < 0. Amplitude and limit are linear given the exponent, so a fit is a
search over one number (2506.08007 section 4.2, which gives neither parameters nor intervals).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize

# Below, the law is a line in log C and has no limit; above, a step.
EXPONENTS = (0.02, 8.0)


@dataclass(frozen=True)
class PowerLaw:
  """P(C) = amplitude / C^exponent + limit; C in the unit of the compute it was fitted to."""

  amplitude: float
  exponent: float
  limit: float

  def __call__(self, compute: np.ndarray) -> np.ndarray:
    """f64[...]: what the law says at `compute`, f64[...]."""
    return self.amplitude * np.asarray(compute, np.float64) ** -self.exponent + self.limit


@dataclass(frozen=True)
class Interval:
  """A range that holds `level` of what the bootstrap found."""

  low: float
  high: float


@dataclass(frozen=True)
class Fit:
  """A law with its uncertainty."""

  law: PowerLaw
  r_squared: float
  amplitude: Interval
  exponent: Interval
  limit: Interval


@dataclass(frozen=True)
class Forecast:
  """The last point as predicted from those before it.

  error: predicted − measured mean; spread: standard deviation of the runs at that point.
  """

  predicted: float
  interval: Interval
  measured: float
  error: float
  spread: float


def fit_law(compute: np.ndarray, accuracy: np.ndarray) -> PowerLaw:
  """The least-squares law with a limit in [0, 1].

  Args:
    compute: f64[K] > 0, K ≥ 3 different values, in any unit.
    accuracy: f64[K] in [0, 1].

  Raises:
    ValueError: fewer than three different computes, or one that is not positive.
  """
  compute, accuracy = np.asarray(compute, np.float64), np.asarray(accuracy, np.float64)
  if len(np.unique(compute)) < 3 or compute.min() <= 0:
    raise ValueError('three parameters need three different computes, all above 0')
  unit = np.exp(np.log(compute).mean())  # Powers of large FLOP counts would lose all digits.
  scaled = compute / unit

  def cost(log_exponent: float) -> float:
    law = _given_exponent(scaled, accuracy, float(np.exp(log_exponent)))
    return float(np.square(law(scaled) - accuracy).sum())

  lowest, highest = np.log(EXPONENTS)
  grid = np.linspace(lowest, highest, 49)
  best = int(np.argmin([cost(x) for x in grid]))
  around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
  found = optimize.minimize_scalar(cost, bounds=around, method='bounded',
                                   options={'xatol': 1e-10})
  law = _given_exponent(scaled, accuracy, float(np.exp(found.x)))
  return PowerLaw(law.amplitude * unit ** law.exponent, law.exponent, law.limit)


def _given_exponent(compute: np.ndarray, accuracy: np.ndarray, exponent: float) -> PowerLaw:
  """Linear least squares; a limit outside [0, 1] moves to the edge, where the optimum is."""
  power = compute ** -exponent
  columns = np.stack([power, np.ones_like(power)], 1)
  amplitude, limit = np.linalg.lstsq(columns, accuracy, rcond=None)[0]
  if not 0 <= limit <= 1:
    limit = min(max(limit, 0.0), 1.0)
    amplitude = power @ (accuracy - limit) / (power @ power)
  return PowerLaw(float(amplitude), exponent, float(limit))


def fit(compute: np.ndarray, accuracy_RK: np.ndarray, *, num_bootstrap: int = 500,
        level: float = 0.95, seed: int = 0) -> Fit:
  """The law of the mean over runs, with intervals from resampled runs.

  Args:
    compute: f64[K].
    accuracy_RK: f64[R, K] of R runs that share their computes. With one run the residuals of
      the fit are resampled instead.
    num_bootstrap: resamples.
    level: of the intervals.
    seed: of the resampling.

  Raises:
    ValueError: as `fit_law`.
  """
  mean_K = np.asarray(accuracy_RK, np.float64).mean(0)
  law = fit_law(compute, mean_K)
  laws = _bootstrap(compute, accuracy_RK, law, num_bootstrap, seed)
  total = np.square(mean_K - mean_K.mean()).sum()
  residual = np.square(mean_K - law(compute)).sum()
  of = lambda value: _interval([value(x) for x in laws], level)
  return Fit(law, float(1 - residual / total) if total > 0 else 0.0, of(lambda x: x.amplitude),
             of(lambda x: x.exponent), of(lambda x: x.limit))


def forecast_last(compute: np.ndarray, accuracy_RK: np.ndarray, *, num_bootstrap: int = 500,
                  level: float = 0.95, seed: int = 0) -> Forecast:
  """Fits all points but the last and says what it makes of that one.

  Args:
    compute, accuracy_RK, num_bootstrap, level, seed: as in `fit`, with K ≥ 4 and R ≥ 2.

  Raises:
    ValueError: as `fit_law`.
  """
  before, last = np.asarray(compute)[:-1], np.asarray(compute)[-1]
  accuracy_RK = np.asarray(accuracy_RK, np.float64)
  law = fit_law(before, accuracy_RK[:, :-1].mean(0))
  laws = _bootstrap(before, accuracy_RK[:, :-1], law, num_bootstrap, seed)
  predicted, measured = float(law(last)), float(accuracy_RK[:, -1].mean())
  return Forecast(predicted, _interval([float(x(last)) for x in laws], level), measured,
                  predicted - measured, float(accuracy_RK[:, -1].std(ddof=1)))


def _bootstrap(compute: np.ndarray, accuracy_RK: np.ndarray, law: PowerLaw, num: int,
               seed: int) -> list[PowerLaw]:
  rng = np.random.default_rng(seed)
  accuracy_RK = np.asarray(accuracy_RK, np.float64)
  num_runs, num_points = accuracy_RK.shape
  resample: Callable[[], np.ndarray]
  if num_runs > 1:
    resample = lambda: accuracy_RK[rng.integers(0, num_runs, num_runs)].mean(0)
  else:
    residuals = accuracy_RK[0] - law(compute)
    resample = lambda: law(compute) + residuals[rng.integers(0, num_points, num_points)]
  return [fit_law(compute, resample()) for _ in range(num)]


def _interval(values: list[float], level: float) -> Interval:
  low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
  return Interval(float(low), float(high))
