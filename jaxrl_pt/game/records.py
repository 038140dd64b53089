"""Trajectories in a directory: one record an episode in ArrayRecord, and a manifest.

A record is a `.npz` file of named arrays, which any NumPy reads; nothing is pickled. The manifest
says which settings the episodes are of, so that what is read equals what `trajectories.Source`
would have made.
"""

from collections.abc import Sequence
import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import Any
import zipfile

from array_record.python import array_record_module
import jax
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import files
from jaxrl_pt.data import publish
from jaxrl_pt.errors import UserError
from jaxrl_pt.game import base
from jaxrl_pt.game.trajectories import Source, Trajectory, generate

MANIFEST = 'manifest.json'
RECORDS = 'trajectories.array_record'
_BATCH = 64


def named(trajectory: Trajectory) -> dict[str, Any]:
  """The arrays of a trajectory by name; those of its truth as `truth/NAME`."""
  return {'frames': trajectory.frames, 'actions': trajectory.actions,
          **{f'truth/{field.name}': getattr(trajectory.truth, field.name)
             for field in dataclasses.fields(base.Truth)}}


def from_named(found: dict[str, Any]) -> Trajectory:
  """The trajectory whose arrays `named` has named."""
  truth = {field.name: found[f'truth/{field.name}'] for field in dataclasses.fields(base.Truth)}
  return Trajectory(found['frames'], found['actions'], base.Truth(**truth))


def write(source: Source, count: int, destination: Path) -> None:
  """Writes episodes 0 … count − 1 into a new directory, which is whole or absent.

  Raises:
    UserError: there are not so many episodes, or the place exists or cannot be written.
  """
  if count > source.num_examples:
    raise UserError(f'There are {source.num_examples} episodes (Trajectories.size), not {count}: '
                    'write fewer, or raise it.')
  with files.whole_directory(destination) as directory:
    writer = publish.RecordWriter(directory / RECORDS)
    for low in range(0, count, _BATCH):
      batch = named(source.batch(range(low, min(low + _BATCH, count))))
      for row in range(len(batch['actions'])):
        writer.write(files.npz_bytes({name: value[row] for name, value in batch.items()}))
    writer.close()
    manifest = {'episodes': count, 'digest': source.digest,
                'game': type(source.config.game).__name__,
                'is_validation': source.is_validation,
                'settings': dataclasses.asdict(source.config)}
    files.write_text(directory / MANIFEST, json.dumps(manifest, indent=2) + '\n')


@dataclasses.dataclass(frozen=True)
class Recorded:
  """Written episodes, which the loader reads like the `Source` that they are of."""

  path: Path
  source: Source
  num_examples: int

  @property
  def digest(self) -> str:
    return self.source.digest

  def batch(self, ids_B: np.ndarray | Sequence[int]) -> Trajectory:
    """The episodes `ids_B` as numpy arrays [B, T, ...].

    Raises:
      IndexError: an id outside of 0 … num_examples − 1.
      UserError: a record is damaged.
    """
    ids = [int(i) for i in ids_B]
    if ids and not (0 <= min(ids) and max(ids) < self.num_examples):
      raise IndexError(f'episode ids {ids} outside 0 … {self.num_examples - 1}')
    expected = _expected(self.source)
    rows = []
    for number, record in zip(ids, _reader(str(self.path)).read(ids), strict=True):
      try:
        with np.load(io.BytesIO(record), allow_pickle=False) as found:
          row = {name: found[name] for name in expected}
      except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise _damaged(self.path, f'episode {number}: {error}') from error
      if {name: (value.shape, value.dtype) for name, value in row.items()} != expected:
        raise _damaged(self.path, f'episode {number} has arrays of another shape')
      rows.append(row)
    return from_named({name: np.stack([row[name] for row in rows]) for name in expected})


def open_recorded(directory: Path) -> Recorded:
  """Opens what `write` has written.

  Raises:
    UserError: it is missing, damaged, or of a release with other rules.
  """
  advice = 'give a directory that `jaxrl-pt trajectories --output` has written'
  manifest = files.read_object(directory / MANIFEST, advice)
  try:
    game = {kind.__name__: kind for kind in (cfg.Traveler, cfg.Pong, cfg.PacMan)}[manifest['game']]
    settings = {**manifest['settings'], 'game': game(**manifest['settings']['game'])}
    source = Source(cfg.Trajectories(**settings), manifest['is_validation'])
    count, digest = manifest['episodes'], manifest['digest']
    held = _reader(str(directory / RECORDS)).num_records()
  except (KeyError, TypeError, RuntimeError, OSError) as error:
    raise _damaged(directory, str(error)) from error
  if held != count:
    raise _damaged(directory, f'{held} episodes instead of {count}')
  if digest != source.digest:
    raise UserError(f'{directory} holds episodes of other rules than this release has: write them '
                    'again.')
  return Recorded(directory / RECORDS, source, count)


def _damaged(path: Path, what: str) -> UserError:
  return UserError(f'The trajectories in {path} are damaged ({what}): write them again.')


@functools.lru_cache(maxsize=16)
def _reader(path: str) -> Any:
  return array_record_module.ArrayRecordReader(path)


@functools.lru_cache(maxsize=8)
def _expected(source: Source) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """The shape and type of each array of an episode."""
  batch = jax.eval_shape(lambda ids: generate(source, ids), jax.ShapeDtypeStruct((1,), np.uint32))
  return {name: (value.shape[1:], np.dtype(value.dtype)) for name, value in named(batch).items()}
