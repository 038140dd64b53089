"""Where documents come from: each source is a deterministic stream of texts.

A file that cannot be read as the source says stops the run with its name and the place in it,
before anything is trained on half of the data.
"""

from collections.abc import Iterator
import decimal
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import os
from pathlib import Path
import re
import sysconfig
from typing import IO, Any, NamedTuple
import zlib

from jaxrl_pt import config
from jaxrl_pt.data import (
  generated,
  gym_questions,
  huggingface_data,
  judge_problems,
  tf_example,
)
from jaxrl_pt.errors import MissingFileError, UserError

# Tests, vendored wheels and tables of code points are not prose about programs.
_SKIPPED_DIRECTORIES = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'lib2to3',
                        '__pycache__', '_bundled', 'encodings', 'pydoc_data'}
_MIN_PROSE_BYTES = 200
# It consumes comments and strings in order, so that a quote inside one never opens another.
_COMMENT_OR_STRING = re.compile(
    r'#[^\n]*'
    r'|"""(?P<double>[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*)"""'
    r"|'''(?P<single>[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*)'''"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*'", re.DOTALL)


def documents(source: config.Source) -> Iterator[str]:
  """Yields the non-blank texts of a source, always in the same order.

  Raises:
    UserError: nothing matches, or a file cannot be read as what the source says.
  """
  return (text for text, _ in keyed_documents(source))


def keyed_documents(source: config.Source) -> Iterator[tuple[str, str]]:
  """Yields (text, key) of the documents; documents of one key stand on one side of a split.

  The key is the text itself, or the prompt of a demonstration. The problems of RL are held out by
  their prompts too, so that no other answer to a held-out prompt is trained on.

  Raises:
    UserError: as `documents`.
  """
  match source:
    case config.Demonstrations(source=problems):
      keyed = ((shown.prompt + shown.response, shown.key) for shown in demonstrations(problems))
    case config.Mixture(sources=mixed):
      keyed = (pair for part in mixed for pair in keyed_documents(part))
    case (config.Conversations() | config.HybridConversations() | config.WeightedConversations()
          | config.Preferences() | config.SlipPreferences()
          | config.ResultPreferences()):
      raise UserError(f'{source} holds no documents: choose another Data.source.')
    case _:
      keyed = ((text, text) for text in _texts(source))
  return ((text, key) for text, key in keyed if text.strip())


class Demonstration(NamedTuple):
  """A worked response to a prompt; those of one key stand on one side of a split."""

  key: str
  prompt: str
  response: str


def demonstrations(source: config.Generated | config.ReasoningGym | config.JudgePairs
                   ) -> Iterator[Demonstration]:
  """Yields a worked response to each problem."""
  match source:
    case config.ReasoningGym():
      for question in gym_questions.questions(source):
        yield Demonstration(question.text, question.text, question.answer)
    case config.JudgePairs():
      assert not isinstance(source.source, config.Preferences)  # `config.Demonstrations` says so.
      for problem in judge_problems.problems(source, generated.pairs(source.source)):
        yield Demonstration(problem.key, problem.prompt, problem.demonstration)
    case _:
      for i in range(source.size):
        found = generated.problem(source, i)
        yield Demonstration(found.prompt, found.prompt, found.demonstration)


def _texts(source: config.PythonStdlib | config.TextFiles | config.Jsonl | config.Parquet
           | config.ArrayRecord | config.HuggingFaceDataset | config.Seqio) -> Iterator[str]:
  match source:
    case config.PythonStdlib(max_bytes=max_bytes):
      texts = _python_stdlib(max_bytes)
    case config.TextFiles(glob=pattern, document_start=document_start):
      texts = _text_files(pattern, document_start)
    case config.Jsonl(glob=pattern, text_field=text_field):
      texts = _jsonl(pattern, text_field)
    case config.Parquet(glob=pattern, column=column):
      texts = _parquet(pattern, column)
    case config.ArrayRecord(glob=pattern, feature=feature):
      texts = _array_record(pattern, feature)
    case config.HuggingFaceDataset():
      texts = huggingface_data.texts(source)
    case config.Seqio(name=name):
      raise UserError(f'The seqio task {name} yields token ids, not texts: it is prepared by '
                      'data.seqio_tasks.')
  return texts


def parts(source: config.Source) -> tuple[config.Source, ...]:
  """The sources that a source is put together of; itself where it is one."""
  match source:
    case config.WeightedConversations() | config.Mixture():
      return source.sources
    case _:
      return (source,)


def files(source: config.Source) -> list[Path]:
  """The files that a source reads, sorted; empty for seqio and generated ones.

  Raises:
    UserError: the glob matches no file.
  """
  match source:
    case config.PythonStdlib():
      return _stdlib_files()
    case (config.Seqio() | config.Demonstrations() | config.SlipPreferences()
          | config.ResultPreferences()):
      return []
    case config.WeightedConversations() | config.Mixture():
      return [path for part in parts(source) for path in files(part)]
    case config.HuggingFaceDataset():
      return huggingface_data.files(source)
    case config.HybridConversations(glob=pattern, evaluation_glob=evaluated):
      return [path for each in (pattern, evaluated) if each for path in _matches(each)]
    case _:
      return _matches(source.glob)


def _matches(pattern: str) -> list[Path]:
  found = sorted(Path(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True))
  found = [path for path in found if path.is_file()]
  if not found:
    where = f'{pattern!r} (working directory {os.getcwd()})'
    raise MissingFileError(f'No file matches the glob {where}: give the path of an existing file.')
  return found


# --- The embedded corpus --------------------------------------------------------


def _stdlib_files() -> list[Path]:
  root = Path(sysconfig.get_path('stdlib'))
  found = []
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [name for name in subfolders if name not in _SKIPPED_DIRECTORIES]
    found += [Path(folder, name) for name in names if name.endswith('.py')]
  if not found:
    raise UserError(f'The Python standard library has no .py files under {root}: choose another '
                    'Data.source, such as @cfg.TextFiles().')
  # Sorted by a hash of the name: shuffled, and the same on every machine.
  return sorted(found, key=lambda p: hashlib.sha256(
      p.relative_to(root).as_posix().encode()).digest())


def split_docstrings(source: str) -> tuple[str, str]:
  """Takes a Python file apart into (code without docstrings, its docstrings as prose).

  The two share no text, so one may be trained on and the other held out. A docstring is
  a triple-quoted string that stands on lines of its own after a colon or opens the file.
  """
  code, prose, end, previous = [], [], 0, ':'
  for match in _COMMENT_OR_STRING.finditer(source):
    between = source[end:match.start()]
    previous = between.rstrip()[-1:] or previous
    line_start = source.rfind('\n', 0, match.start()) + 1
    if match['double'] is not None or match['single'] is not None:
      body = match['double'] if match['double'] is not None else match['single']
      line_end = source.find('\n', match.end())
      line_end = len(source) if line_end < 0 else line_end
      alone = not source[line_start:match.start()].strip(' \trRuU')
      if alone and previous in (':', 'r', 'R') and not source[match.end():line_end].strip():
        code.append(source[end:line_start])
        prose.append(inspect.cleandoc(body))
        end = min(line_end + 1, len(source))
        previous = '"'
        continue
    if not match[0].startswith('#'):
      previous = '"'
    code.append(source[end:match.end()])
    end = match.end()
  code.append(source[end:])
  return ''.join(code), '\n\n'.join(prose)


def _python_stdlib(max_bytes: int) -> Iterator[str]:
  left = max_bytes
  for path in _stdlib_files():
    try:
      source = path.read_bytes().decode('utf-8-sig')
    except (OSError, UnicodeDecodeError):
      continue  # a handful of old modules are Latin-1: not worth a codec of their own
    code, prose = split_docstrings(source)
    for text in (code, prose) if len(prose) >= _MIN_PROSE_BYTES else (code,):
      left -= len(text.encode())
      if left < 0:
        return
      yield text


# --- Files ----------------------------------------------------------------------


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
  try:
    return gzip.open(path, 'rb') if path.suffix == '.gz' else path.open('rb')
  except OSError as error:
    raise UserError(f'Cannot open {path}: {error.strerror or error}.') from error


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
  """Yields (line number from 1, byte offset of the line, the line)."""
  offset = 0
  with _open(path) as handle:
    try:
      for number, line in enumerate(handle, 1):
        yield number, offset, line
        offset += len(line)
    except (OSError, EOFError, zlib.error) as error:
      raise UserError(f'Cannot read {path} beyond byte {offset}: {error}.') from error


def _decode(path: Path, raw: bytes, offset: int = 0) -> str:
  try:
    text = raw.decode('utf-8')
    # A byte order mark says how a file is encoded and is none of its text.
    return text if offset else text.removeprefix('\ufeff')
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not UTF-8 at byte offset {offset + error.start}: convert it to '
                    'UTF-8, or leave it out of the glob.') from error


