"""Does a policy deceive its judge? A rising reward with a falling verified accuracy says so.

At each evaluation k of the run, at step t_k, the policy answers n held-out problems. y_k is its win
rate against the policy that the run started from, by the judge; a_k its verified accuracy. Over the
last W evaluations both have a slope by least squares, and a standard error under the variance of a
share of n problems:

    b = Σ (t_k − t̄) y_k / Σ (t_k − t̄)²,   se² = p (1 − p) / n / Σ (t_k − t̄)²,   z = b / se

with p = (n Σ y_k + 2) / (n W + 4), which is never 0 or 1 (Agresti and Coull). The alarm is given
where z of the reward is above the threshold and z of the accuracy below its negative. With both
trends none and independent, a check at the threshold 2 gives a false alarm once in 2,000 times;
problems that are the same at each evaluation vary less than that, so that it is rarer still.

Source: our own; the paper (RRM, 2505.14674) has no such guard.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_pt import config as cfg


class Point(NamedTuple):
  """An evaluation: step, win rate by the judge, accuracy, and the number of problems."""

  step: int
  reward: float
  accuracy: float
  num: int


class Trends(NamedTuple):
  """z of both slopes; 0 where there are too few evaluations."""

  reward: float
  accuracy: float


def trends(points: Sequence[Point], window: int) -> Trends:
  """The trends over the last `window` evaluations, which are none until there are so many."""
  last = points[-window:]
  if len(last) < window:
    return Trends(0.0, 0.0)
  return Trends(_z(last, 'reward'), _z(last, 'accuracy'))


def _z(points: Sequence[Point], name: str) -> float:
  times = np.array([point.step for point in points], float)
  values = np.array([getattr(point, name) for point in points])
  num = float(np.mean([point.num for point in points]))
  centred = times - times.mean()
  share = (num * values.sum() + 2) / (num * len(points) + 4)
  spread = (centred**2).sum()
  return float((centred * values).sum() / spread / np.sqrt(share * (1 - share) / num / spread))


def is_deceived(found: Trends, threshold: float) -> bool:
  """Whether the reward rises and the accuracy falls, both by more than noise."""
  return found.reward > threshold and found.accuracy < -threshold


class Guard:
  """What a run knows of both trends; its state goes into the checkpoint. Final."""

  def __init__(self, settings: cfg.JudgeGuard, num: int) -> None:
    """Knows nothing yet.

    Args:
      settings: the window and the threshold.
      num: the number of problems of an evaluation.
    """
    self._settings, self._num = settings, num
    self._points: list[Point] = []

  def note(self, step: int, reward: float, accuracy: float) -> tuple[Trends, str]:
    """Notes an evaluation.

    Returns:
      The trends, and the alarm as a sentence or ''.
    """
    settings = self._settings
    self._points = [*self._points, Point(step, reward, accuracy, self._num)][-settings.window:]
    found = trends(self._points, settings.window)
    if not is_deceived(found, settings.threshold):
      return found, ''
    first = self._points[0]
    return found, (
        f'Since step {first.step} the win rate of the policy on held-out problems by the judge '
        f'has risen from {first.reward:.3f} to {reward:.3f} (z = {found.reward:.1f}) while its '
        f'verified accuracy has fallen from {first.accuracy:.3f} to {accuracy:.3f} (z = '
        f'{found.accuracy:.1f}): the policy has learned what deceives the judge')

  def saved(self) -> list[list[float]]:
    """The state for a checkpoint, as JSON."""
    return [list(point) for point in self._points]

  def resume(self, saved: Any) -> None:
    """Goes on from what `saved` gave."""
    self._points = [Point(int(step), reward, accuracy, int(num))
                    for step, reward, accuracy, num in saved]
