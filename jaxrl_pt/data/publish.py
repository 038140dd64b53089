"""Writes directories that appear whole or not at all, and the record files in them."""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import re

from array_record.python import array_record_module

from jaxrl_pt import files
from jaxrl_pt.errors import UserError

_UNFINISHED = re.compile(r'(\.(?:data|seqio)-[0-9a-f]{16}-\w+)(?:\.lock)?')


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
    with files.unfinished_directory(final) as temporary:
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


def remove_abandoned(directory: Path) -> None:
  """Removes the unfinished directories in `directory` whose makers are dead."""
  with contextlib.suppress(OSError):
    matches = [_UNFINISHED.fullmatch(path.name) for path in directory.iterdir()]
    for name in {found[1] for found in matches if found}:
      files.remove_if_abandoned(directory / name)


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
