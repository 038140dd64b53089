"""An environment whose problem says how an episode goes, whatever the policy says."""

from collections.abc import Sequence
import os
import time

from jaxrl_pt.environments.interactive import Message, Problem, Step


class Talking:
  """The problem is `WHAT TURNS`: WHAT happens in turn TURNS, and 'end' ends the episode there.

  'slow' ends it too, but each answer takes its time; 'never' goes on for ever.
  """

  def reset(self, problem: Problem) -> Sequence[Message]:
    self._what, turns = problem.prompt.split()[:2]
    self._left = int(turns)
    if self._what == 'unborn':
      raise ValueError('no such problem')
    if self._what == 'wordy':
      return [Message('user', 'x' * 500)]
    if self._what == 'odd':
      return [Message('pope', 'hear me')]
    return [Message('user', problem.prompt)]

  def step(self, text: str) -> Step:
    self._left -= 1
    what = self._what
    if what == 'slow':
      time.sleep(0.05)
    if what in ('end', 'slow', 'never') or self._left:
      is_over = not self._left and what != 'never'
      return Step(f'{len(text)} left {self._left}', 0.25, is_over, {'guesses': 1.0})
    match what:
      case 'exit':
        os._exit(3)
      case 'raise':
        raise ValueError('broken')
      case 'large':
        return Step('x' * (1 << 20), 1.0, False)
      case 'long':
        self._left, self._what = 1, 'end'
        return Step('é' * 100, 0.0, False)
      case 'surrogate':
        return Step('\ud800', 1.0, False)
      case 'spin':
        while True:
          pass
    raise AssertionError(what)
