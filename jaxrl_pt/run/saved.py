"""Checkpoints, settings and tokenizer in a work directory: how they are saved and resumed from."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import importlib.metadata
import os
from pathlib import Path
import shutil
from typing import Any

import jax

from jaxrl_pt import checkpoint, files
from jaxrl_pt.checkpoint import Checkpointer, Restored
from jaxrl_pt.data import tokenizer as tokenizers
from jaxrl_pt.errors import UserError
from jaxrl_pt.gin_bindings import current_names
from jaxrl_pt.run import places, resume
from jaxrl_pt.run.job import Job
from jaxrl_pt.run.places import CHECKPOINTS, CONFIG, TOKENIZER
from jaxrl_pt.run.session import Session, check_tokenizer
from jaxrl_pt.types import TrainState


def checkpoint_extras(session: Session, loader_state: Mapping[str, Any]) -> dict[str, Any]:
  """The JSON half of a checkpoint: all that is needed to resume, or to sample elsewhere.

  Args:
    session: the run's session.
    loader_state: the job's position in the data.
  """
  return {
      'loader': dict(loader_state),
      'config': session.resolved_text,
      'objective': type(session.run.objective).__name__,
      'model': dataclasses.asdict(session.run.model),
      **_texts(session),
      'policies': places.policies(session.run, session.workdir),
      'environment': resume.environment(list(session.mesh.devices.flat)),
      'versions': {name: importlib.metadata.version(name)
                   for name in ('jaxrl_pt', 'jax', 'optax', 'orbax-checkpoint')},
  }


def _texts(session: Session) -> dict[str, Any]:
  """Where the run's prepared texts are, and its tokenizer; nothing of a run without texts."""
  if session.prepared is None:
    return {}
  data = session.data.directory.absolute()
  return {'tokenizer': session.data.tokenizer.fingerprint,
          'data': {'absolute': str(data), 'relative': os.path.relpath(data, session.workdir)}}


def check_objective(session: Session, extras: Mapping[str, Any]) -> None:
  """Refuses to resume a run of one objective as a run of another.

  Raises:
    UserError: the checkpoint is of another objective.
  """
  saved, ours = extras.get('objective'), type(session.run.objective).__name__
  if saved != ours:
    raise UserError(f'The work directory {session.workdir} holds a run of {saved}, this one is '
                    f'{ours}: choose another --workdir.')


def restore_or_init(job: Job, checkpointer: Checkpointer
                    ) -> tuple[TrainState, dict[str, Any] | None]:
  """The newest good checkpoint's state and position in the data, or a new state and None.

  Prints which settings and surroundings differ from those of the checkpoint.

  Raises:
    UserError: the checkpoint is not of this run; the work directory stays as it was.
  """
  session = job.session
  if checkpointer.latest_step() is None:
    return job.start(), None
  # This comes before the arrays are read: another objective's or model's state is another tree.
  step, extras = checkpoint.read_extras(session.workdir / CHECKPOINTS)
  _check(job, step, extras)
  restored = checkpointer.restore(job.abstract)
  if restored.step != step:
    _check(job, restored.step, restored.extras)
  if session.prepared is not None:
    check_tokenizer(session.data, restored.extras['tokenizer'], session.workdir)
  if jax.process_index() == 0:
    print(f'Resuming from step {restored.step} in {session.workdir}', flush=True)
    for line in _differences(session, restored):
      print(line, flush=True)
  return restored.state, restored.extras['loader']


def _check(job: Job, step: int, extras: Mapping[str, Any]) -> None:
  """Refuses a checkpoint of another objective, of other settings or of other data."""
  session = job.session
  check_objective(session, extras)
  changes = resume.differences(current_names(extras['config']), session.resolved_text)
  resume.check_settings(changes, session.allow, f'checkpoint {step} in {session.workdir}')
  job.check(extras['loader'])


def _differences(session: Session, restored: Restored) -> Iterator[str]:
  """Lines that say how settings and surroundings differ from the checkpoint's."""
  changes = resume.differences(current_names(restored.extras['config']), session.resolved_text)
  if changes:
    yield 'Settings that differ from here on: ' + ', '.join(map(str, changes))
  here = resume.environment(list(session.mesh.devices.flat))
  sentence = resume.describe_environment(restored.extras.get('environment', {}), here,
                                         restored.step)
  if sentence:
    yield sentence


def record(session: Session, step: int) -> None:
  """Writes the run's tokenizer and settings into its work directory.

  This comes after all checks, so that a refused run changes nothing. If the settings differ from
  those of the run so far, the latter are kept as config_until_step_N.gin.

  Args:
    session: the run's session.
    step: the step from which the run goes on.

  Raises:
    Unwritable: the directory cannot be written.
  """
  if jax.process_index() != 0:
    return
  if session.prepared is not None:
    _record_tokenizer(session.data.tokenizer, session.workdir / TOKENIZER)
  _record_carried(session)
  config = session.workdir / CONFIG
  before = config.read_text(encoding='utf-8') if config.is_file() else None
  if before == session.resolved_text:
    return
  if before is not None and step:
    files.write_text(session.workdir / f'config_until_step_{step}.gin', before)
  files.write_text(config, session.resolved_text)


def _record_carried(session: Session) -> None:
  """Copies the chat template and whatever else the start policy carries; whole or not at all."""
  ours = session.workdir / places.CARRIED
  theirs = places.carried(session.run, session.workdir)
  if theirs is None or theirs == ours:
    return
  with files.writing(ours), files.unfinished_directory(ours) as temporary:
    # Whatever else lies there describes the weights, which training changes.
    for name in places.SMALL_FILES:
      if (theirs / name).is_file():
        shutil.copyfile(theirs / name, temporary / name)
    temporary.rename(ours)


def _record_tokenizer(tokenizer: tokenizers.Tokenizer, directory: Path) -> None:
  """Writes the tokenizer into the work directory, where the model is used without its data."""
  with contextlib.suppress(UserError):  # There is no tokenizer yet, or it is not whole.
    there = tokenizers.load(directory)
    if (there.fingerprint, there.stop_ids) == (tokenizer.fingerprint, tokenizer.stop_ids):
      return
  temporary = directory.with_name(f'.{directory.name}')
  with files.writing(directory):
    for old in (temporary, directory):
      shutil.rmtree(old, ignore_errors=True)
    tokenizer.save(temporary)
    temporary.rename(directory)
