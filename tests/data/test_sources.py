"""Sources on real files, and one clear sentence for each unusable one."""

import gzip
import json
from pathlib import Path
import struct

from array_record.python import array_record_module
from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxrl_pt import config
from jaxrl_pt.data import sources, tf_example
from jaxrl_pt.errors import UserError

SHARED = Path('../shared/data')


def _shared(path: str) -> str:
  if not (SHARED / path).exists():
    pytest.skip(f'{SHARED / path} is not on this machine')
  return str(SHARED / path)


def _texts(source: config.Source) -> list[str]:
  return list(sources.documents(source))


# --- The standard library -------------------------------------------------------


def test_stdlib_is_deterministic_bounded_and_mixed() -> None:
  texts = _texts(config.PythonStdlib(max_bytes=500_000))
  assert texts == _texts(config.PythonStdlib(max_bytes=500_000))
  assert 300_000 < sum(len(t.encode()) for t in texts) <= 500_000
  longer = _texts(config.PythonStdlib(max_bytes=600_000))
  assert longer[:len(texts)] == texts
  assert any('def ' in t for t in texts)
  assert any('def ' not in t and 'import ' not in t for t in texts)


def test_stdlib_skips_tests_and_packages() -> None:
  parts = {part for path in sources.files(config.PythonStdlib()) for part in path.parts[-3:]}
  assert 'argparse.py' in parts
  assert not parts & {'site-packages', 'test', 'tests', '__pycache__'}


def test_docstrings_are_taken_out_and_nothing_else() -> None:
  source = ('#!/bin/python  # "not a string"\n'
            'r"""Module text.\n\nMore."""\n'
            'import os\n'
            'x = """kept"""\n'
            'TABLE = [\n  """kept too""",\n]\n'
            'class A:\n'
            "  '''Class text with \"quotes\" and \\''' escapes.'''\n"
            '  def f(self):  # a comment: with a colon\n'
            '    """Method\n    text."""\n'
            '    return "a # b", \'"""\', """also kept"""\n'
            '  def g(self): """one line"""\n')
  code, prose = sources.split_docstrings(source)
  assert prose == ('Module text.\n\nMore.\n\n'
                   'Class text with "quotes" and \\\'\'\' escapes.\n\nMethod\ntext.')
  assert 'kept too' in code and 'also kept' in code and '"""one line"""' in code
  for taken in ('Module text', 'Class text', 'Method\n'):
    assert taken not in code
  kept = code.splitlines()
  assert [line for line in source.splitlines() if line in kept] == kept


def test_docstrings_agree_with_the_parser_on_real_files() -> None:
  """Against `ast`: nearly all docstrings of several lines in real files are found."""
  import ast
  expected, found = 0, 0
  for path in sources.files(config.PythonStdlib())[:60]:
    source = path.read_text(encoding='utf-8', errors='replace')
    _, prose = sources.split_docstrings(source)
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text and '\n' in text and '\\' not in text:
          expected += 1
          found += ' '.join(text.split()) in ' '.join(prose.split())
  assert expected > 100 and found / expected > 0.95


# --- Text, JSONL ----------------------------------------------------------------


def test_wikitext_documents() -> None:
  source = config.TextFiles(_shared('text-wikitext2/valid.txt'), r'^ = [^=].*[^=] = $')
  texts = _texts(source)
  assert 55 <= len(texts) <= 65
  assert all(t.startswith(' = ') for t in texts)
  assert ''.join(texts).strip() == Path(source.glob).read_text().strip()


def test_text_files_plain_gz_and_recursive_glob(tmp_path: Path) -> None:
  (tmp_path / 'a').mkdir()
  (tmp_path / 'b.txt').write_bytes('zwei\r\nZeilen é\n'.encode())
  with gzip.open(tmp_path / 'a' / 'a.txt.gz', 'wb') as handle:
    handle.write('日本'.encode())
  (tmp_path / 'c.txt').write_text('  \n')
  assert _texts(config.TextFiles(str(tmp_path / '**' / '*.txt*'))) == ['日本', 'zwei\r\nZeilen é\n']


def test_document_start_keeps_what_stands_before_the_first_match(tmp_path: Path) -> None:
  (tmp_path / 'x.txt').write_text('intro\n# one\na\n# two\nb\n')
  assert _texts(config.TextFiles(str(tmp_path / 'x.txt'), '^# ')) == [
      'intro\n', '# one\na\n', '# two\nb\n']


