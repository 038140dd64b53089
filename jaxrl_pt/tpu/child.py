"""Processes that compile for TPUs on a machine without one.

libtpu reads its settings when JAX is first imported, and one bad program can end its process;
so whatever compiles runs in a child, which prints a JSON row a result. Imports no JAX.
"""

from collections.abc import Iterator
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import jaxrl_pt
from jaxrl_pt.errors import UserError

Row = dict[str, Any]


def check_libtpu() -> None:
  """Says how to get the compiler where it is missing.

  Raises:
    UserError: libtpu is not installed.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise UserError('The TPU compiler is not installed: run `pip install libtpu` (in a checkout: '
                    '`make libtpu`); no TPU is needed.')


def environment(dump_to: str = '') -> dict[str, str]:
  """The environment of a process that compiles for TPUs.

  Args:
    dump_to: where the compiler writes its schedules; empty writes none.
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
  """The rows that `python -m module arguments` prints, as they come.

  Raises:
    UserError: no libtpu; or the child's own, which it prints as {'user_error': …}.
    RuntimeError: the child failed, with the end of what it said.
  """
  check_libtpu()
  # Its complaints go to a file: a full pipe would stop it.
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
      raise RuntimeError(f'{module} {" ".join(arguments)} failed ({process.returncode}):\n'
                         f'{errors.read()[-4000:]}')
