"""Writes a run's files, whole or not at all, and locks them; reads JSON that others wrote."""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import errno
import fcntl
import glob
import io
import json
import os
from pathlib import Path
import re
import secrets
import shutil
import time
from typing import Any

import numpy as np

from jaxrl_pt.errors import Unwritable, UserError

_TEMPORARY = '.tmp'
_DAY = 24 * 3600
# The operating system's words for a disk, a quota or a size limit that is used up.
FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
# Libraries report the operating system's errors as text, such as
# "[OS error 28: ENOSPC No space left on device]".
_OS_ERROR = re.compile('|'.join((r'\bE[A-Z]{3,}\b', *FULL)))
# The errors of `flock` on a file system that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
  """Turns an operating-system error into one sentence that names `path`.

  Raises:
    Unwritable: for any OSError inside except that of a closed pipe, which is not the disk's.
  """
  try:
    yield
  except BrokenPipeError:
    raise
  except OSError as error:
    raise Unwritable(f'cannot write {path} ({error.strerror or error})') from error


def write_bytes(path: Path, content: bytes) -> None:
  """Replaces the file `path` by one rename, once its content is on disk.

  Its directory is made if it is absent.

  Raises:
    Unwritable: the file cannot be written; it is then as it was.
  """
  temporary = path.with_name(f'.{path.name}.{secrets.token_hex(6)}{_TEMPORARY}')
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      # Without a buffer nothing is left to fail when the file is closed.
      with temporary.open('xb', buffering=0) as file:
        write_all(file.fileno(), content)
        os.fsync(file.fileno())
      temporary.replace(path)
      sync(path.parent)
    except OSError:
      temporary.unlink(missing_ok=True)
      raise


def write_text(path: Path, text: str) -> None:
  """Writes text as UTF-8, as `write_bytes` does."""
  write_bytes(path, text.encode())


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes an object a line, as `write_bytes` does; what JSON does not know becomes a float."""
  write_text(path, ''.join(
      json.dumps(row, ensure_ascii=False, default=float) + '\n' for row in rows))


def npz_bytes(arrays: Mapping[str, Any]) -> bytes:
  """The arrays as the content of a .npz file; nothing is pickled."""
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def remove_temporaries(directory: Path) -> None:
  """Removes what a killed `write_bytes` left; only the run that holds the lock may call this."""
  for path in directory.glob(f'.*{_TEMPORARY}'):
    path.unlink(missing_ok=True)


def sync(path: Path) -> None:
  """Blocks until a directory's entries are on disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # Some network file systems cannot, and need not.
      os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
  """Calls os.write until all is written, since a disk that fills up takes a part first."""
  while data:
    data = data[os.write(descriptor, data):]


def reason_of(error: BaseException | None) -> str | None:
  """The operating system's words for `error` or one of its causes; None if it was not at fault."""
  seen: set[int] = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno is not None:
      return os.strerror(error.errno)
    if 'NOT_FOUND' in str(error):  # TensorStore misses a file that it has just written.
      return os.strerror(errno.ENOENT)
    for match in _OS_ERROR.finditer(str(error)):
      if match[0] in FULL:
        return match[0]
      if match[0] in vars(errno):
        return os.strerror(getattr(errno, match[0]))
    error = error.__cause__ or error.__context__
  return None


def read_object(path: Path, advice: str = 'download it again') -> dict[str, Any]:
  """The JSON object in a file that others wrote.

  Args:
    path: the file.
    advice: what the user can do where it is missing or damaged.

  Raises:
    UserError: the file cannot be read, or is no JSON object.
  """
  try:
    value = json.loads(path.read_bytes().decode('utf-8-sig'))
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror}): {advice}.') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON ({error}): {advice}.') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} holds no JSON object: {advice}.')
  return value


# --- Directories ----------------------------------------------------------------------


