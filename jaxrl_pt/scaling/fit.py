"""Scaling of an accuracy with compute: a saturating power law with intervals, and a forecast.

    P(C) = A / C^α + P*

A rising curve has A < 0. Given the exponent, the law is linear in amplitude and limit, so a fit is
a search over one number (2506.08007 section 4.2, which gives neither parameters nor intervals).

Intervals are profile likelihoods in units of a noise that is measured and not assumed. A law is in
the region if its sum of squares is little more than that of the best law,

    R · (cost(law) − cost(best)) ≤ t² · s²,

and the interval of a value is its range over the region, which may be curved and is cut at the
bounds of the parameters. Several runs show how large s is: to first order a value is a weighted sum
v of the points, so that s² is the variance of v · accuracy over the runs, and t is Student's with
R − 1 degrees of freedom. This assumes nothing about how the points of a run, which are checkpoints
of one training, depend on each other. A single run does not show that: its s² is the residual
variance of the fit with K − 3 degrees of freedom, which assumes that the noise of its points is
independent. `experiments/scaling/coverage.py` measures how often the intervals hold the true value,
and compares them with those of the bootstrap, which are too narrow for few runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

# The smallest and the largest exponent: with a smaller one the law is a line in log C and has no
# limit, with a larger one it is a step.
EXPONENTS = (0.02, 8.0)


@dataclass(frozen=True)
class PowerLaw:
  """P(C) = amplitude / C^exponent + limit, with C in the unit of the compute it was fitted to."""

  amplitude: float
  exponent: float
  limit: float

  def __call__(self, compute: np.ndarray) -> np.ndarray:
    """f64[...]: the accuracy that the law gives at `compute`, f64[...]."""
    return self.amplitude * np.asarray(compute, np.float64) ** -self.exponent + self.limit


@dataclass(frozen=True)
class Interval:
  """A range that holds the true value with the probability that `fit` was asked for."""

  low: float
  high: float


@dataclass(frozen=True)
class Fit:
  """The law of several runs, with the intervals of its parameters."""

  law: PowerLaw
  r_squared: float
  amplitude: Interval
  exponent: Interval
  limit: Interval


@dataclass(frozen=True)
class Forecast:
  """The last point, as predicted from the points before it and as measured.

  interval: the interval of the law at the last compute.
  measured_interval: the interval of the mean that the runs measure there, with its own noise.
  error: predicted − measured.
  spread: the standard deviation of the runs at the last point; NaN with one run.
  """

  predicted: float
  interval: Interval
  measured_interval: Interval
  measured: float
  error: float
  spread: float


def fit_law(compute: np.ndarray, accuracy: np.ndarray) -> PowerLaw:
  """The least-squares law with a limit in [0, 1].

  Args:
    compute: f64[K] > 0, K ≥ 3 different values, in any unit.
    accuracy: f64[K] in [0, 1].

  Raises:
    ValueError: there are fewer than three different computes, or one is not positive.
  """
  compute, accuracy = np.asarray(compute, np.float64), np.asarray(accuracy, np.float64)
  if len(np.unique(compute)) < 3 or compute.min() <= 0:
    raise ValueError('three parameters need three different computes, all above 0')
  unit = _unit(compute)
  scaled = compute / unit

  def cost(log_exponent: float) -> float:
    return _cost(scaled, accuracy, float(np.exp(log_exponent)))

  lowest, highest = np.log(EXPONENTS)
  grid = np.linspace(lowest, highest, 49)
  best = int(np.argmin([cost(x) for x in grid]))
  around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
  found = optimize.minimize_scalar(cost, bounds=around, method='bounded',
                                   options={'xatol': 1e-10})
  law = _given_exponent(scaled, accuracy, float(np.exp(found.x)))
  return PowerLaw(law.amplitude * unit ** law.exponent, law.exponent, law.limit)


def _given_exponent(compute: np.ndarray, accuracy: np.ndarray, exponent: float) -> PowerLaw:
  """The best law with this exponent: if its limit would be outside [0, 1], it is at the edge."""
  power = compute ** -exponent
  amplitude, limit = _line(power, accuracy)
  if not 0 <= limit <= 1:
    limit = min(max(limit, 0.0), 1.0)
    amplitude = float(power @ (accuracy - limit) / (power @ power))
  return PowerLaw(amplitude, exponent, limit)


def _line(power: np.ndarray, accuracy: np.ndarray) -> tuple[float, float]:
  """The amplitude and limit of the least-squares line amplitude · power + limit."""
  mean = power.sum() / len(power)
  off = power - mean
  amplitude = float(off @ accuracy / (off @ off))
  return amplitude, float(accuracy.sum() / len(accuracy) - amplitude * mean)


def _unit(compute: np.ndarray) -> float:
  """The unit that compute is divided by, as powers of large FLOP counts would lose all digits."""
  return float(np.exp(np.log(compute).mean()))


def _cost(scaled: np.ndarray, accuracy: np.ndarray, exponent: float) -> float:
  """The residual sum of squares of the best law with this exponent."""
  return float(np.square(_given_exponent(scaled, accuracy, exponent)(scaled) - accuracy).sum())


def fit(compute: np.ndarray, accuracy_RK: np.ndarray, *, level: float = 0.95) -> Fit:
  """The law of the mean over runs, with intervals.

  Args:
    compute: f64[K].
    accuracy_RK: f64[R, K] of R runs that share their compute. A single run of three points has no
      residual that shows its noise, and its intervals are as wide as the parameters' bounds.
    level: the probability that an interval holds the true value.

  Raises:
    ValueError: there are fewer than three different computes, or one is not positive.
  """
  compute, accuracy_RK = np.asarray(compute, np.float64), np.asarray(accuracy_RK, np.float64)
  mean_K = accuracy_RK.mean(0)
  law = fit_law(compute, mean_K)
  region = _Region(compute, accuracy_RK, law, level)
  log_unit = np.log(_unit(compute))
  total = np.square(mean_K - mean_K.mean()).sum()
  residual = np.square(mean_K - law(compute)).sum()
  return Fit(law, float(1 - residual / total) if total > 0 else 0.0,
             region.range_of(lambda exponent: (np.exp(exponent * log_unit), 0.0),
                             np.array([1.0, region.best.amplitude * log_unit, 0.0])),
             region.exponents(), region.range_of(lambda _: (0.0, 1.0), np.array([0.0, 0.0, 1.0])))


def forecast_last(compute: np.ndarray, accuracy_RK: np.ndarray, *, level: float = 0.95) -> Forecast:
  """Fits all points but the last, and predicts the last one.

  Args:
    compute, accuracy_RK, level: the arguments of `fit`, with K ≥ 4.

  Raises:
    ValueError: there are fewer than three different computes before the last, or one is not
      positive.
  """
  compute, accuracy_RK = np.asarray(compute, np.float64), np.asarray(accuracy_RK, np.float64)
  before, last_R = accuracy_RK[:, :-1], accuracy_RK[:, -1]
  law = fit_law(compute[:-1], before.mean(0))
  region = _Region(compute[:-1], before, law, level)
  last = compute[-1] / _unit(compute[:-1])
  interval = region.range_of(lambda exponent: (last ** -exponent, 1.0),
                             _derivatives(region.best, np.array([last]))[0])
  predicted, measured = float(law(compute[-1])), float(last_R.mean())
  spread = float(last_R.std(ddof=1)) if len(last_R) > 1 else np.nan
  # The interval joins the errors of the law and of the point. In a run where both move together it
  # is too wide, since their difference moves less.
  point = region.quantile * (spread / np.sqrt(len(last_R)) if len(last_R) > 1
                             else np.sqrt(region.residual_variance))
  measured_interval = Interval(float(predicted - np.hypot(predicted - interval.low, point)),
                               float(predicted + np.hypot(interval.high - predicted, point)))
  return Forecast(predicted, interval, measured_interval, measured, predicted - measured, spread)


# --- Intervals ------------------------------------------------------------------


def _derivatives(law: PowerLaw, compute: np.ndarray) -> np.ndarray:
  """f64[K, 3]: derivatives of P(compute) with respect to amplitude, exponent and limit."""
  power = compute ** -law.exponent
  return np.stack([power, -law.amplitude * np.log(compute) * power, np.ones_like(power)], 1)


class _Region:
  """The laws that the runs do not rule out, for compute in units of `_unit`."""

  def __init__(self, compute: np.ndarray, accuracy_RK: np.ndarray, law: PowerLaw,
               level: float) -> None:
    unit = _unit(compute)
    self.best = PowerLaw(law.amplitude * unit ** -law.exponent, law.exponent, law.limit)
    self._scaled, self._runs, self._mean = compute / unit, accuracy_RK, accuracy_RK.mean(0)
    num_runs, num_points = accuracy_RK.shape
    self._cost = float(np.square(self.best(self._scaled) - self._mean).sum())
    freedom = num_runs - 1 if num_runs > 1 else num_points - 3
    self.residual_variance = self._cost / (num_points - 3) if num_points > 3 else np.inf
    self.quantile = float(stats.t.ppf((1 + level) / 2, freedom)) if freedom else np.inf

  def _budget(self, gradient_3: np.ndarray) -> float:
    """The largest sum of squares of a law in the region, for the interval of one value.

    Args:
      gradient_3: f64[3] derivatives of the value with respect to amplitude, exponent and limit.
    """
    num_runs = len(self._runs)
    if num_runs == 1:
      return self._cost + self.quantile ** 2 * self.residual_variance
    derivatives = _derivatives(self.best, self._scaled)
    weights = np.linalg.pinv(derivatives).T @ gradient_3
    size = np.linalg.norm(weights)
    if size == 0:  # The curve is flat, and any exponent fits it.
      return np.inf
    variance = ((self._runs - self._mean) @ (weights / size)).var(ddof=1)
    return float(self._cost + self.quantile ** 2 * variance / num_runs)

  def _exponents_within(self, budget: float) -> tuple[float, float]:
    """The smallest and the largest exponent of a law within the budget."""
    def excess(log_exponent: float) -> float:
      return _cost(self._scaled, self._mean, float(np.exp(log_exponent))) - budget

    lowest, highest = np.log(EXPONENTS)
    grid, best = np.linspace(lowest, highest, 65), np.log(self.best.exponent)
    inside = np.array([x for x in grid if excess(x) <= 0] + [best])
    ends = []
    for edge, beyond in ((inside.min(), grid[grid < inside.min()][-1:]),
                         (inside.max(), grid[grid > inside.max()][:1])):
      crosses = len(beyond) and excess(edge) < 0 < excess(beyond[0])
      ends.append(optimize.brentq(excess, edge, beyond[0]) if crosses else edge)
    return float(np.exp(ends[0])), float(np.exp(ends[1]))

  def exponents(self) -> Interval:
    """The interval of the exponent."""
    return Interval(*self._exponents_within(self._budget(np.array([0.0, 1.0, 0.0]))))

  def range_of(self, weights: Callable[[float], tuple[float, float]],
               gradient_3: np.ndarray) -> Interval:
    """The interval of a value that is linear in amplitude and limit, given the exponent.

    Args:
      weights: exponent → the factors of amplitude and limit in the value.
      gradient_3: f64[3] derivatives of the value with respect to amplitude, exponent and limit, up
        to a common factor.
    """
    budget = self._budget(gradient_3)
    low, high = np.log(self._exponents_within(budget))
    grid = np.linspace(low, high, 33)
    ends = []
    for sign in (-1.0, 1.0):
      cost = lambda x, sign=sign: -sign * self._farthest(float(np.exp(x)), weights, sign, budget)
      found = -np.array([cost(x) for x in grid])
      best = int(np.argmax(found))
      around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
      peak = found[best]
      if np.isfinite(peak) and around[0] < around[1]:
        peak = max(peak, -optimize.minimize_scalar(cost, bounds=around, method='bounded').fun)
      ends.append(float(sign * peak))
    return Interval(*ends)

  def _farthest(self, exponent: float, weights: Callable[[float], tuple[float, float]],
                sign: float, budget: float) -> float:
    """The largest (sign 1) or smallest (sign −1) value of the laws in the region with an exponent.

    These laws are an ellipse round the best one, which is cut where the limit leaves [0, 1].
    """
    if not np.isfinite(budget):
      return self._anything(weights(exponent), sign)
    power = self._scaled ** -exponent
    of_amplitude, of_limit = weights(exponent)
    amplitude, limit = _line(power, self._mean)
    slack = max(budget - np.square(amplitude * power + limit - self._mean).sum(), 0.0)
    # The inverse of [[Σ p², Σ p], [Σ p, K]] times the weights leads to the end of the ellipse.
    squares, total, num_points = power @ power, power.sum(), len(power)
    to_amplitude = num_points * of_amplitude - total * of_limit
    to_limit = squares * of_limit - total * of_amplitude
    determinant = num_points * squares - total ** 2
    step = sign * np.sqrt(slack / determinant
                          / (of_amplitude * to_amplitude + of_limit * to_limit))
    amplitude, limit = amplitude + step * to_amplitude, limit + step * to_limit
    if not 0 <= limit <= 1:
      limit = min(max(limit, 0.0), 1.0)
      amplitude = power @ (self._mean - limit) / squares
      slack = max(budget - np.square(amplitude * power + limit - self._mean).sum(), 0.0)
      amplitude += sign * np.sign(of_amplitude) * np.sqrt(slack / squares)
    return float(of_amplitude * amplitude + of_limit * limit)

  @staticmethod
  def _anything(weights: tuple[float, float], sign: float) -> float:
    """`_farthest` without a bound on the sum of squares, where only the limit is bounded."""
    if weights[0]:
      return sign * np.inf
    return weights[1] if sign > 0 else 0.0
