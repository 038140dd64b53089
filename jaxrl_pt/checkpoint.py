"""Checkpoints: a sharded tree of arrays and a JSON record, written while training goes on.

    DIR/<step>/state    the arrays (Orbax, OCDBT), whatever their shardings
    DIR/<step>/record   JSON: dtype, shape and checksum of every leaf, the caller's extras, and a
                        CRC-32 of these

A checkpoint is written under a temporary name and renamed when it is whole, so a process killed
while saving leaves a directory that is never read. The file format detects bytes that change later,
and so does a checksum of every leaf, taken on the device before saving and after restoring. Nothing
is unpickled.
"""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import json
import logging
import pathlib
import re
import shutil
import sys
import tempfile
from typing import Any, NamedTuple, Self
import zlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxrl_pt import config as cfg
from jaxrl_pt.checksum import checksum, paths
from jaxrl_pt.errors import Unwritable, UserError
from jaxrl_pt.files import FULL, reason_of

_TEMPORARY = '.orbax-checkpoint-tmp'
# Orbax takes other spellings of a number ("²", "007") for steps too, or stumbles over them.
_STEP = re.compile('0|[1-9][0-9]*')
# Errors of this machine, which say nothing about the bytes on disk.
_MACHINE = (MemoryError, jax.errors.JaxRuntimeError)


class Restored(NamedTuple):
  """A restored checkpoint."""

  state: Any
  extras: dict[str, Any]  # the JSON values saved with the state
  step: int
  skipped: tuple[str, ...]  # newer checkpoints that were corrupt, with the reason of each


# --- The record ---------------------------------------------------------------------


def _describe(leaf: Any) -> dict[str, Any]:
  return {'dtype': str(jnp.dtype(leaf.dtype)), 'shape': list(leaf.shape)}


def _spell(leaf: Mapping[str, Any]) -> str:
  return f'{leaf["dtype"]}{list(leaf["shape"])}'


def _crc(content: Any) -> int:
  return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _make_record(step: int, state: Any, extras: Mapping[str, Any]) -> dict[str, Any]:
  sums = checksum(state)
  leaves = {path: {**_describe(x), 'checksum': sums[path]} for path, x in paths(state).items()}
  content = {'step': step, 'leaves': leaves, 'extras': dict(extras)}
  return {'crc32': _crc(content), 'content': content}


class _Corrupt(Exception):
  """A checkpoint whose bytes are not those that were written."""


def _read_record(directory: pathlib.Path, step: int) -> dict[str, Any]:
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    try:
      args = ocp.args.Composite(record=ocp.args.JsonRestore())
      record = reader.restore(directory / str(step), args=args)['record']
      content, crc = record['content'], record['crc32']
    except Exception as error:
      raise _Corrupt(f'its record cannot be read ({_first_line(error)})') from error
  if _crc(content) != crc:
    raise _Corrupt('its record fails its CRC')
  recorded = content.get('step', step)  # Checkpoints of earlier versions do not record it.
  if recorded != step:
    raise UserError(f'{directory / str(step)} holds the checkpoint of step {recorded}: it '
                    'was renamed or copied; rename it back, or delete it.')
  return content


def _check_model(saved: Mapping[str, Any], expected: Any, part: str, where: str) -> None:
  """Refuses leaves of other dtypes or shapes, which are the user's mistake and not corruption."""
  prefix = f'{part}/' if part else ''
  wanted = {prefix + path: _describe(leaf) for path, leaf in paths(expected).items()}
  saved = {path: leaf for path, leaf in saved.items() if path.startswith(prefix)}
  for path in [*wanted, *saved]:
    in_checkpoint = _spell(saved[path]) if path in saved else 'absent'
    in_run = _spell(wanted[path]) if path in wanted else 'absent'
    if in_checkpoint != in_run:
      raise UserError(
          f'{where} belongs to another model: {path} is {in_checkpoint} in the checkpoint and '
          f'{in_run} in this run; use the settings it was trained with, or another work directory.')


# --- Reading --------------------------------------------------------------------------


def steps(directory: pathlib.Path) -> list[int]:
  """The steps of the finished checkpoints in `directory`, rising; [] if there is none."""
  try:
    return sorted(int(p.name) for p in directory.iterdir()
                  if _STEP.fullmatch(p.name) and p.is_dir())
  except (FileNotFoundError, NotADirectoryError):
    return []


