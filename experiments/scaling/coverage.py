"""How often do the 95 % intervals of `scaling/fit` hold the truth?

    python experiments/scaling/coverage.py

Curves P = 0.5 − 0.25 · (C/C₀)^−0.5 at the computes of 2506.08007 (steps 100, 200, 400, 800, 1000
and 1200) with normal noise of σ = 0.003, in 1, 3, 5 and 10 runs. The noise of a run's points is
independent, or half of its variance moves them together, as a training that is ahead stays
ahead. Three ways to make an interval:

    profile      what `jaxrl_pt.scaling.fit` gives
    independent  the same with the residual variance of all points of all runs, which takes
                 every point to be independent (equal to `profile` with one run)
    bootstrap    percentiles over resampled runs, or over resampled residuals of one run

Writes results/coverage.json and .png: the share of simulations whose interval holds the truth,
and the median width of the interval.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import time

import matplotlib
import numpy as np
from scipy import stats

from jaxrl_pt.scaling import fit

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # The backend comes first.

HERE = Path(__file__).parent
COMPUTE = np.array([100, 200, 400, 800, 1000, 1200]) / 100
LAW = fit.PowerLaw(amplitude=-0.25, exponent=0.5, limit=0.5)
SIGMA, RUNS = 0.003, (1, 3, 5, 10)
SHARED = {'independent points': 0.0, 'half shared in a run': 0.5}  # share of the variance
VALUES = {'amplitude': LAW.amplitude, 'exponent': LAW.exponent, 'limit': LAW.limit,
          'forecast of the last': float(LAW(COMPUTE[-1]))}
Intervals = list[fit.Interval]  # in the order of VALUES


def draw_runs(num_runs: int, shared: float, rng: np.random.Generator) -> np.ndarray:
  """f64[R, K] accuracies of runs of which a share of the noise's variance is common."""
  own = rng.normal(size=(num_runs, len(COMPUTE)))
  common = rng.normal(size=(num_runs, 1))
  return LAW(COMPUTE) + SIGMA * (np.sqrt(1 - shared) * own + np.sqrt(shared) * common)


# --- Three ways ---------------------------------------------------------------------


def profile(runs: np.ndarray, rng: np.random.Generator) -> Intervals:
  del rng
  found = fit.fit(COMPUTE, runs)
  return [found.amplitude, found.exponent, found.limit, fit.forecast_last(COMPUTE, runs).interval]


def independent(runs: np.ndarray, rng: np.random.Generator) -> Intervals:
  """All points as those of one run, whose interval is that of independent points."""
  del rng
  num_runs = len(runs)
  found = fit.fit(np.tile(COMPUTE, num_runs), runs.reshape(1, -1))
  before, last = runs[:, :-1].reshape(1, -1), runs[:, -1:].mean(0, keepdims=True)
  forecast = fit.forecast_last(np.append(np.tile(COMPUTE[:-1], num_runs), COMPUTE[-1]),
                               np.concatenate([before, last], 1))
  return [found.amplitude, found.exponent, found.limit, forecast.interval]


def bootstrap(runs: np.ndarray, rng: np.random.Generator, num_resamples: int = 100) -> Intervals:
  def laws(compute: np.ndarray, points: np.ndarray) -> list[fit.PowerLaw]:
    best, found = fit.fit_law(compute, points.mean(0)), []
    residuals = points[0] - best(compute)
    for _ in range(num_resamples):
      sample = (points[rng.integers(0, len(points), len(points))].mean(0) if len(points) > 1
                else best(compute) + rng.choice(residuals, len(compute)))
      found.append(fit.fit_law(compute, sample))
    return found

  whole, before = laws(COMPUTE, runs), laws(COMPUTE[:-1], runs[:, :-1])
  values = ([x.amplitude for x in whole], [x.exponent for x in whole],
            [x.limit for x in whole], [float(x(COMPUTE[-1])) for x in before])
  return [fit.Interval(*np.quantile(v, [0.025, 0.975])) for v in values]


# --- Counting -----------------------------------------------------------------------


def measure(way: Callable[[np.ndarray, np.random.Generator], Intervals], num_runs: int,
            shared: float, num_simulations: int) -> dict[str, dict]:
  """Share of simulations whose interval holds the truth, with a 95 % interval of that share."""
  held, widths = [], []
  for number in range(num_simulations):
    # The same curves for every way.
    curves, resampling = (np.random.default_rng([number, num_runs, stream]) for stream in (0, 1))
    intervals = way(draw_runs(num_runs, shared, curves), resampling)
    held.append([i.low <= truth <= i.high
                 for i, truth in zip(intervals, VALUES.values(), strict=True)])
    widths.append([i.high - i.low for i in intervals])
  report = {}
  for name, hits, width in zip(VALUES, np.transpose(held), np.transpose(widths), strict=True):
    low, high = stats.binomtest(int(hits.sum()), num_simulations).proportion_ci(method='wilson')
    report[name] = {'holds_truth': round(float(hits.mean()), 4),
                    'share_95': [round(low, 4), round(high, 4)],
                    'median_width': float(f'{np.median(width):.3g}')}
  return report


def plot(results: dict, path: Path) -> None:
  """Coverage by number of runs: a panel for each kind of noise and value."""
  figure, axes = plt.subplots(len(SHARED), len(VALUES), figsize=(13, 6), sharex=True, sharey=True,
                              layout='constrained')
  for row, noise in zip(axes, SHARED, strict=True):
    for axis, value in zip(row, VALUES, strict=True):
      axis.axhspan(93, 97, color='grey', alpha=0.2)
      for place, (way, by_runs) in enumerate(results[noise].items()):
        x = np.arange(len(RUNS)) + 0.08 * (place - 1)
        cells = [by_runs[str(r)][value] for r in RUNS]
        share = 100 * np.array([c['holds_truth'] for c in cells])
        ends = 100 * np.array([c['share_95'] for c in cells]).T
        axis.errorbar(x, share, np.abs(ends - share), fmt='o-', markersize=4, capsize=2, label=way)
      axis.set(title=f'{value}; {noise}', ylim=(55, 101))
      axis.title.set_fontsize(9)
      axis.set_xticks(range(len(RUNS)), RUNS)
  for axis in axes[:, 0]:
    axis.set_ylabel('intervals that hold the truth, %')
  for axis in axes[-1]:
    axis.set_xlabel('runs')
  axes[0, 0].legend(fontsize=8, loc='lower right')
  figure.savefig(path, dpi=110)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--simulations', type=int, default=2000)
  parser.add_argument('--bootstrap_simulations', type=int, default=200)
  args = parser.parse_args()
  started, results = time.perf_counter(), {}
  ways = {'profile': (profile, args.simulations),
          'independent': (independent, args.simulations // 4),
          'bootstrap': (bootstrap, args.bootstrap_simulations)}
  for noise, shared in SHARED.items():
    results[noise] = {}
    for name, (way, count) in ways.items():
      results[noise][name] = {str(r): measure(way, r, shared, count) for r in RUNS}
      print(f'{noise}, {name}, {count} simulations, {time.perf_counter() - started:.0f} s')
      for r, row in results[noise][name].items():
        shares = (f'{value} {100 * cell["holds_truth"]:.1f} %' for value, cell in row.items())
        print(f'  {r:>2} runs: {"  ".join(shares)}', flush=True)
  folder = HERE / 'results'
  folder.mkdir(exist_ok=True)
  (folder / 'coverage.json').write_text(json.dumps(
      {'settings': vars(args), 'sigma': SIGMA, 'results': results}, indent=1) + '\n')
  plot(results, folder / 'coverage.png')


if __name__ == '__main__':
  main()
