"""Stopping politely: a signal finishes the step in hand, saves and ends the run.

SIGTERM comes from who takes the machine back, SIGINT from Ctrl-C, SIGHUP from a connection that
breaks. One host's signal stops all of them, after the same step.
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
  """Set by a signal, asked for by the loop once a step. Final."""

  def __init__(self) -> None:
    self.number = 0  # of this host's last signal; 0 is none
    self._asked: jax.Array | None = None

  def agreed(self, *, wait: bool) -> bool:
    """Whether the run is to stop after this step: the same answer on all hosts.

    All must ask after each step. Several hosts answer from a maximum over their signals that is
    taken on the devices, behind the step just dispatched.

    Args:
      wait: for that maximum, hence for the step. Without, the answer is that of the step
        before, which is there already: the devices never wait, and a signal takes a step more.
    """
    if jax.process_count() == 1:
      return self.number > 0
    before, self._asked = self._asked, hosts.highest(self.number)
    answer = self._asked if wait else before
    if answer is None or int(answer) == 0:
      return False
    self.number = int(answer)
    return True

  def stop(self, step: int) -> None:
    """Ends the run, whose checkpoint of `step` is on disk.

    Raises:
      Preempted: always.
    """
    raise Preempted(f'{signal.Signals(self.number).name}: checkpoint written at step {step}; run '
                    'the same command to go on.')


@contextlib.contextmanager
def stop_on_signals(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[StopRequest]:
  """Turns these signals into a StopRequest; a second SIGINT interrupts at once.

  A run that was started to outlive its terminal (nohup) goes on ignoring SIGHUP.
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
  """Sends to nowhere what would be written to a terminal that is gone, where it is an error."""
  for number in (1, 2):
    with contextlib.suppress(OSError):  # It may have been closed.
      if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
