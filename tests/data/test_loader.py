"""Preparing once, and an order of examples that is f(seed, step)."""

from collections.abc import Sequence
import dataclasses
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

from jaxrl_pt import config
from jaxrl_pt.data import fingerprint, loader, publish
from jaxrl_pt.errors import UserError
from jaxrl_pt.types import Batch

WORDS = 'alpha beta gamma delta ümlaut 日本 one two three four five'.split()


def _corpus(directory: Path, num_documents: int = 120) -> config.TextFiles:
  rng = np.random.default_rng(0)
  texts = [f'# {n}\n' + ' '.join(rng.choice(WORDS, rng.integers(3, 60))) + '\n'
           for n in range(num_documents)]
  path = directory / 'corpus.txt'
  path.write_text(''.join(texts), encoding='utf-8')
  return config.TextFiles(str(path), '^# ')


def _data(directory: Path) -> config.Data:
  return config.Data(_corpus(directory), config.Bytes(), 32, validation_fraction=0.2)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory: pytest.TempPathFactory) -> loader.Prepared:
  directory = tmp_path_factory.mktemp('data')
  return loader.prepare(_data(directory), directory)


def _equal(a: Batch, b: Batch) -> None:
  for field in dataclasses.fields(Batch):
    np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def _all_ids(packed: loader.Packed) -> list[int]:
  return list(range(len(packed)))


# --- Preparing ------------------------------------------------------------------


def _documents(packed: loader.Packed) -> list[bytes]:
  """The texts of a split, put together again from its rows (byte tokenizer, whole pieces)."""
  batch = packed.batch(_all_ids(packed))
  found = []
  for tokens, targets, segments in zip(batch.tokens, batch.targets, batch.segments, strict=True):
    for s in range(1, int(np.max(segments)) + 1):
      found.append((np.asarray(tokens)[segments == s], np.asarray(targets)[segments == s]))
  assert all(tokens[0] == 256 for tokens, _ in found)  # What begins a document.
  return [bytes(tokens[1:].astype(np.uint8)) for tokens, _ in found]


def test_splits_hold_every_text_once_and_apart(tmp_path: Path) -> None:
  data = dataclasses.replace(_data(tmp_path), seq_len=1000)
  prepared = loader.prepare(data, tmp_path)
  train, validation = _documents(prepared.train), _documents(prepared.validation)
  text = Path(data.source.glob).read_text(encoding='utf-8')  # type: ignore[union-attr]
  expected = [('# ' + part).encode() for part in text.split('# ')[1:]]
  assert sorted(train + validation) == sorted(expected)
  assert not set(train) & set(validation)
  assert 10 < len(validation) < 40  # 24 expected of 120 at 0.2


def test_manifest_counts(prepared: loader.Prepared) -> None:
  manifest = json.loads((prepared.directory / 'manifest.json').read_text())
  assert manifest['tokenizer_fingerprint'] == prepared.tokenizer.fingerprint
  for name, packed in (('train', prepared.train), ('validation', prepared.validation)):
    counts = manifest[name]
    weights = packed.batch(_all_ids(packed)).weights
    assert packed.num_targets == counts['targets'] == int(weights.sum())
    assert counts['targets'] == counts['tokens'] + counts['documents']  # Each one's end.
    assert counts['text_bytes'] == counts['tokens']  # a byte is a token
    assert packed.num_bytes == counts['text_bytes']
    assert counts['examples'] == len(packed)


def test_second_time_opens_the_same_directory(tmp_path: Path) -> None:
  data = _data(tmp_path)
  first = loader.prepare(data, tmp_path)
  stamp = (first.directory / 'manifest.json').stat().st_mtime_ns
  second = loader.prepare(dataclasses.replace(data, num_workers=3), tmp_path)
  assert second.directory == first.directory
  assert (second.directory / 'manifest.json').stat().st_mtime_ns == stamp
  assert second.train == first.train
  assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []


def test_other_content_gets_another_directory(tmp_path: Path) -> None:
  data = _data(tmp_path)
  directories = {loader.prepare(data, tmp_path).directory}
  directories.add(loader.prepare(dataclasses.replace(data, seq_len=16), tmp_path).directory)
  other = dataclasses.replace(data, tokenizer=config.TrainedBPE(280))
  directories.add(loader.prepare(other, tmp_path).directory)
  _corpus(tmp_path, 130)
  directories.add(loader.prepare(data, tmp_path).directory)
  assert len(directories) == 4


