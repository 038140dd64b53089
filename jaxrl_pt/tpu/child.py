"""Child processes that compile for TPUs on a machine without a TPU.

libtpu reads its settings when JAX is first imported, and one bad program can end its process.
Compiling therefore happens in a child process, which prints each result as a row of JSON. This
module imports no JAX.
"""

from collections.abc import Iterator
from importlib.metadata import version
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

import jaxrl_pt
from jaxrl_pt.errors import UserError

Row = dict[str, Any]


def check_libtpu() -> None:
  """Checks that the TPU compiler is installed.

  Raises:
    UserError: libtpu is missing; the message says how to get it.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise UserError('The TPU compiler is not installed: run `pip install libtpu` (in a checkout: '
                    '`make libtpu`); no TPU is needed.')


def environment(dump_to: str = '') -> dict[str, str]:
  """The environment of a process that compiles for TPUs.

  Args:
    dump_to: the folder to which the compiler writes its schedules; with '' it writes none.
  """
  values = {**os.environ, **jaxrl_pt.VIRTUAL_HOST, 'JAX_PLATFORMS': 'cpu',
            'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_STDERR_LOG_LEVEL': '3',
            'TPU_MIN_LOG_LEVEL': '3', 'TF_CPP_MIN_LOG_LEVEL': '3'}
  if dump_to:
    values['LIBTPU_INIT_ARGS'] = ' '.join((
        values.get('LIBTPU_INIT_ARGS', ''), f'--xla_jf_dump_to={dump_to}',
        '--xla_jf_dump_hlo_text=true', '--xla_jf_dump_llo_text=true',
        '--xla_jf_emit_annotations=true')).strip()
  return values


def rows(module: str, *arguments: str, dump_to: str = '') -> Iterator[Row]:
  """Yields the rows that `python -m module arguments` prints, as they come.

  Raises:
    UserError: libtpu is missing or has aborted, or the child has printed a row {'user_error': …}.
    RuntimeError: the child failed; the message has the end of its error output.
  """
  check_libtpu()
  # The child's error output goes to a file, since a full pipe would stop the child.
  with tempfile.TemporaryFile('w+') as errors, subprocess.Popen(
      [sys.executable, '-m', module, *arguments], env=environment(dump_to), text=True,
      stdout=subprocess.PIPE, stderr=errors) as process:
    assert process.stdout
    for line in process.stdout:
      if line.startswith('{'):
        row = json.loads(line)
        if 'user_error' in row:
          raise UserError(row['user_error'])
        yield row
    if process.wait():
      errors.seek(0)
      said = errors.read()
      if process.returncode in (-signal.SIGABRT, -signal.SIGSEGV):
        name = signal.Signals(-process.returncode).name
        checks = [line for line in said.splitlines() if 'Check failed' in line] or ['no reason']
        raise UserError(f'The TPU compiler ended by {name}, which is a mistake of libtpu '
                        f'{version("libtpu")} and says nothing about the settings ({checks[0]}): '
                        'try another topology, other sizes or another version of libtpu.')
      raise RuntimeError(f'{module} {" ".join(arguments)} failed ({process.returncode}):\n'
                         f'{said[-4000:]}')
