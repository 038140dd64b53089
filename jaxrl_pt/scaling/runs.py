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
    CalledProcessError: the command failed; <workdir>.log says why.
  """
  if not (workdir / report.FILE).is_file():
    command = [sys.executable, '-m', 'jaxrl_pt.main', 'train', '--gin_file', gin_file,
               '--workdir', str(workdir), '--gin_bindings', 'cfg.Train.tensorboard = False']
    for binding in bindings:
      command += ['--gin_bindings', binding]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with open(f'{workdir}.log', 'a', encoding='utf-8') as log:
      subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
  return metrics.read_rows(workdir / metrics.FILE)