def test_a_touched_moved_or_copied_corpus_is_the_same_data(tmp_path: Path) -> None:
  """Prepared data are named by content; a change of one byte under another time is another."""
  (tmp_path / 'a').mkdir()
  for name in ('1.txt', '2.txt'):
    (tmp_path / 'a' / name).write_text(''.join(f'{name} says line {i}.\n\n' for i in range(40)))
  data = config.Data(source=config.TextFiles(str(tmp_path / 'a' / '*.txt'), r'(?<=\n\n)'),
                     tokenizer=config.Bytes(), seq_len=16, validation_fraction=0.2)
  first = loader.prepare(data, tmp_path / 'data').directory
  os.utime(tmp_path / 'a' / '1.txt', (1, 1))
  assert loader.prepare(data, tmp_path / 'data').directory == first
  shutil.move(tmp_path / 'a', tmp_path / 'b')
  moved = dataclasses.replace(data, source=dataclasses.replace(
      data.source, glob=str(tmp_path / 'b' / '*.txt')))  # type: ignore[arg-type]
  assert loader.prepare(moved, tmp_path / 'data').directory == first
  (tmp_path / 'data' / 'fingerprints.json').write_text('[')  # only a cache
  assert loader.prepare(moved, tmp_path / 'data').directory == first
  assert len(list((tmp_path / 'data').glob('data-*'))) == 1
  text = (tmp_path / 'b' / '1.txt').read_text()
  (tmp_path / 'b' / '1.txt').write_text('X' + text[1:])
  assert loader.prepare(moved, tmp_path / 'data').directory != first
  longer = dataclasses.replace(moved, seq_len=32)
  assert len({loader.prepare(d, tmp_path / 'data').directory for d in (moved, longer)}) == 2


def test_digests_are_read_from_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  data = _data(tmp_path)
  loader.prepare(data, tmp_path / 'data')
  monkeypatch.setattr(fingerprint.hashlib, 'file_digest', lambda *_: pytest.fail('read again'))
  loader.prepare(data, tmp_path / 'data')


UNFINISHED = """
  import pathlib, sys
  from jaxrl_pt.data import publish
  final = pathlib.Path(sys.argv[1]) / 'data-0123456789abcdef'
  with publish.new_directory(final, 'manifest.json') as directory:
    (directory / 'half').write_text('')
    print(directory.name, flush=True)
    sys.stdin.read()
    (directory / 'manifest.json').write_text('')
"""


