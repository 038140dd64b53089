"""Stopping on a signal: the run finishes its step, saves a checkpoint and ends.

SIGTERM comes when the machine is taken back, SIGINT from Ctrl-C, SIGHUP when a connection breaks. A
signal to one host stops all hosts after the same step.
"""

from collections.abc import Iterator, Sequence
import contextlib
import os
import signal
import stat
import threading
from types import FrameType

import jax

from jaxrl_pt.errors import Preempted
from jaxrl_pt.parallel import hosts

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
  """Whether a signal has asked the run to stop, which the loop looks up once a step. Final."""

  def __init__(self) -> None:
    self.number = 0  # the number of this host's last signal, or 0
    self._highest: jax.Array | None = None  # the highest number on any host, as of the last call

  def agreed(self, *, wait: bool) -> bool:
    """Whether the run is to stop after this step; all hosts get the same answer.

    All hosts must call this after each step. Several hosts agree by a maximum over their signals'
    numbers, which the devices compute after the step just dispatched.

    Args:
      wait: whether to wait for that maximum, and hence for the step. If not, the answer is that of
        the step before, which is known already, so that the devices never wait for the host and the
        run stops one step later.
    """
    if jax.process_count() == 1:
      return self.number > 0
    before, self._highest = self._highest, hosts.highest(self.number)
    answer = self._highest if wait else before
    if answer is None or int(answer) == 0:
      return False
    self.number = int(answer)
    return True

  def stop(self, step: int) -> None:
    """Ends the run once its checkpoint of step `step` is on disk.

    Raises:
      Preempted: always.
    """
    raise Preempted(f'{signal.Signals(self.number).name}: checkpoint written at step {step}; run '
                    'the same command to go on.')


@contextlib.contextmanager
def stop_on_signals(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[StopRequest]:
  """Makes signals set a StopRequest as long as the context lasts.

  A SIGINT after a first signal raises KeyboardInterrupt at once. A run that ignores SIGHUP,
  as `nohup` starts it, goes on ignoring it.
  """
  request = StopRequest()
  if threading.current_thread() is not threading.main_thread():
    yield request  # Python delivers signals to the main thread only.
    return

  def note(number: int, frame: FrameType | None) -> None:
    del frame
    if number == signal.SIGINT and request.number:
      raise KeyboardInterrupt
    if number == signal.SIGHUP:
      _leave_terminal()
    request.number = number

  previous = {s: signal.signal(s, note) for s in signals
              if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN}
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def _leave_terminal() -> None:
  """Redirects output from a terminal that is gone, where writing fails, to /dev/null."""
  for number in (1, 2):
    with contextlib.suppress(OSError):  # The descriptor may have been closed.
      if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
