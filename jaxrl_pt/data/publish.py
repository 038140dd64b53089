"""Writes directories that appear whole or not at all, and the record files in them."""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import re
import secrets
import shutil
import time

from array_record.python import array_record_module

from jaxrl_pt import files
from jaxrl_pt.errors import UserError

_UNFINISHED = re.compile(r'(\.(?:data|seqio)-[0-9a-f]{16}-\w+)(?:\.lock)?')
_DAY = 24 * 3600


@contextlib.contextmanager
def new_directory(final: Path, manifest: str) -> Iterator[Path]:
  """Gives a temporary directory beside `final` and renames it to `final` at the end.

  Where another process has published `final` meanwhile (it then holds `manifest`),
  that one stays. After an error nothing is left behind.

  Raises:
    UserError: the place cannot be written.
  """
  try:
    final.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(final) as temporary:
      yield temporary
      try:
        os.rename(temporary, final)
      except OSError:
        if not (final / manifest).exists():
          raise
  except OSError as error:
    raise UserError(f'Cannot write prepared data to {final}: {error.strerror or error}; choose a '
                    'writable work directory or Data.cache_dir, with room on its disk.'
                    ) from error


@contextlib.contextmanager
def _unfinished(final: Path) -> Iterator[Path]:
  """A hidden directory whose lock file says that its maker lives."""
  temporary = final.with_name(f'.{final.name}-{secrets.token_hex(4)}')
  lock = temporary.with_name(f'{temporary.name}.lock')
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(files.locked(lock))  # First, so that no directory is ever without one.
    except files.HeldError as error:  # `remove_abandoned` met the lock before it was held.
      raise OSError(f'{lock} was taken away') from error
    temporary.mkdir()
    try:
      yield temporary
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
      lock.unlink(missing_ok=True)


def remove_abandoned(directory: Path) -> None:
  """Removes the unfinished directories in `directory` whose makers are dead.

  A lock that can be taken has lost its holder. A directory without a lock, as on a file system that
  has no locks, is left alone for a day.
  """
  with contextlib.suppress(OSError):
    matches = [_UNFINISHED.fullmatch(path.name) for path in directory.iterdir()]
    for name in {found[1] for found in matches if found}:
      _remove_if_abandoned(directory / name)


def _remove_if_abandoned(temporary: Path) -> None:
  lock = temporary.with_name(f'{temporary.name}.lock')
  with contextlib.suppress(OSError, files.HeldError):
    if lock.exists():
      with files.locked(lock) as supported:
        if supported:
          shutil.rmtree(temporary, ignore_errors=True)
          lock.unlink(missing_ok=True)
          return
    if time.time() - temporary.stat().st_mtime > _DAY:
      shutil.rmtree(temporary, ignore_errors=True)


class RecordWriter:
  """Writes an ArrayRecord file; a full disk is an OSError, as everywhere else."""

  def __init__(self, path: Path) -> None:
    # One record a group: the loader reads single records in random order.
    self._writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1,zstd:1')

  def write(self, record: bytes) -> None:
    try:
      self._writer.write(record)
    except RuntimeError as error:
      raise OSError(str(error)) from error

  def close(self) -> None:
    try:
      self._writer.close()
    except RuntimeError as error:
      raise OSError(str(error)) from error