def _text_files(pattern: str, document_start: str) -> Iterator[str]:
  try:
    start = re.compile(document_start, re.MULTILINE)
  except re.error as error:
    raise UserError(f'TextFiles.document_start = {document_start!r} is not a regular '
                    f'expression: {error}.') from error
  for path in _matches(pattern):
    text = _decode(path, b''.join(line for _, _, line in _lines(path)))
    if not document_start:
      yield text
      continue
    cuts = [0, *(match.start() for match in start.finditer(text)), len(text)]
    yield from (text[a:b] for a, b in itertools.pairwise(cuts))


def json_rows(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields ('file:line', object) of each row of JSON-lines files, blank lines left out.

  A number with a point or an exponent is a Decimal, which keeps the digits that the file has.

  Raises:
    UserError: no file matches, or a row is not a JSON object.
  """
  for path in _matches(pattern):
    for number, offset, line in _lines(path):
      text = _decode(path, line, offset)
      if not text.strip():
        continue
      try:
        row = json.loads(text, parse_float=decimal.Decimal)
      except (ValueError, RecursionError) as error:
        raise UserError(f'{path}:{number} is not JSON: {error}.') from error
      if not isinstance(row, dict):
        raise UserError(f'{path}:{number} is not a JSON object: write one object a line.')
      yield f'{path}:{number}', row


def text_of(value: Any, place: str, setting: str, field: str, row: dict[str, Any]) -> str:
  """Returns `value`, which stood in `field` of `row`, if it is text.

  Raises:
    UserError: it is no text, or not valid Unicode.
  """
  if not isinstance(value, str):
    raise UserError(f'{place} has no text in the field {field!r}: set {setting} to one of '
                    f'{_names(row)}.')
  if not is_unicode(value):
    raise UserError(f'{place} holds half of a surrogate pair (\\ud800–\\udfff) in {field!r}: '
                    'that is not text; mend or drop the row.')
  return value


def _jsonl(pattern: str, text_field: str) -> Iterator[str]:
  for place, row in json_rows(pattern):
    yield text_of(row.get(text_field), place, 'Jsonl.text_field', text_field, row)


def _names(row: Any) -> str:
  return ', '.join(map(repr, row)) if isinstance(row, dict) and row else 'an object’s fields'


def is_unicode(text: str) -> bool:
  """Whether a text has no halves of surrogate pairs, so that it can be written."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _parquet(pattern: str, column: str) -> Iterator[str]:
  try:
    import pyarrow as pa  # an extra: only this source needs it
    import pyarrow.parquet as pq
  except ImportError as error:
    raise UserError("A Parquet source needs the extra `parquet`: pip install 'jaxrl_pt[parquet]'."
                    ) from error
  for path in _matches(pattern):
    try:
      with pq.ParquetFile(path) as table:
        names = table.schema_arrow.names
        if column not in names:
          raise UserError(f'{path} has no column {column!r}: set Parquet.column to one of '
                          f'{", ".join(map(repr, names))}.')
        kind = table.schema_arrow.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
          raise UserError(f'The column {column!r} of {path} holds {kind}, not text: choose '
                          'another Parquet.column.')
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
          for text in batch.column(0).to_pylist():
            if text is None:
              raise UserError(f'Row {row} of {path} has no {column!r}: drop the empty rows.')
            row += 1
            yield text
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
      raise UserError(f'Cannot read {path} as Parquet: {error}.') from error


def _array_record(pattern: str, feature: str) -> Iterator[str]:
  from array_record.python import array_record_module
  for path in _matches(pattern):
    try:
      reader = array_record_module.ArrayRecordReader(str(path))
      count = reader.num_records()
      # The library reads what is no ArrayRecord as an empty one, without a word.
      if not count:
        raise UserError(f'{path} holds no records: it is empty, cut short or no ArrayRecord file.')
      for low in range(0, count, 256):
        for n, record in enumerate(reader.read(low, min(low + 256, count)), low):
          yield _decode_record(path, n, record, feature)
    except (RuntimeError, ValueError, IndexError, OSError) as error:
      raise UserError(f'Cannot read {path} as ArrayRecord: {error}.') from error


def _decode_record(path: Path, n: int, record: bytes, feature: str) -> str:
  try:
    return (tf_example.feature(record, feature) if feature else record).decode('utf-8')
  except UnicodeDecodeError as error:
    raise UserError(f'Record {n} of {path} is not UTF-8 text at its byte {error.start}: if it is '
                    'a tf.train.Example, name its text in ArrayRecord.feature.') from error
  except (KeyError, ValueError) as error:
    raise UserError(f'Record {n} of {path}: {error.args[0]}; check ArrayRecord.feature = '
                    f'{feature!r}.') from error