@contextlib.contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
  """Gives a hidden directory beside `final`, which is renamed to `final` at the end.

  So `final` is whole or absent. What a killed process has left there is removed by the next that
  makes the same directory.

  Raises:
    UserError: `final` exists, or cannot be written.
  """
  final = final.absolute()
  with _beside(final) as temporary:
    yield temporary
    sync(temporary)
    os.rename(temporary, final)


@contextlib.contextmanager
def whole_file(final: Path) -> Iterator[Path]:
  """Gives the path of a file in a hidden directory, which is renamed to `final` at the end.

  Like `whole_directory`, for one file; whoever writes it flushes it to disk.

  Raises:
    UserError: `final` exists, or cannot be written.
  """
  final = final.absolute()
  with _beside(final) as temporary:
    yield temporary / final.name
    os.rename(temporary / final.name, final)


@contextlib.contextmanager
def _beside(final: Path) -> Iterator[Path]:
  """An unfinished directory beside `final`, where nothing stands yet."""
  try:
    # Before `final` is looked for, since a process that is killed right after the renaming leaves
    # something beside it too.
    for lock in final.parent.glob(f'.{glob.escape(final.name)}-*.lock'):
      remove_if_abandoned(lock.with_suffix(''))
    if os.path.lexists(final):
      raise UserError(f'{final} exists already: choose another place, or remove it first.')
    final.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_directory(final) as temporary:
      yield temporary
    sync(final.parent)
  except OSError as error:
    raise UserError(f'{final} cannot be written ({error.strerror or error}): free some space or '
                    'choose another place.') from error


@contextlib.contextmanager
def unfinished_directory(final: Path) -> Iterator[Path]:
  """A hidden directory beside `final`, and beside it a lock file that says that its maker lives.

  It is for the caller to rename; what has not been renamed is removed.
  """
  temporary = final.with_name(f'.{final.name}-{secrets.token_hex(4)}')
  lock = temporary.with_name(f'{temporary.name}.lock')
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(locked(lock))  # First, so that no directory is ever without one.
    except HeldError as error:  # `remove_if_abandoned` met the lock before it was held.
      raise OSError(f'{lock} was taken away') from error
    temporary.mkdir()
    try:
      yield temporary
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
      lock.unlink(missing_ok=True)


def remove_if_abandoned(temporary: Path) -> None:
  """Removes an unfinished directory whose maker is dead.

  A lock that can be taken has lost its holder. A directory without a lock, as on a file system that
  has no locks, is left alone for a day.
  """
  lock = temporary.with_name(f'{temporary.name}.lock')
  with contextlib.suppress(OSError, HeldError):
    if lock.exists():
      with locked(lock) as supported:
        if supported:
          shutil.rmtree(temporary, ignore_errors=True)
          lock.unlink(missing_ok=True)
          return
    if time.time() - temporary.stat().st_mtime > _DAY:
      shutil.rmtree(temporary, ignore_errors=True)


# --- Locks ----------------------------------------------------------------------------


class HeldError(Exception):
  """Another process holds the lock; the message is the note that this process left in it."""


@contextlib.contextmanager
def locked(path: Path, note: str = '') -> Iterator[bool]:
  """Holds an exclusive lock on the file `path`; the death of the process releases it too.

  The lock is `flock`'s. Linux passes it on to NFS, so that it also holds between hosts if the
  server has locks. A file system without locks cannot keep two processes apart.

  Args:
    path: the lock's file, which is made if absent and stays.
    note: text that is written into the file, for other processes to show.

  Yields:
    Whether there is a lock: False on a file system that has none.

  Raises:
    HeldError: another process holds the lock.
    OSError: the file cannot be made.
  """
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
  try:
    supported = True
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
      raise HeldError(os.read(descriptor, 4096).decode(errors='replace')) from error
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      supported = False
    if not path.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
      raise HeldError('it was removed just now')  # Its last holder has deleted the file.
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, note.encode(), 0)
    yield supported
  finally:
    os.close(descriptor)
