"""Directories that appear whole or not at all, and the record files in them."""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import shutil
import tempfile

from array_record.python import array_record_module

from jaxrl_pt.errors import UserError


@contextlib.contextmanager
def new_directory(final: Path, manifest: str) -> Iterator[Path]:
  """Gives a temporary directory beside `final` and renames it to `final` at the end.

  Where another process has published `final` meanwhile (it then holds `manifest`),
  that one stays. After an error nothing is left behind.

  Raises:
    UserError: the place cannot be written.
  """
  temporary = None
  try:
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{final.name}-', dir=final.parent))
    temporary.chmod(0o755)  # mkdtemp's 0700 would lock other users out of a shared cache
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
  finally:
    if temporary is not None:
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