def test_killed_preparations_are_cleaned_up_and_living_ones_are_not(tmp_path: Path) -> None:
  children = [subprocess.Popen([sys.executable, '-c', textwrap.dedent(UNFINISHED), str(tmp_path)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
              for _ in range(2)]
  names = [child.stdout.readline().strip() for child in children]  # type: ignore[union-attr]
  (tmp_path / '.data-0123456789abcdef-00000000.lock').write_text('')  # killed before its directory
  (tmp_path / '.other').mkdir()
  children[0].kill()
  children[0].wait()
  publish.remove_abandoned(tmp_path)
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
      (names[1], f'{names[1]}.lock', '.other'))
  children[1].communicate('')
  assert children[1].returncode == 0
  assert sorted(p.name for p in tmp_path.iterdir()) == ['.other', 'data-0123456789abcdef']
  old = tmp_path / '.data-0123456789abcdef-abc_d123'  # without a lock, as earlier versions left it
  old.mkdir()
  publish.remove_abandoned(tmp_path)
  assert old.is_dir()
  os.utime(old, (1, 1))
  publish.remove_abandoned(tmp_path)
  assert not old.exists()


def test_cache_dir_is_shared_between_runs(tmp_path: Path) -> None:
  data = dataclasses.replace(_data(tmp_path), cache_dir=str(tmp_path / 'cache'))
  one = loader.prepare(data, tmp_path / 'run1')
  two = loader.prepare(data, tmp_path / 'run2')
  assert one.directory == two.directory and one.directory.parent == tmp_path / 'cache'
  assert not (tmp_path / 'run1').exists()


def test_tokenizer_is_trained_on_training_documents_only(tmp_path: Path) -> None:
  data = dataclasses.replace(_data(tmp_path), tokenizer=config.TrainedBPE(300))
  prepared = loader.prepare(data, tmp_path)
  training = dataclasses.replace(data, tokenizer=config.Bytes(), seq_len=1000)
  texts = _documents(loader.prepare(training, tmp_path / 'other').train)
  from jaxrl_pt.data import tokenizer
  alone = tokenizer.train_or_load(config.TrainedBPE(300), sorted(t.decode() for t in texts))
  assert alone.token_bytes() == prepared.tokenizer.token_bytes()


def test_stdlib_with_bpe(tmp_path: Path) -> None:
  data = config.Data(config.PythonStdlib(max_bytes=300_000), config.TrainedBPE(512), 64,
                     validation_fraction=0.1)
  prepared = loader.prepare(data, tmp_path)
  assert prepared.tokenizer.vocab_size == 512
  batch = prepared.train.batch(np.arange(len(prepared.train)))
  assert batch.weights.mean() > 0.97
  assert batch.tokens.max() < 512
  # The slow definition of num_bytes: what the targets spell, byte for byte.
  spelled = [len(piece) for piece in prepared.tokenizer.token_bytes()]
  targets = batch.targets[batch.weights > 0]
  assert prepared.train.num_bytes == sum(spelled[t] for t in targets.tolist())


def test_preparing_twice_gives_the_same_rows(tmp_path: Path) -> None:
  data = config.Data(config.PythonStdlib(max_bytes=300_000), config.TrainedBPE(400), 64, 0.1)
  assert (loader.prepare(data, tmp_path / 'a').train.digest
          == loader.prepare(data, tmp_path / 'b').train.digest)


def test_training_needs_neither_tensorflow_nor_the_extras() -> None:
  code = ('import sys, jaxrl_pt.data.loader\n'
          'heavy = {"tensorflow", "seqio", "pyarrow", "sentencepiece"} & set(sys.modules)\n'
          'sys.exit(f"imported {heavy}" if heavy else 0)')
  subprocess.run([sys.executable, '-c', code], check=True, timeout=60)


# --- The order of training ------------------------------------------------------


def _take(packed: loader.Packed, steps: int, **options: Any) -> list[Batch]:
  iterator = loader.train_iterator(packed, **{'seed': 7, 'batch_size': 8} | options)
  batches = [next(iterator) for _ in range(steps)]
  iterator.close()
  return batches


def test_each_epoch_is_a_new_permutation(prepared: loader.Prepared) -> None:
  count = len(prepared.train)
  ids = np.concatenate([b.ids for b in _take(prepared.train, 3 * count // 8 + 1)])
  epochs = [ids[n * count:(n + 1) * count].tolist() for n in range(3)]
  assert all(sorted(epoch) == _all_ids(prepared.train) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2]
  assert epochs[0] != sorted(epochs[0])


def test_rows_are_the_examples_their_ids_name(prepared: loader.Prepared) -> None:
  for batch in _take(prepared.train, 3):
    _equal(batch, prepared.train.batch(batch.ids))
  _equal(prepared.train.example(5), prepared.train.batch([5]))


def test_order_follows_from_the_seed(prepared: loader.Prepared) -> None:
  a, b, c = (_take(prepared.train, 2, seed=seed) for seed in (1, 1, 2))
  _equal(a[1], b[1])
  assert a[0].ids.tolist() != c[0].ids.tolist()


def test_restart_at_any_step(prepared: loader.Prepared) -> None:
  steps = 2 * len(prepared.train) // 8  # beyond the first epoch
  whole = _take(prepared.train, steps)
  for stop in (0, 1, steps // 2, steps - 1):
    first = loader.train_iterator(prepared.train, seed=7, batch_size=8)
    for _ in range(stop):
      next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = loader.train_iterator(prepared.train, seed=7, batch_size=8)
    next(second)
    second.set_state(state)
    _equal(next(second), whole[stop])
    assert second.get_state()['step'] == stop + 1


@pytest.mark.parametrize('rows, tokens', [
    (range(2, 4), range(32)), (range(8), range(16, 32)), ((0, 3, 6), (*range(8), *range(24, 32)))])
def test_a_part_is_cut_out_of_the_global_batch(
    prepared: loader.Prepared, rows: Sequence[int], tokens: Sequence[int]) -> None:
  part = _take(prepared.train, 12, rows=np.array(rows), tokens=np.array(tokens))
  for step, whole in enumerate(_take(prepared.train, 12)):
    for field in dataclasses.fields(Batch):
      expected = np.asarray(getattr(whole, field.name))[np.array(rows)]
      expected = expected if expected.ndim == 1 else expected[:, np.array(tokens)]
      np.testing.assert_array_equal(getattr(part[step], field.name), expected)


def test_a_state_moves_between_host_counts(prepared: loader.Prepared) -> None:
  one = loader.train_iterator(prepared.train, seed=7, batch_size=8)
  for _ in range(5):
    next(one)
  half = loader.train_iterator(prepared.train, seed=7, batch_size=8, rows=np.arange(4, 8))
  half.set_state(one.get_state())
  np.testing.assert_array_equal(next(half).ids, next(one).ids[4:])


def test_worker_processes_change_nothing(prepared: loader.Prepared) -> None:
  expected = _take(prepared.train, 6)
  iterator = loader.train_iterator(prepared.train, seed=7, batch_size=8, num_workers=2)
  iterator.set_state({**iterator.get_state(), 'step': 2})
  for step in range(2, 6):
    _equal(next(iterator), expected[step])
  iterator.close()


def test_state_of_another_run_is_refused(prepared: loader.Prepared) -> None:
  state = loader.train_iterator(prepared.train, seed=7, batch_size=8).get_state()
  for options in ({'seed': 8, 'batch_size': 8}, {'seed': 7, 'batch_size': 4}):
    with pytest.raises(UserError, match='same data, seed and batch size'):
      loader.train_iterator(prepared.train, **options).set_state(state)
  with pytest.raises(UserError, match='digest'):
    loader.train_iterator(prepared.train, seed=7, batch_size=8).set_state(
        {**state, 'digest': 'other'})


# --- Evaluation -----------------------------------------------------------------


def test_eval_batches_see_every_example_once_in_order(prepared: loader.Prepared) -> None:
  packed = prepared.validation
  size = next(n for n in (7, 5, 3) if len(packed) % n)
  batches = list(loader.eval_batches(packed, size))
  assert all(b.tokens.shape == (size, packed.seq_len) for b in batches)
  ids = np.concatenate([b.ids for b in batches])
  assert ids[:len(packed)].tolist() == _all_ids(packed)
  assert sum(b.weights.sum() for b in batches) == packed.num_targets
  last = batches[-1]
  filler = last.ids < 0
  assert filler.any() and not last.weights[filler].any() and not last.segments[filler].any()
  limited = list(loader.eval_batches(packed, size, limit=1))
  assert len(limited) == 1
  _equal(limited[0], batches[0])


# --- Refusals -------------------------------------------------------------------


def test_too_few_examples(prepared: loader.Prepared) -> None:
  with pytest.raises(UserError, match='fewer than one batch of 100000'):
    loader.train_iterator(prepared.train, seed=0, batch_size=100_000)


def test_empty_splits(tmp_path: Path) -> None:
  (tmp_path / 'one.txt').write_text('a single document')
  data = config.Data(config.TextFiles(str(tmp_path / 'one.txt')), config.Bytes(), 8, 0.02)
  with pytest.raises(UserError, match=r'None of the 1 documents.*validation_fraction above 0\.'):
    loader.prepare(data, tmp_path)
  (tmp_path / 'one.txt').write_text('  \n')
  with pytest.raises(UserError, match='holds no text'):
    loader.prepare(data, tmp_path)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['one.txt']


def test_no_validation_split_when_none_is_asked_for(tmp_path: Path) -> None:
  data = dataclasses.replace(_data(tmp_path), validation_fraction=0.0)
  prepared = loader.prepare(data, tmp_path)
  assert len(prepared.validation) == 0 and prepared.validation.num_targets == 0
  with pytest.raises(UserError, match='validation split has 0 examples'):
    loader.eval_batches(prepared.validation, 4)


def test_cut_documents_keep_their_first_tokens_and_count_their_bytes(tmp_path: Path) -> None:
  (tmp_path / 'a.txt').write_text('é' * 9 + 'x' * 50)
  (tmp_path / 'b.txt').write_text('short')
  data = config.Data(config.TextFiles(str(tmp_path / '*.txt')), config.Bytes(), 24, 0.0,
                     long_documents='cut')
  packed = loader.prepare(data, tmp_path / 'data').train
  # The last target is no input.
  assert sorted(_documents(packed)) == [b'short', 'é'.encode() * 9 + b'x' * 5]
  # 24 targets, none of them an end, and five with one.
  assert (packed.num_targets, packed.num_bytes) == (24 + 6, 24 + 5)


def test_long_document_error_leaves_nothing_behind(tmp_path: Path) -> None:
  data = dataclasses.replace(_data(tmp_path), long_documents='error')
  with pytest.raises(UserError, match='long_documents'):
    loader.prepare(data, tmp_path / 'run')
  assert list((tmp_path / 'run').iterdir()) == []


def test_damaged_data_are_named(tmp_path: Path) -> None:
  data = _data(tmp_path)
  prepared = loader.prepare(data, tmp_path)
  loader._reader.cache_clear()
  raw = prepared.train.path.read_bytes()
  prepared.train.path.write_bytes(raw[:len(raw) // 2])
  with pytest.raises(UserError, match='delete that directory'):
    loader.prepare(data, tmp_path)
  (prepared.directory / 'manifest.json').write_text('{')
  with pytest.raises(UserError, match='damaged'):
    loader.prepare(data, tmp_path)


def test_unwritable_directory(tmp_path: Path) -> None:
  (tmp_path / 'file').write_text('in the way')
  with pytest.raises(UserError, match='Cannot write prepared data'):
    loader.prepare(_data(tmp_path), tmp_path / 'file')
  if os.geteuid():  # root may write anywhere
    (tmp_path / 'locked').mkdir(mode=0o500)
    with pytest.raises(UserError, match='Permission denied'):
      loader.prepare(_data(tmp_path), tmp_path / 'locked')


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
  """A limit on file sizes fails writes as a full disk does; in a process of its own."""
  code = ('import pathlib, resource, sys\n'
          'from jaxrl_pt import config\n'
          'from jaxrl_pt.data import loader\n'
          'from jaxrl_pt.errors import UserError\n'
          'resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n'
          'data = config.Data(config.PythonStdlib(2_000_000), config.Bytes(), 128)\n'
          'try:\n'
          '  loader.prepare(data, pathlib.Path(sys.argv[1]))\n'
          'except UserError as error:\n'
          '  print("refused:", error)\n')
  result = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True,
                          text=True, timeout=90)
  assert 'refused: Cannot write prepared data' in result.stdout, result.stderr
  assert list(tmp_path.iterdir()) == []


def test_missing_tokenizer_file(tmp_path: Path) -> None:
  data = dataclasses.replace(_data(tmp_path), tokenizer=config.SentencePiece('nowhere.model'))
  with pytest.raises(UserError, match=r'nowhere\.model'):
    loader.prepare(data, tmp_path)


def test_validation_files_are_the_whole_validation_split(tmp_path: Path):
  """With validation_glob every document of the source trains, whatever its hash."""
  (tmp_path / 'train').mkdir()
  (tmp_path / 'valid').mkdir()
  for i in range(40):
    (tmp_path / 'train' / f'{i}.txt').write_text(f'training document number {i} ' * 3)
  for i in range(7):
    (tmp_path / 'valid' / f'{i}.txt').write_text(f'held-out document number {i} ' * 3)
  data = config.Data(config.TextFiles(str(tmp_path / 'train' / '*.txt')), config.Bytes(), 32,
                     validation_fraction=0.5, validation_glob=str(tmp_path / 'valid' / '*.txt'))
  prepared = loader.prepare(data, tmp_path / 'cache')
  manifest = json.loads((prepared.directory / 'manifest.json').read_text())
  assert manifest['train']['documents'] == 40
  assert manifest['validation']['documents'] == 7
  held_out = np.concatenate([b.tokens.ravel() for b in loader.eval_batches(prepared.validation, 4)])
  assert b'training' not in bytes(int(t) for t in held_out if t < 256)
