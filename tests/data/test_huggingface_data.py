"""Data sets in the layouts of the library `datasets`, read as it reads them."""

import gzip
import json
from pathlib import Path
import sys

import pytest

from jaxrl_pt import config
from jaxrl_pt.data import fingerprint, loader, sources
from jaxrl_pt.errors import MissingFileError, UserError

datasets = pytest.importorskip('datasets', reason='needs the library datasets (its extra)')

ROWS = {'train': [f'train text {i} ü' for i in range(5)], 'test': ['one', 'two']}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


def made(texts: list[str]) -> datasets.Dataset:
  return datasets.Dataset.from_dict({'body': texts, 'number': list(range(len(texts)))})


def write(folder: Path, kind: str) -> None:
  """The rows of both splits in one of the layouts."""
  folder.mkdir()
  match kind:
    case 'parquet':
      (folder / 'data').mkdir()
      for part, low in enumerate((0, 3)):
        made(ROWS['train'][low:low + 3]).to_parquet(
            str(folder / 'data' / f'train-{part:05}-of-00002.parquet'))
      made(ROWS['test']).to_parquet(str(folder / 'data' / 'test-00000-of-00001.parquet'))
    case 'jsonl':
      for split, texts in ROWS.items():
        made(texts).to_json(str(folder / f'{split}.jsonl'))
    case 'gz':
      for split, texts in ROWS.items():
        rows = ''.join(json.dumps({'body': text}) + '\n' for text in texts)
        (folder / f'{split}.json.gz').write_bytes(gzip.compress(rows.encode()))
    case 'csv':
      for split, texts in ROWS.items():
        made(texts).to_csv(str(folder / f'{split}.csv'))
    case 'readme':
      made(ROWS['train']).to_parquet(str(folder / 'a.parquet'))
      made(ROWS['test']).to_parquet(str(folder / 'b.parquet'))
      (folder / 'README.md').write_text(
          '---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n'
          '    path: a.parquet\n  - split: test\n    path: b.*\n---\n# About\n')
    case 'saved':
      datasets.DatasetDict({split: made(texts) for split, texts in ROWS.items()}).save_to_disk(
          folder)


def texts(path: Path, split: str = 'train', column: str = 'body') -> list[str]:
  return list(sources.documents(config.HuggingFaceDataset(str(path), split, column)))


@pytest.mark.parametrize('kind', ['parquet', 'jsonl', 'gz', 'csv', 'readme', 'saved'])
def test_every_layout_yields_the_split_in_order(tmp_path: Path, kind: str):
  write(tmp_path / 'set', kind)
  for split, expected in ROWS.items():
    assert texts(tmp_path / 'set', split) == expected
  if kind != 'saved':
    theirs = datasets.load_dataset(str(tmp_path / 'set'), split='test')
    assert theirs['body'][:] == ROWS['test']
  with pytest.raises(UserError, match=r"no split 'dev', only .*'train'"):
    texts(tmp_path / 'set', 'dev')
  with pytest.raises(UserError, match=r"no column 'words': set .*'body'"):
    texts(tmp_path / 'set', column='words')


def test_one_saved_split_and_one_file(tmp_path: Path):
  made(ROWS['test']).save_to_disk(tmp_path / 'one')
  assert texts(tmp_path / 'one') == ROWS['test']
  made(ROWS['test']).to_json(str(tmp_path / 'rows.jsonl'))
  assert texts(tmp_path / 'rows.jsonl') == ROWS['test']


def test_it_is_prepared_like_any_source_and_named_by_its_content(tmp_path: Path):
  write(tmp_path / 'set', 'jsonl')
  of = lambda split: config.Data(config.HuggingFaceDataset(str(tmp_path / 'set'), split, 'body'),
                                 config.Bytes(), seq_len=16, validation_fraction=0.0)
  prepared = loader.prepare(of('train'), tmp_path / 'data')
  assert prepared.train.num_bytes == sum(len(text.encode()) for text in ROWS['train'])
  key = lambda data: fingerprint.key(data, None, tmp_path / 'data', 0)[0]
  before = key(of('train'))
  assert before != key(of('test'))
  (tmp_path / 'set').rename(tmp_path / 'moved')
  moved = config.HuggingFaceDataset(str(tmp_path / 'moved'), 'train', 'body')
  assert key(config.Data(moved, config.Bytes(), seq_len=16, validation_fraction=0.0)) == before
  with (tmp_path / 'moved' / 'train.jsonl').open('a') as file:
    file.write('{"body": "more"}\n')
  assert key(config.Data(moved, config.Bytes(), seq_len=16, validation_fraction=0.0)) != before


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path):
  with pytest.raises(MissingFileError, match='does not exist'):
    texts(tmp_path / 'nowhere')
  for name, content, message in (
      ('script', {'train.py': 'raise SystemExit'}, 'no files that can be read'),
      ('pickles', {'train.pkl': 'x'}, 'no files that can be read'),
      ('mixed', {'train.jsonl': '{"body": "a"}', 'train.csv': 'body\na'}, 'files of one kind'),
      ('damaged', {'train.parquet': 'PAR1 no more'}, 'cannot be read as parquet'),
      ('cut', {'train.jsonl': '{"body": "a"}\n{"bo'}, 'cannot be read as json'),
      ('numbers', {'train.jsonl': '{"body": 3}'}, 'Row 0 .* holds int, not text'),
      ('empty', {'train.jsonl': '{"body": "a"}\n{"body": null}'}, 'Row 1 .* holds NoneType'),
      ('several', {'README.md': '---\nconfigs:\n- config_name: en\n- config_name: de\n---\n'},
       "several data sets \\('en', 'de'\\)"),
      ('elsewhere', {'README.md': '---\nconfigs:\n- config_name: a\n  data_files: '
                                  'https://example.org/a.parquet\n---\n'}, 'files elsewhere'),
      ('number', {'README.md': '---\nconfigs:\n- config_name: a\n  data_files: 5\n---\n'},
       'data_files what names no files'),
      ('no list', {'README.md': '---\nconfigs: 5\n---\n'}, 'no files that can be read'),
      ('outside', {'README.md': '---\nconfigs:\n- config_name: a\n  data_files: '
                                '../numbers/*.jsonl\n---\n'}, 'which is not in it'),
      ('saved', {'state.json': '{"_data_files": [{"filename": "../rows.arrow"}]}'},
       'which is not in it'),
      ('partial', {'state.json': '{"_data_files": [{"filename": "rows.arrow"}]}'}, 'is missing'),
      ('odd', {'state.json': '{"_data_files": 3}'}, 'no whole data set')):
    (tmp_path / name).mkdir()
    for file, text in content.items():
      (tmp_path / name / file).write_text(text)
    with pytest.raises(UserError, match=message):
      texts(tmp_path / name)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  write(tmp_path / 'set', 'jsonl')
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(UserError, match=r"pip install 'jaxrl_pt\[datasets\]'"):
    texts(tmp_path / 'set')
