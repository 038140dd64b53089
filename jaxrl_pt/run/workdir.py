"""The lock that lets only one run at a time use a work directory."""

from collections.abc import Iterator
import contextlib
import datetime
import os
from pathlib import Path
import socket
import sys

import jax
from jax.experimental import multihost_utils
import numpy as np

from jaxrl_pt import files
from jaxrl_pt.errors import UserError

LOCK = '.lock'


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
  """Makes the work directory and keeps every other run out of it as long as the context lasts.

  The first host of a run takes the lock for all its hosts. The lock ends with that host's process,
  however the process ends, so nothing has to be removed by hand.

  Raises:
    UserError: the directory cannot be written, or another run is using it.
  """
  with contextlib.ExitStack() as stack:
    problem: UserError | None = None
    if jax.process_index() == 0:
      try:
        stack.enter_context(_locked(workdir))
      except UserError as error:
        problem = error
    _agree(problem)
    yield


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
  now = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
  note = f'process {os.getpid()} on {socket.gethostname()}, since {now}'
  with contextlib.ExitStack() as stack:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      if not stack.enter_context(files.locked(workdir / LOCK, note)):
        print(f'warning: the file system of {workdir} has no locks: see to it that no other run '
              'uses it at the same time.', file=sys.stderr, flush=True)
    except files.HeldError as error:
      raise UserError(f'Another run is using the work directory {workdir} ({error}): wait for its '
                      'end or stop it, or choose another --workdir.') from error
    except OSError as error:
      raise UserError(f'The work directory {workdir} cannot be written ({error.strerror}): choose '
                      'another --workdir.') from error
    files.remove_temporaries(workdir)
    yield


def _agree(problem: UserError | None) -> None:
  """Raises on every host if the first host could not take the lock.

  Otherwise the other hosts would wait for ever for the first.
  """
  if jax.process_count() > 1:
    failed = multihost_utils.broadcast_one_to_all(np.int32(problem is not None))
    if int(failed) and problem is None:
      raise UserError('The first host could not take the work directory; it says why.')
  if problem is not None:
    raise problem
