"""Data sets in the folders of Hugging Face's library `datasets`, read as streams.

A folder is one that was downloaded from the Hub (Parquet, JSON, CSV or text files, whose names or
README.md say which split they are) or that `save_to_disk` wrote (Arrow files). Nothing is fetched,
no script of a folder is run and nothing is unpickled: the library gets a list of local files and
the name of one of its own readers.
"""

from collections.abc import Iterator
import json
from pathlib import Path
from typing import Any

from jaxrl_pt import config
from jaxrl_pt.errors import MissingFileError, UserError

_READERS = {'.parquet': 'parquet', '.json': 'json', '.jsonl': 'json', '.ndjson': 'json',
            '.csv': 'csv', '.txt': 'text', '.arrow': 'arrow'}
_ONE, _MANY = 'state.json', 'dataset_dict.json'  # what `save_to_disk` writes


def files(source: config.HuggingFaceDataset) -> list[Path]:
  """The files of the source's split, in the order in which they are read.

  Raises:
    UserError: there is no such folder or split, or its files are not local ones of a known kind.
  """
  path = Path(source.path).expanduser()
  if not path.exists():
    raise MissingFileError(f'HuggingFaceDataset.path = {source.path!r} does not exist (working '
                           f'directory {Path.cwd()}): download the data set, and give its folder.')
  _library()  # Whoever lacks it hears so first.
  splits = _saved_splits(path) or _splits(path)
  found = splits.get(source.split)
  if not found:
    has = ', '.join(map(repr, splits)) or 'no files that can be read'
    raise UserError(f'{path} has no split {source.split!r}, only {has}: set '
                    'HuggingFaceDataset.split to one of them.')
  _reader(path, found)
  return found


def texts(source: config.HuggingFaceDataset) -> Iterator[str]:
  """Yields the texts of the source's split, always in the same order.

  Raises:
    UserError: as `files`; or a file cannot be read, or a row has no text in the column.
  """
  datasets = _library()
  found = files(source)
  reader = _reader(Path(source.path), found)
  place = f'of the split {source.split!r} in {source.path}'
  try:
    rows = datasets.load_dataset(reader, data_files={'rows': [str(p) for p in found]},
                                 split='rows', streaming=True)
    if rows.column_names and source.column in rows.column_names:
      rows = rows.select_columns([source.column])
    for number, row in enumerate(rows):
      text = row.get(source.column)
      if isinstance(text, str):
        yield text
        continue
      if source.column not in row:
        raise UserError(f'Row {number} {place} has no column {source.column!r}: set '
                        f'HuggingFaceDataset.column to one of {", ".join(map(repr, row))}.')
      raise UserError(f'Row {number} {place} holds {type(text).__name__}, not text, in '
                      f'{source.column!r}: choose another HuggingFaceDataset.column, or drop the '
                      'row.')
  except UserError:
    raise
  except Exception as error:  # The library's readers raise whatever theirs do.
    reason = ' '.join(str(error.__cause__ or error).split())[:300].rstrip('.')
    raise UserError(f'The rows {place} cannot be read as {reader} ({type(error).__name__}: '
                    f'{reason}): download the files again.') from error


def _library() -> Any:
  try:
    import datasets  # an extra: only this source needs it
  except ImportError as error:
    raise UserError("A HuggingFaceDataset needs the extra `datasets`: pip install "
                    "'jaxrl_pt[datasets]'.") from error
  datasets.disable_progress_bars()
  return datasets


def _suffix(path: Path) -> str:
  return path.with_suffix('').suffix if path.suffix in ('.gz', '.zst') else path.suffix


def _reader(place: Path, found: list[Path]) -> str:
  """The library's reader of files of one kind."""
  kinds = sorted({_suffix(path) for path in found})
  readers = {_READERS.get(kind, '') for kind in kinds}
  if len(readers) != 1 or '' in readers:
    raise UserError(f'The files of a split in {place} end with {", ".join(kinds)}: give a folder '
                    f'with files of one kind, among {", ".join(_READERS)}.')
  return readers.pop()


