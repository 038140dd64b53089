"""Real seqio Tasks and a Mixture, cached and loaded like any other source."""

import dataclasses
import importlib.util
import json
from pathlib import Path
import shutil
import sys

import numpy as np
import pytest

from jaxrl_pt import config
from jaxrl_pt.data import loader, seqio_tasks
from jaxrl_pt.errors import UserError

MODEL = Path('../shared/data/tok-seqio-tiny/sentencepiece.model')
HAS_SEQIO = importlib.util.find_spec('seqio') is not None
needs_seqio = pytest.mark.skipif(not HAS_SEQIO, reason='the extra `seqio` is not installed')
LINES = [f'this is a test of {word} and {other}' for word in
         ('the stream', 'a list', 'that', 'words', 'water', 'those')
         for other in ('this', 'lace', 'salt', 'ice', 'seven', 'hot steam', 'tea')]


@pytest.fixture(scope='module')
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
  if not MODEL.exists():
    pytest.skip(f'{MODEL} is not on this machine')
  directory = tmp_path_factory.mktemp('seqio')
  shutil.copy(MODEL, directory / 'sentencepiece.model')
  (directory / 'train.txt').write_text('\n'.join(LINES) + '\n')
  (directory / 'validation.txt').write_text('a test that is held out\nand one more\n')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAXRL_PT_TEST_SEQIO', str(directory))
    patch.syspath_prepend(str(Path(__file__).parent))
    if HAS_SEQIO:
      import seqio_example  # noqa: F401  registers while the variable is set
  return directory


def _data(directory: Path, name: str) -> config.Data:
  return config.Data(config.Seqio(name, 'seqio_example'),
                     config.SentencePiece(str(directory / 'sentencepiece.model')), 64, 0.2)


def _documents(packed: loader.Packed) -> list[tuple[int, ...]]:
  batch = packed.batch(np.arange(len(packed)))
  return [tuple(tokens[segments == s].tolist())[1:]  # Without what begins a document.
          for tokens, segments in zip(batch.tokens, batch.segments, strict=True)
          for s in range(1, int(segments.max()) + 1)]


@needs_seqio
def test_task_gives_the_tokens_of_its_lines(directory: Path, tmp_path: Path) -> None:
  prepared = loader.prepare(_data(directory, 'lines'), tmp_path)
  found = _documents(prepared.train) + _documents(prepared.validation)
  assert sorted(found) == sorted(tuple(prepared.tokenizer.encode(line)) for line in LINES)
  assert 0 < len(_documents(prepared.validation)) < 20
  manifest = json.loads(next(tmp_path.glob('seqio-*/manifest.json')).read_text())
  assert manifest['splits']['train']['examples'] == len(LINES)


@needs_seqio
def test_own_validation_split_is_used(directory: Path, tmp_path: Path) -> None:
  prepared = loader.prepare(_data(directory, 'lines_split'), tmp_path)
  assert len(_documents(prepared.train)) == len(LINES)
  assert sorted(_documents(prepared.validation)) == sorted(
      tuple(prepared.tokenizer.encode(line)) for line in
      ('a test that is held out', 'and one more'))


@needs_seqio
def test_mixture(directory: Path, tmp_path: Path) -> None:
  prepared = loader.prepare(_data(directory, 'mixed'), tmp_path)
  found = _documents(prepared.train)
  expected = {tuple(prepared.tokenizer.encode(line)) for line in LINES}
  assert set(found) <= expected and len(found) > len(LINES)
  batch = next(loader.train_iterator(prepared.train, seed=0, batch_size=2))
  assert batch.tokens.shape == (2, 64)


@needs_seqio
def test_extra_ids_come_with_the_written_model(directory: Path, tmp_path: Path) -> None:
  data = _data(directory, 'lines_extra')
  with pytest.raises(UserError, match=r'not the vocabulary.*tokenizer\.model'):
    loader.prepare(data, tmp_path)
  model = next(tmp_path.glob('seqio-*/tokenizer.model'))
  data = dataclasses.replace(data, tokenizer=config.SentencePiece(str(model)))
  assert loader.prepare(data, tmp_path).tokenizer.vocab_size == 30


@needs_seqio
@pytest.mark.parametrize(('source', 'message'), [
    (config.Seqio('nothing', 'seqio_example'), 'no seqio Task or Mixture'),
    (config.Seqio('lines', 'no_such_module'), 'cannot be imported'),
    (config.Seqio('lines', 'seqio_example', 'inputs'), "no feature 'inputs'"),
    (config.Seqio('lines_bytes', 'seqio_example'), 'ByteVocabulary'),
    (config.Seqio('lines_untrained', 'seqio_example'), "no split 'train'")])
def test_refusals(directory: Path, tmp_path: Path, source: config.Seqio, message: str) -> None:
  with pytest.raises(UserError, match=message):
    seqio_tasks.cache(source, tmp_path)
  assert list(tmp_path.iterdir()) == []


@needs_seqio
def test_wrong_tokenizer(directory: Path, tmp_path: Path) -> None:
  data = dataclasses.replace(_data(directory, 'lines'), tokenizer=config.Bytes())
  with pytest.raises(UserError, match='not the vocabulary of the seqio task'):
    loader.prepare(data, tmp_path)


@needs_seqio
def test_a_cached_task_loads_without_seqio(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  data = _data(directory, 'lines')
  loader.prepare(data, tmp_path)
  monkeypatch.setitem(sys.modules, 'seqio', None)
  again = loader.prepare(dataclasses.replace(data, seq_len=32), tmp_path)
  assert len(_documents(again.train)) > 20


def test_without_seqio_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, 'seqio', None)
  with pytest.raises(UserError, match=r'jaxrl_pt\[seqio\]'):
    seqio_tasks.cache(config.Seqio('lines', 'seqio_example'), tmp_path)
