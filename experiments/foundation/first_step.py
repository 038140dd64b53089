"""Seconds from `make quickstart` to the first training step, in a warm environment.

    python experiments/foundation/first_step.py

Warm: `.venv` is made. Nothing else is: each trial starts in an empty work directory, so the
time covers reading the corpus, training its tokenizer, packing and compiling. The clock
stops when the first step's row is in metrics.jsonl. The quickest of the trials counts, since
what else the machine does only adds; all of them and the load stand in
results/first_step.json.
"""

import argparse
import contextlib
import json
import os
from pathlib import Path
import signal
import subprocess
import tempfile
import time

HERE = Path(__file__).parent
LIMIT_SECONDS = 300.0


def seconds_to_first_step(workdir: Path) -> float:
  """Starts the quickstart in `workdir` and ends it, with its children, after one step."""
  rows = workdir / 'pretrain' / 'metrics.jsonl'
  started = time.perf_counter()
  process = subprocess.Popen(['make', 'quickstart', f'WORKDIR={workdir}'], cwd=HERE.parents[1],
                             stdout=subprocess.DEVNULL, start_new_session=True)
  try:
    while not (rows.is_file() and b'\n' in rows.read_bytes()):
      if process.poll() is not None:
        raise SystemExit(f'make quickstart ended with exit code {process.returncode}.')
      if time.perf_counter() - started > LIMIT_SECONDS:
        raise SystemExit(f'No step within {LIMIT_SECONDS:.0f} s.')
      time.sleep(0.02)
    return time.perf_counter() - started
  finally:
    _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
  """Ends make and all it started, and returns when the last of them is gone."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGTERM)
    deadline = time.perf_counter() + 60
    while time.perf_counter() < deadline:
      process.poll()
      os.killpg(process.pid, 0)
      time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--trials', type=int, default=3)
  num_trials = parser.parse_args().trials
  trials = []
  for _ in range(num_trials):
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
      seconds = seconds_to_first_step(Path(directory) / 'quickstart')
    trials.append({'seconds': round(seconds, 1), 'load_average_before': round(load, 2)})
    print(f'{seconds:.1f} s, load average before {load:.2f}', flush=True)
  best = min(t['seconds'] for t in trials)
  (HERE / 'results' / 'first_step.json').write_text(json.dumps({
      'command': 'python experiments/foundation/first_step.py',
      'seconds_to_first_step_best': best, 'cores': os.cpu_count(), 'trials': trials},
      indent=1) + '\n')
  print(f'Best of {num_trials}: {best:.1f} s from `make quickstart` to the first training step')


if __name__ == '__main__':
  main()
