"""Does a run's memory grow? `python tools/measure_memory.py --every 500 -- train FLAGS …`.

Starts `jaxrl-pt train` with the flags and prints, whenever so many more steps are in its
metrics.jsonl, the resident memory of the process and of the verifiers' processes, in MiB.
"""

import argparse
from pathlib import Path
import subprocess
import sys
import time

from jaxrl_pt import metrics
from jaxrl_pt.verifiers import sandbox


def resident(pid: int) -> float:
  """MiB of a process, 0 for one that has ended."""
  try:
    for line in Path(f'/proc/{pid}/status').read_text().splitlines():
      if line.startswith('VmRSS'):
        return int(line.split()[1]) / 1024
  except OSError:
    pass
  return 0.0


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--every', type=int, default=500)
  parser.add_argument('command', nargs='+', help='train and its flags, after --')
  args = parser.parse_args()
  if '--workdir' not in args.command[:-1]:
    parser.error('the command has no --workdir DIR, whose metrics tell the steps')
  rows = Path(args.command[args.command.index('--workdir') + 1]) / metrics.FILE
  process = subprocess.Popen([sys.executable, '-m', 'jaxrl_pt.main', *args.command],
                             stdout=subprocess.DEVNULL)
  seen = -1
  while process.poll() is None:
    time.sleep(0.2)
    step = len(rows.read_bytes().splitlines()) if rows.is_file() else 0
    if step // args.every > seen:
      seen = step // args.every
      children = sum(map(resident, sandbox.descendants(process.pid)))
      print(f'step {step}: {resident(process.pid):.1f} MiB, verifiers {children:.1f}', flush=True)
  return process.returncode


if __name__ == '__main__':
  sys.exit(main())