# --- Splits -----------------------------------------------------------------------


def _saved_splits(path: Path) -> dict[str, list[Path]]:
  """The files of each split of a folder that `save_to_disk` wrote; none for other folders."""
  try:
    if (path / _MANY).is_file():
      names = json.loads((path / _MANY).read_bytes())['splits']
      return {name: _saved(_inside(path, name)) for name in names}
    if (path / _ONE).is_file():
      name = json.loads((path / _ONE).read_bytes()).get('_split') or 'train'
      return {name: _saved(path)}
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    raise UserError(f'{path} is no whole data set of `save_to_disk` ({error!r}): save it '
                    'again.') from error
  return {}


def _saved(path: Path) -> list[Path]:
  state = json.loads((path / _ONE).read_bytes())
  if state.get('_indices_data_files') or state.get('_indices_files'):
    raise UserError(f'{path} was saved with indices that choose and order its rows: call '
                    '`flatten_indices()` before `save_to_disk`.')
  return [_inside(path, file['filename']) for file in state['_data_files']]


def _inside(folder: Path, name: str) -> Path:
  """A file of a folder, or a folder in it, that a record in the folder names."""
  path = folder / name
  if not path.resolve().is_relative_to(folder.resolve()):
    raise UserError(f'{folder} names {name!r}, which is not in it: save the data set again.')
  if not path.exists():
    raise UserError(f'{path} is missing: copy the whole folder.')
  return path


def _splits(path: Path) -> dict[str, list[Path]]:
  """The files of each split, as the library finds them from their names or from README.md."""
  if path.is_file():
    return {'train': [path]}
  from datasets import data_files as patterns

  given = _described(path)
  if any('://' in pattern for group in given.values() for pattern in group):
    raise UserError(f'README.md in {path} names files elsewhere: download them, and give their '
                    'folder.')
  try:
    found = patterns.DataFilesDict.from_patterns(
        given or patterns.get_data_patterns(str(path)), base_path=str(path),
        allowed_extensions=[*_READERS, *(f'{kind}{zipped}' for kind in _READERS
                                         for zipped in ('.gz', '.zst'))])
  except (FileNotFoundError, patterns.EmptyDatasetError):
    return {}
  splits = {str(name): [Path(file) for file in group if Path(file).name not in (_ONE, _MANY)]
            for name, group in found.items()}
  for group in splits.values():
    for file in group:
      if not file.resolve().is_relative_to(path.resolve()):
        raise UserError(f'README.md in {path} names {file}, which is not in it: give the folder '
                        'that holds the files.')
  return {name: group for name, group in splits.items() if group}


def _described(path: Path) -> dict[str, list[str]]:
  """The patterns of each split that README.md gives; empty where it gives none.

  Raises:
    UserError: the folder holds several data sets.
  """
  from datasets import data_files as patterns
  import yaml  # comes with `datasets`

  try:
    text = (path / 'README.md').read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError):
    return {}
  head = text.split('---\n')[1] if text.startswith('---\n') and text.count('---\n') > 1 else ''
  try:
    described = yaml.safe_load(head)
  except (yaml.YAMLError, RecursionError) as error:
    raise UserError(f'README.md in {path} has a damaged header ({error.__class__.__name__}): '
                    'download it again, or remove it.') from error
  sets = described.get('configs') if isinstance(described, dict) else None
  sets = [one for one in sets if isinstance(one, dict)] if isinstance(sets, list) else []
  if len(sets) > 1:
    names = ', '.join(repr(one.get('config_name')) for one in sets)
    raise UserError(f'{path} holds several data sets ({names}): give the folder of one of them, '
                    'or a file.')
  if not sets or 'data_files' not in sets[0]:
    return {}
  try:
    given = patterns.sanitize_patterns(sets[0]['data_files'])
  except (ValueError, TypeError, LookupError) as error:
    raise UserError(f'README.md in {path} says in data_files what names no files: mend it, or '
                    'remove it.') from error
  return {str(name): [str(one) for one in group] for name, group in given.items()}
