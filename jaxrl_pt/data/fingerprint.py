"""Names files by their content: the digests that name prepared data.

Hashing reads every byte of a corpus, at about a gigabyte a second, which is little beside making
tokens of the bytes but much at every start. So digests are kept with the size and time of change
that their file had, and only files that look different are read again. A touched, copied or moved
file gets the same digest; a change that leaves size and time as they were is not seen.
"""

from collections.abc import Iterable
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from jaxrl_pt import config, files
from jaxrl_pt.data import sources
from jaxrl_pt.errors import MissingFileError, Unwritable, UserError

_KEPT = 'fingerprints.json'


# By absolute path: size, time of change and digest.
Known = dict[str, tuple[int, int, str]]


def _digests(paths: Iterable[Path], known: Known) -> Known:
  """The digest of each file, taken from `known` where its size and time of change are the same.

  Raises:
    UserError: a file cannot be read.
  """
  found: Known = {}
  for path in paths:
    name = str(path.absolute())
    try:
      stat = path.stat()
      before = known.get(name)
      if before is not None and before[:2] == (stat.st_size, stat.st_mtime_ns):
        found[name] = before
        continue
      with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'blake2b').hexdigest()[:32]
    except OSError as error:
      raise UserError(f'Cannot read {path}: {error.strerror or error}.') from error
    found[name] = stat.st_size, stat.st_mtime_ns, digest
  return found


def keep(directory: Path, found: Known) -> None:
  """Keeps digests in `directory` for later runs; without the right to write, they are made anew."""
  kept = _load(directory / _KEPT)
  if not found.items() <= kept.items():
    with contextlib.suppress(Unwritable):
      files.write_text(directory / _KEPT, json.dumps({**kept, **found}))


def _load(path: Path) -> Known:
  """The digests that `keep` wrote; none where the file is missing or is something else."""
  try:
    kept = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):
    return {}
  if not isinstance(kept, dict):
    return {}
  return {name: tuple(value) for name, value in kept.items()
          if isinstance(value, list) and [type(x) for x in value] == [int, int, str]}


def key(data: config.Data, cached: Path | None, base: Path, form: Any) -> tuple[str, Known]:
  """The hash of all that decides the examples; where files lie is no part of it.

  Args:
    data: the run's settings of data.
    cached: the directory of a cached seqio task, or None.
    base: the directory where digests are kept.
    form: what else decides the examples, such as the version of the prepared files' format.

  Returns:
    The hash, and the digests that it was made of, to `keep`.

  Raises:
    UserError: no file of the source, or one that cannot be read.
  """
  parts = [sorted(cached.iterdir())] if cached else [
      sources.files(part) for part in sources.parts(data.source)]
  paths = [path for part in parts for path in part]
  counts = [len(part) for part in parts]  # tells a source's files from another's
  if data.validation_glob:
    paths += sources.files(data.validation_source)
    counts.append(len(paths))
  match data.tokenizer:
    case config.HuggingFaceTokenizer(path=path) | config.SentencePiece(path=path):
      if not Path(path).expanduser().is_file():
        raise MissingFileError(f'Cannot read the tokenizer file {path}: there is no such '
                               'file.')
      paths.append(Path(path).expanduser())
  found = _digests(paths, _load(base / _KEPT))
  content = (form, without_places(data), counts,
             [(p.suffix == '.gz', found[str(p.absolute())][2]) for p in paths])
  return hashlib.sha256(repr(content).encode()).hexdigest(), found


def without_places(data: config.Data) -> config.Data:
  """The settings without those that only say where something lies."""
  data = dataclasses.replace(data, cache_dir='', num_workers=0, source=_placeless(data.source),
                             validation_glob='*' if data.validation_glob else '')
  match data.tokenizer:
    case config.HuggingFaceTokenizer() | config.SentencePiece() as tokenizer:
      data = dataclasses.replace(data, tokenizer=dataclasses.replace(tokenizer, path='*'))
  return data


def _placeless(source: Any) -> Any:
  """A source without the place of its files."""
  match source:
    case config.Mixture(sources=parts):  # Names and weights do not decide the examples.
      names = tuple(map(str, range(len(parts))))
      return config.Mixture(names, tuple(map(_placeless, parts)), (1.0,) * len(parts))
    case config.WeightedConversations(sources=parts):
      return dataclasses.replace(source, sources=tuple(map(_placeless, parts)))
    case (config.TextFiles() | config.Jsonl() | config.Parquet() | config.ArrayRecord()
          | config.Conversations() | config.Preferences()):
      return dataclasses.replace(source, glob='*')
    case config.HybridConversations():
      evaluated = '*' if source.evaluation_glob else ''
      return dataclasses.replace(source, glob='*', evaluation_glob=evaluated)
    case config.HuggingFaceDataset():
      return dataclasses.replace(source, path='*')
    case _:
      return source