def test_jsonl_real_rows() -> None:
  source = config.Jsonl(_shared('math-gsm8k') + '/*train*.jsonl*', 'question')
  try:
    files = sources.files(source)
  except UserError:
    pytest.skip('math-gsm8k has no train JSONL here')
  assert len(_texts(source)) > 1000 and files


def test_jsonl_gz_and_blank_lines(tmp_path: Path) -> None:
  with gzip.open(tmp_path / 'x.jsonl.gz', 'wt', encoding='utf-8') as handle:
    handle.write('{"body": "eins ü"}\n\n{"body": "\\ud83d\\ude42"}\n{"body": " "}\n')
  assert _texts(config.Jsonl(str(tmp_path / '*.gz'), 'body')) == ['eins ü', '🙂']


# --- Parquet, ArrayRecord -------------------------------------------------------


def test_parquet_real_file() -> None:
  pytest.importorskip('pyarrow', reason='the extra `parquet` is not installed')
  texts = _texts(config.Parquet(_shared('text-c4-sample/c4-train.parquet')))
  assert len(texts) == 200 and all(len(t) > 20 for t in texts)


def test_array_record_real_examples() -> None:
  source = config.ArrayRecord(_shared('text-c4-sample/c4-train-00007.array_record'), 'text')
  texts = _texts(source)
  assert len(texts) == 125 and all(len(t) > 20 for t in texts)
  # The same shard as TFRecord: length u64, crc u32, record, crc u32.
  raw, at, expected = Path(_shared('text-c4-sample/c4-train-00007.tfrecord')).read_bytes(), 0, []
  while at < len(raw):
    size = struct.unpack_from('<Q', raw, at)[0]
    expected.append(tf_example.feature(raw[at + 12:at + 12 + size], 'text').decode())
    at += size + 16
  assert sorted(texts) == sorted(expected)


def _array_record(path: Path, records: list[bytes]) -> str:
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()
  return str(path)


def test_array_record_of_plain_text(tmp_path: Path) -> None:
  records = [f'text {n} é'.encode() for n in range(600)]
  path = _array_record(tmp_path / 'x.array_record', records)
  assert _texts(config.ArrayRecord(path)) == [r.decode() for r in records]


@given(record=st.binary(max_size=60))
def test_example_reader_refuses_any_garbage_cleanly(record: bytes) -> None:
  try:
    tf_example.feature(record, 'text')
  except (KeyError, ValueError):
    pass


# --- Refusals -------------------------------------------------------------------


@pytest.mark.parametrize('kind', [config.TextFiles, config.Jsonl, config.Parquet,
                                  config.ArrayRecord])
def test_empty_glob(kind: type, tmp_path: Path) -> None:
  with pytest.raises(UserError, match=r'nothing\*\.x'):
    _texts(kind(str(tmp_path / 'nothing*.x')))


def test_not_utf8_names_file_and_offset(tmp_path: Path) -> None:
  (tmp_path / 'bad.txt').write_bytes(b'fine\nna\xefve')
  with pytest.raises(UserError, match=r'bad\.txt is not UTF-8 at byte offset 7'):
    _texts(config.TextFiles(str(tmp_path / 'bad.txt')))
  (tmp_path / 'bad.jsonl').write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
  with pytest.raises(UserError, match=r'bad\.jsonl is not UTF-8 at byte offset 24'):
    _texts(config.Jsonl(str(tmp_path / 'bad.jsonl')))


def test_bad_regular_expression(tmp_path: Path) -> None:
  (tmp_path / 'x.txt').write_text('x')
  with pytest.raises(UserError, match='document_start'):
    _texts(config.TextFiles(str(tmp_path / 'x.txt'), '('))


@pytest.mark.parametrize(('line', 'message'), [
    ('{"body": 1}', 'no text in the field'), ('{}', 'no text in the field'),
    ('{"text": null}', 'no text in the field'), ('[1]', 'is not a JSON object'),
    ('{"text": "a"', 'is not JSON'), ('{"text": "\\ud800"}', 'surrogate'),
    ('[' * 100_000, 'is not JSON')])
