"""A terminal that goes away, with a connection that breaks: the run is told, and can save."""

import os
from pathlib import Path
import pty
import signal
import sys
import time

LOOP = """
import sys, time
from pathlib import Path
from jaxrl_pt.train.interrupt import stop_on_signals
with stop_on_signals() as stop:
  Path(sys.argv[1]).touch()
  for _ in range(1000):
    time.sleep(0.01)
    if stop.agreed(wait=False):
      break
  print('to nobody', flush=True)  # An error on a terminal that is gone.
  print('to nobody', file=sys.stderr, flush=True)
  Path(sys.argv[1]).write_text(str(stop.number))
"""


def test_a_dropped_terminal_stops_the_run_without_an_error(tmp_path: Path):
  found = tmp_path / 'number'
  pid, terminal = pty.fork()
  if pid == 0:
    os.execv(sys.executable, [sys.executable, '-c', LOOP, str(found)])
  try:
    deadline = time.monotonic() + 100
    while not found.exists():
      assert time.monotonic() < deadline
      time.sleep(0.02)
  finally:
    os.close(terminal)
  _, status = os.waitpid(pid, 0)
  assert os.waitstatus_to_exitcode(status) == 0
  assert found.read_text() == str(int(signal.SIGHUP))