def _restore_step(directory: pathlib.Path, step: int, abstract: Any, part: str) -> Restored:
  content = _read_record(directory, step)
  _check_model(content['leaves'], abstract, part, f'checkpoint {directory / str(step)}')
  item = {part: abstract} if part else abstract
  restore_args = ocp.checkpoint_utils.construct_restore_args(item)
  args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=bool(part))
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    try:
      tree = reader.restore(directory / str(step), args=ocp.args.Composite(state=args))['state']
    except _MACHINE:
      raise
    except Exception as error:
      raise _Corrupt(f'its arrays cannot be read ({_first_line(error)})') from error
  for path, value in checksum(tree).items():
    if value != content['leaves'][path]['checksum']:
      raise _Corrupt(f'the checksum of {path} differs from the one saved with it')
  return Restored(tree[part] if part else tree, content['extras'], step, ())


def restore(directory: pathlib.Path, abstract: Any, step: int | None = None, *,
            part: str = '') -> Restored:
  """Restores the newest usable checkpoint, or exactly that of `step`, onto any mesh.

  This writes nothing, so the directory may be read-only.

  Args:
    directory: the directory of the checkpoints.
    abstract: tree of `jax.ShapeDtypeStruct` with shardings, which need not be the saved ones.
    step: the checkpoint's step; None takes the newest that is not corrupt.
    part: the name of a top-level field to restore alone ('params'); `abstract` is then its tree.

  Raises:
    UserError: no checkpoint, none that can be read, or one of another model.
  """
  directory = directory.absolute()
  skipped: list[str] = []
  for candidate in _candidates(directory, step):
    try:
      restored = _restore_step(directory, candidate, abstract, part)
      return restored._replace(skipped=tuple(skipped))
    except _Corrupt as error:
      skipped.append(_skip(directory, candidate, error))
  raise UserError(_none_left(directory, skipped))


def read_extras(directory: pathlib.Path, step: int | None = None) -> tuple[int, dict[str, Any]]:
  """(step, extras) of the newest readable checkpoint, or of that of `step`; reads no array.

  Raises:
    UserError: no checkpoint, or none whose record can be read.
  """
  directory = directory.absolute()
  skipped: list[str] = []
  for candidate in _candidates(directory, step):
    try:
      return candidate, _read_record(directory, candidate)['extras']
    except _Corrupt as error:
      skipped.append(_skip(directory, candidate, error))
  raise UserError(_none_left(directory, skipped))


def _candidates(directory: pathlib.Path, step: int | None) -> list[int]:
  """The steps of the checkpoints to try, one after the other: all, falling, or only `step`."""
  finished = steps(directory)
  if not finished:
    raise UserError(f'no checkpoint in {directory}: give the work directory of a run that has '
                    'saved one.')
  if step is None:
    return finished[::-1]
  if step not in finished:
    raise UserError(f'no checkpoint of step {step} in {directory}: choose one of '
                    f'{", ".join(map(str, finished))}.')
  return [step]


def _skip(directory: pathlib.Path, step: int, error: _Corrupt) -> str:
  """Warns that a corrupt checkpoint is skipped; returns the reason."""
  text = f'checkpoint {directory / str(step)} is corrupt: {error}'
  if jax.process_index() == 0:
    print(f'warning: {text}; skipped', file=sys.stderr, flush=True)
  return text


def _none_left(directory: pathlib.Path, skipped: list[str]) -> str:
  return (f'no usable checkpoint in {directory}: {"; ".join(skipped)}; choose another step, or '
          'start again in another work directory.')


def _first_line(error: BaseException) -> str:
  text = str(error).strip().split('\n', 1)[0]
  return f'{type(error).__name__}: {text[:120]}'


# --- Writing --------------------------------------------------------------------------


def _not_orbax(record: logging.LogRecord) -> bool:
  """A log filter for Orbax's tracebacks from each thread of an error, which is raised anyway."""
  return 'orbax' not in record.pathname