def test_bad_json_row_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
  (tmp_path / 'x.jsonl').write_text(json.dumps({'text': 'good'}) + '\n' + line + '\n')
  with pytest.raises(UserError, match=rf'x\.jsonl:2.*{message}'):
    _texts(config.Jsonl(str(tmp_path / 'x.jsonl')))


def test_cut_gzip(tmp_path: Path) -> None:
  whole = gzip.compress(b'some text\n' * 1000)
  for n, content in enumerate((whole[:-20], b'no gzip at all')):
    (tmp_path / f'{n}.txt.gz').write_bytes(content)
    with pytest.raises(UserError, match=rf'{n}\.txt\.gz'):
      _texts(config.TextFiles(str(tmp_path / f'{n}.txt.gz')))


def test_unreadable_file_is_named(tmp_path: Path) -> None:
  (tmp_path / 'loop.txt').symlink_to(tmp_path / 'loop.txt')
  with pytest.raises(UserError, match=r'loop\.txt'):
    _texts(config.TextFiles(str(tmp_path / 'loop.txt')))


def test_bad_parquet(tmp_path: Path) -> None:
  pa = pytest.importorskip('pyarrow', reason='the extra `parquet` is not installed')
  import pyarrow.parquet as pq
  path = str(tmp_path / 'x.parquet')
  pq.write_table(pa.table({'n': [1, 2], 'text': ['a', None]}), path)
  with pytest.raises(UserError, match="no column 'body'.*'n', 'text'"):
    _texts(config.Parquet(path, 'body'))
  with pytest.raises(UserError, match='int64, not text'):
    _texts(config.Parquet(path, 'n'))
  with pytest.raises(UserError, match='Row 1 of'):
    _texts(config.Parquet(path))
  Path(path).write_bytes(b'PAR1 nonsense')
  with pytest.raises(UserError, match=r'x\.parquet as Parquet'):
    _texts(config.Parquet(path))


def test_bad_array_record(tmp_path: Path) -> None:
  path = tmp_path / 'x.array_record'
  path.write_bytes(b'nonsense' * 10_000)
  with pytest.raises(UserError, match=r'x\.array_record'):
    _texts(config.ArrayRecord(str(path)))
  _array_record(path, [b'\x0a\xff\x00'])
  with pytest.raises(UserError, match='Record 0 of .*not UTF-8'):
    _texts(config.ArrayRecord(str(path)))
  with pytest.raises(UserError, match='Record 0 of .*Example'):
    _texts(config.ArrayRecord(str(path), 'text'))


def test_missing_example_feature() -> None:
  path = _shared('text-c4-sample/c4-train-00007.array_record')
  with pytest.raises(UserError, match=r"Record 0 of .*no feature of that name among \[.*'text'"):
    _texts(config.ArrayRecord(path, 'body'))


# --- Byte order marks -----------------------------------------------------------

BOM = b'\xef\xbb\xbf'


@pytest.mark.parametrize('name', ['a.txt', 'a.txt.gz'])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
  content = BOM + 'Words, ü.\n# second\ufeff'.encode()
  (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith('.gz') else content)
  whole = _texts(config.TextFiles(str(tmp_path / name)))
  assert whole == ['Words, ü.\n# second\ufeff']  # Elsewhere the character is what was written.
  assert _texts(config.TextFiles(str(tmp_path / name), '^# ')) == ['Words, ü.\n', '# second\ufeff']


def test_a_byte_order_mark_before_json_lines(tmp_path: Path) -> None:
  rows = [{'text': 'one'}, {'text': '\ufefftwo'}]
  lines = b''.join(json.dumps(row).encode() + b'\n' for row in rows)
  (tmp_path / 'a.jsonl').write_bytes(BOM + lines)
  (tmp_path / 'b.jsonl').write_bytes(BOM + b'\n' + lines)
  (tmp_path / 'c.jsonl').write_bytes(BOM)
  for name in ('a', 'b'):
    assert _texts(config.Jsonl(str(tmp_path / f'{name}.jsonl'))) == ['one', '\ufefftwo']
  assert list(sources.json_rows(str(tmp_path / 'c.jsonl'))) == []


def test_not_utf8_after_a_byte_order_mark_counts_its_bytes(tmp_path: Path) -> None:
  (tmp_path / 'a.txt').write_bytes(BOM + b'ab\xff')
  with pytest.raises(UserError, match='byte offset 5'):
    _texts(config.TextFiles(str(tmp_path / 'a.txt')))
