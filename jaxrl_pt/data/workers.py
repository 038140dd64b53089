"""What the processes that read ahead do before they read."""

import signal


def outlive_signals(worker: int, num_workers: int) -> None:
  """Ignores signals to the whole process group: the run handles them and still needs batches."""
  del worker, num_workers
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
