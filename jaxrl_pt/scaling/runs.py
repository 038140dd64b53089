"""Runs that an experiment is made of: `jaxrl-pt train` on a shipped gin file, once."""

from collections.abc import Sequence
from pathlib import Path
import subprocess
import sys
from typing import Any

from jaxrl_pt import metrics, report


def train(gin_file: str, workdir: Path, bindings: Sequence[str] = ()) -> list[dict[str, Any]]:
  """Trains in a process of its own, unless the run's report is there; its rows of metrics.

  What the command says is appended to <workdir>.log. A run that was killed goes on where it was.

  Raises:
    SystemExit: the command failed; what it said last stands in the message.
  """
  if not (workdir / report.FILE).is_file():
    command = [sys.executable, '-m', 'jaxrl_pt.main', 'train', '--gin_file', gin_file,
               '--workdir', str(workdir), '--gin_bindings', 'cfg.Train.tensorboard = False']
    for binding in bindings:
      command += ['--gin_bindings', binding]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    path = Path(f'{workdir}.log')
    with path.open('a', encoding='utf-8') as log:
      code = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
      last = path.read_text(encoding='utf-8').strip().splitlines()[-1:]
      raise SystemExit(f'{workdir} ended with {code} ({path}): {"".join(last)}')
  return metrics.read_rows(workdir / metrics.FILE)
