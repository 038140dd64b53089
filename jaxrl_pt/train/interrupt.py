"""Stopping politely: SIGTERM and the first Ctrl-C finish the step in hand and checkpoint."""

from collections.abc import Iterator
import contextlib
import signal
import threading
from types import FrameType


class StopRequest:
  """Set by a signal, read by the loop between steps."""

  def __init__(self) -> None:
    self.signal_name: str | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
  """Turns SIGTERM and SIGINT into a StopRequest; a second SIGINT interrupts at once."""
  request = StopRequest()
  if threading.current_thread() is not threading.main_thread():
    yield request  # Python delivers signals to the main thread only.
    return

  def note(number: int, frame: FrameType | None) -> None:
    del frame
    if number == signal.SIGINT and request.signal_name is not None:
      raise KeyboardInterrupt
    request.signal_name = signal.Signals(number).name

  previous = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