class Checkpointer:
  """Saves a run's checkpoints asynchronously. Final.

  The last `Checkpoint.keep` checkpoints are kept, and for good those of every `keep_every` steps.
  Leaving it as a context manager waits for the last save.
  """

  def __init__(self, directory: pathlib.Path, config: cfg.Checkpoint):
    """Makes `directory` if it is absent, and removes what killed saves left there.

    Only the run that writes checkpoints may do so; readers use the function `restore`.

    Raises:
      UserError: the directory cannot be made or written to.
    """
    self._directory = directory.absolute()
    self._config = config
    _prepare(self._directory)
    _remove_temporaries(self._directory)
    logging.getLogger('absl').addFilter(_not_orbax)
    self._pending: int | None = None  # step of the save under way
    self._done: int | None = None  # newest step that this object has saved or restored
    self._corrupt: set[int] = set()  # steps of corrupt checkpoints, which the next save deletes
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    keep: list[policies.PreservationPolicy] = [policies.LatestN(self._config.keep)]
    if self._config.keep_every:
      keep.append(policies.EveryNSteps(self._config.keep_every))
    return ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            # If a directory cannot be made, Orbax's threads would wait for it for five minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            lightweight_initialize=True))

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
               trace: object) -> None:
    del trace
    if kind is None:
      self.close()
      return
    with contextlib.suppress(Exception):  # The error that is raised already matters more.
      self.close()
    # Another file of the run cannot be written. Only here is it known what can be resumed from.
    if isinstance(error, Unwritable):
      raise UserError(f'{error.problem}; {self._last_good()}: mend that and run the same command '
                      'again to go on from there.') from error

  def save(self, step: int, state: Any, extras: Mapping[str, Any]) -> None:
    """Starts to save `state`, and returns once the arrays have been copied off the devices.

    Args:
      step: steps taken by the training loop. If this object has just saved or restored a
        checkpoint of that step, nothing is done.
      state: tree of arrays; every process gives its shards of the same tree.
      extras: JSON values to keep with the state (loader state, settings, versions, …).

    Raises:
      UserError: this or the previous save failed, or there is a checkpoint of this or a later
        step already.
    """
    self.wait()
    if step == self._done:
      return
    for corrupt in sorted(self._corrupt):  # They would count among the last `keep`.
      self._manager.delete(corrupt)
    self._corrupt.clear()
    latest = self.latest_step()
    if latest is not None and latest >= step:
      raise UserError(f'{self._directory} already holds a checkpoint of step {latest}, so step '
                      f'{step} cannot be added: resume from it, or use another work directory.')
    record = _make_record(step, state, extras)
    with self._explaining(step):
      # Orbax would make the directory again, with nothing in it but this checkpoint.
      if not self._directory.is_dir():
        raise FileNotFoundError(errno.ENOENT, 'the directory was deleted or renamed')
      self._pending = step
      self._manager.save(step, force=True, args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record)))

  def wait(self) -> None:
    """Blocks until the save under way is on disk.

    Raises:
      UserError: the save failed.
    """
    if self._pending is None:
      return
    with self._explaining(self._pending):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    self._done, self._pending = self._pending, None

  def close(self) -> None:
    """Waits for the save under way and ends the background threads."""
    try:
      self.wait()
    finally:
      self._manager.close()
      logging.getLogger('absl').removeFilter(_not_orbax)

  def latest_step(self) -> int | None:
    """The step of the newest finished checkpoint, or None."""
    return max(self.steps(), default=None)

  def steps(self) -> list[int]:
    """The steps of the finished checkpoints, rising."""
    return steps(self._directory)

  def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
    """As the function `restore`; the next save deletes the checkpoints that were found corrupt."""
    self.wait()
    restored = restore(self._directory, abstract_state, step)
    self._done = restored.step
    if step is None:
      self._corrupt = {s for s in self.steps() if s > restored.step}
    return restored

  def read_extras(self) -> dict[str, Any]:
    """The extras of the newest readable checkpoint."""
    return read_extras(self._directory)[1]

  def _last_good(self) -> str:
    """The newest finished checkpoint in words, even if its directory has been deleted."""
    finished = self.steps()
    if self._done is not None and self._done not in finished:
      return f'the last good checkpoint in {self._directory} was step {self._done}'
    if not finished:
      return f'there is no checkpoint in {self._directory}'
    return f'the last good checkpoint is step {finished[-1]} in {self._directory}'

  @contextlib.contextmanager
  def _explaining(self, step: int) -> Iterator[None]:
    """Turns an error of the disk while step `step` is saved into a UserError."""
    try:
      yield
    except Exception as error:
      self._pending = None
      reason = reason_of(error)
      gone = not self._directory.is_dir()
      if reason is None and not gone:
        raise
      # A manager keeps the error of a failed save, so a new one takes its place.
      with contextlib.suppress(Exception):
        self._manager.close()
      if not gone:
        _remove_temporaries(self._directory)
        self._manager = self._open()
      if reason in FULL:
        raise UserError(f'no space left to save the checkpoint of step {step}; '
                        f'{self._last_good()}: free some space and resume.') from error
      why = 'the directory was deleted or renamed' if gone else reason
      raise UserError(f'cannot save the checkpoint of step {step} ({why}); {self._last_good()}: '
                      'mend that and run the same command again to go on from there.') from error


def _prepare(directory: pathlib.Path) -> None:
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
      pass
  except OSError as error:
    raise UserError(f'cannot write checkpoints to {directory} ({error.strerror}): choose a work '
                    'directory that can be written.') from error


def _remove_temporaries(directory: pathlib.Path) -> None:
  if jax.process_index() != 0:
    return
  for path in directory.glob(f'*{_TEMPORARY}*'):
    shutil.rmtree(path, ignore_errors=True)
