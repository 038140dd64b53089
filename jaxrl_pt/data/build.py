"""Makes the packed examples of documents, conversations or preferences, on disk, split in two."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrl_pt import config
from jaxrl_pt.data import (
  chat,
  chat_files,
  conversations,
  fingerprint,
  hybrid_examples,
  pack,
  preferences,
  publish,
  seqio_tasks,
  sources,
  splits,
)
from jaxrl_pt.data import tokenizer as tokenizers
from jaxrl_pt.errors import MissingFileError, UserError

FORMAT = 3  # raise when prepared files of the same config would come out differently
MANIFEST = 'manifest.json'
SPLITS = ('train', 'validation')
_TEXTS_PER_CALL = 512


class Making(NamedTuple):
  """What examples are made of besides the run's settings of data.

  examples: what an example is made of.
  tokenizer: that of the policy that the run starts from; None where `Data.tokenizer` names one.
  template: writes messages; None takes the plain one.
  """

  examples: config.Examples = 'documents'
  tokenizer: tokenizers.Tokenizer | None = None
  template: chat.ChatTemplate | None = None

  @property
  def form(self) -> Any:
    """The part of the name of prepared data that does not follow from the settings of data."""
    if self.examples == 'documents' and self.tokenizer is None:
      return FORMAT
    # The template's name says where it lies.
    template = self.template and dataclasses.replace(self.template, name='')
    return FORMAT, self.examples, self.tokenizer and self.tokenizer.fingerprint, template


DOCUMENTS = Making()


class _Item(NamedTuple):
  """A document, or whatever else goes into a row as a whole.

  place: its place in [0, 1), which decides the split.
  pieces: each goes into one row; its parts i32[C, m] become a segment each.
  """

  place: float
  held_out: bool
  pieces: list[tuple[np.ndarray, ...]]
  num_tokens: int
  text_bytes: int
  target_bytes: int


class _SplitWriter:
  """Packs one split into its file and counts what the manifest says."""

  def __init__(self, path: Path, seq_len: int) -> None:
    self._writer = publish.RecordWriter(path)
    self._packer = pack.Packer(seq_len)
    self._digest = hashlib.sha256()
    self.counts = {'documents': 0, 'text_bytes': 0, 'target_bytes': 0, 'tokens': 0,
                   'targets': 0, 'examples': 0, 'segments': 0}
    self.parts: list[int] = []  # the examples of each source so far

  def add(self, item: _Item) -> None:
    counts = self.counts
    for parts in item.pieces:
      self._write(self._packer.add(*parts))
      counts['targets'] += sum(pack.num_targets(part) for part in parts)
    counts['documents'] += 1
    counts['text_bytes'] += item.text_bytes
    counts['target_bytes'] += item.target_bytes
    counts['tokens'] += item.num_tokens

  def _write(self, rows: Iterable[np.ndarray]) -> None:
    for row_CT in rows:
      record = row_CT.astype('<i4').tobytes()
      self._writer.write(record)
      self._digest.update(record)
      self.counts['examples'] += 1
      self.counts['segments'] = max(self.counts['segments'], int(row_CT[2].max()))

  def end_source(self) -> None:
    """Closes the rows that are open, so that no row has documents of two sources."""
    self._write(self._packer.flush())
    self.parts.append(self.counts['examples'] - sum(self.parts))

  def close(self) -> dict[str, Any]:
    self._writer.close()
    return {**self.counts, 'parts': self.parts, 'digest': self._digest.hexdigest()}


def build(data: config.Data, making: Making, cached: Path | None, directory: Path) -> None:
  """Writes tokenizer, both splits and, last, the manifest into `directory`.

  Args:
    data, making: what the examples are made of.
    cached: the directory of a cached seqio task, or None.
    directory: the directory that is filled.

  Raises:
    UserError: the source or the tokenizer is unusable, or a split is empty.
  """
  left_out: dict[str, int] = {}
  if making.examples == 'documents':
    tokenizer, items_of_sources = _documents(data, cached)
  else:
    tokenizer, items_of_sources = _supervised(data, making, left_out)
  tokenizer.save(directory / 'tokenizer')
  writers = {name: _SplitWriter(directory / f'{name}.array_record', data.seq_len)
             for name in SPLITS}
  nearest = 1.0
  for items in items_of_sources:
    for item in items:
      if item.pieces:
        nearest = min(nearest, item.place)
        writers['validation' if item.held_out else 'train'].add(item)
    for writer in writers.values():
      writer.end_source()
  written = {name: writer.close() for name, writer in writers.items()}
  _check_splits(data, making, written, nearest, left_out)
  _check_sources(data, written)
  manifest = {'format': FORMAT, 'kind': making.examples, 'data': repr(data),
              'settings': repr(fingerprint.without_places(data)), 'seq_len': data.seq_len,
              'tokenizer_fingerprint': tokenizer.fingerprint,
              'vocab_size': tokenizer.vocab_size, **left_out, **written}
  (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + '\n')


def is_prepared(directory: Path, data: config.Data, examples: config.Examples | None) -> bool:
  """Says whether `directory` holds what was made from the same settings.

  Args:
    directory: a directory of prepared data.
    data: the settings of data.
    examples: what an example is made of; None allows all.
  """
  try:
    manifest = dict(json.loads((directory / MANIFEST).read_text()))
  except (OSError, ValueError, TypeError):
    return False
  settings = repr(fingerprint.without_places(data))
  return (manifest.get('format') == FORMAT and manifest.get('settings') == settings
          and examples in (None, manifest.get('kind', 'documents')))


# --- Documents ------------------------------------------------------------------


def _documents(data: config.Data, cached: Path | None
               ) -> tuple[tokenizers.Tokenizer, list[Iterator[_Item]]]:
  """The tokenizer, and the items of each source that is packed for itself."""
  if cached:
    tokenizer = tokenizers.train_or_load(data.tokenizer, ())
    seqio_tasks.check_tokenizer(cached, tokenizer)
    documents = [seqio_tasks.documents(cached, data.validation_fraction, tokenizer)]
    seqio_tasks.refuse_shared(cached, data.validation_fraction, tokenizer)
  else:
    _refuse_overlap(data, 'documents')
    training = (text for text, _, held_out in _texts(data) if not held_out)
    tokenizer = tokenizers.train_or_load(data.tokenizer, training)
    documents = [_tokenised(part, tokenizer) for part in _packed_apart(data)]
  return tokenizer, [_packable(data, tokenizer, one) for one in documents]


def _packed_apart(data: config.Data) -> list[config.Data]:
  """The settings with each source of a mixture in its place; as they are where there is none."""
  if not isinstance(data.source, config.Mixture):
    return [data]
  return [dataclasses.replace(data, source=part) for part in data.source.sources]


def _packable(data: config.Data, tokenizer: tokenizers.Tokenizer,
              documents: Iterator[tuple[float, bool, np.ndarray, int]]) -> Iterator[_Item]:
  ends = pack.Ends(tokenizer.bos_id, tokenizer.eos_id)
  for place, held_out, tokens_n, text_bytes in documents:
    pieces = pack.pieces(tokens_n, ends, data.seq_len, data.long_documents)
    unpredicted = tokens_n[:1].tolist() if ends.bos is None else []
    target_bytes = text_bytes - len(tokenizer.decode_bytes(unpredicted))
    if data.long_documents == 'cut' and pieces and pieces[0][1, -1] != ends.eos:
      target_bytes = len(tokenizer.decode_bytes(pieces[0][1].tolist()))
    yield _Item(place, held_out, [(piece,) for piece in pieces], len(tokens_n), text_bytes,
                target_bytes)


def split_keys(data: config.Data, *, held_out: bool) -> Iterator[str]:
  """Yields the keys of the documents or conversations of one split, stripped."""
  return (key.strip() for _, key, is_held_out in _texts(data) if is_held_out == held_out)


def _texts(data: config.Data) -> Iterator[tuple[str, str, bool]]:
  """Yields (text, key, held out?) of each document of both splits."""
  for text, key in _keyed(data.source):
    yield text, key, (not data.validation_glob
                      and pack.hold_out(key) < data.validation_fraction)
  if data.validation_glob:
    for text, key in _keyed(data.validation_source):
      yield text, key, True


def _keyed(source: config.Source) -> Iterator[tuple[str, str]]:
  """Yields (text, key) of each document or conversation of a source."""
  match source:
    case config.Mixture(sources=mixed):
      return (pair for part in mixed for pair in _keyed(part))
    case (config.Conversations() | config.HybridConversations()
          | config.WeightedConversations()):
      return ((row.text, row.key) for row, _ in conversations.rows(source))
    case config.Preferences() | config.SlipPreferences() | config.ResultPreferences():
      return ((row.chosen.text, row.key) for row in preferences.rows(source))
    case _:
      return sources.keyed_documents(source)


def refuse_trained_on(trained: config.Data, share: float,
                      held_out: Callable[[], Iterable[str]], advice: str) -> None:
  """Refuses held-out prompts that another run was trained on.

  Args:
    trained: the other run's data; those without prompts are not compared.
    share: the share that is held out by the hash of the prompt; 1 where it is chosen otherwise. The
      other run has read none of it if it held out as much.
    held_out: yields the prompts.
    advice: what to do about an overlap; it ends the message.

  Raises:
    UserError: some prompts were trained on; it says how many of how many.
  """
  with_prompts = config.SOURCES_OF['conversations'] + config.SOURCES_OF['preferences']
  if not isinstance(trained.source, with_prompts) or (
      not trained.validation_glob and trained.validation_fraction >= share):
    return
  try:
    splits.refuse_overlap(split_keys(trained, held_out=False), held_out(), 'prompts', advice)
  except MissingFileError as error:
    print('Not checked: whether held-out prompts are among those that the start policy was trained '
          f'on. {error}', flush=True)


def _refuse_overlap(data: config.Data, what: str) -> None:
  if data.validation_glob:  # The other splits are by content.
    splits.refuse_overlap(
        split_keys(data, held_out=False), split_keys(data, held_out=True), what,
        'take them out of the files of Data.validation_glob, or of those of Data.source.')
  if isinstance(data.source, config.Mixture):
    # Equal keys are on one side, but one source may have a text that is a key of another.
    splits.refuse_overlap(
        _texts_and_keys(data, held_out=False), _texts_and_keys(data, held_out=True), what,
        'take them out of one of the sources of the mixture.')


def _texts_and_keys(data: config.Data, *, held_out: bool) -> Iterator[str]:
  for text, key, is_held_out in _texts(data):
    if is_held_out == held_out:
      yield from {text.strip(), key.strip()}


def _tokenised(data: config.Data, tokenizer: tokenizers.Tokenizer
               ) -> Iterator[tuple[float, bool, np.ndarray, int]]:
  """Yields (place in [0, 1), held out?, ids i32[n], bytes of text) of each document."""
  documents = _texts(data)
  while chunk := list(itertools.islice(documents, _TEXTS_PER_CALL)):
    ids = tokenizer.encode_batch([text for text, _, _ in chunk])
    for (text, key, held_out), ids_n in zip(chunk, ids, strict=True):
      yield pack.hold_out(key), held_out, np.asarray(ids_n, np.int32), len(text.encode())


# --- Conversations and preferences ------------------------------------------------


def _supervised(data: config.Data, making: Making, left_out: dict[str, int]
                ) -> tuple[tokenizers.Tokenizer, list[Iterator[_Item]]]:
  """Items of an answer each; while they are drawn, `left_out` counts those that were too long."""
  _refuse_overlap(data, 'prompts')
  for part in _parts(data.source):
    if isinstance(part, config.HybridConversations):
      print(hybrid_examples.counts(part), flush=True)
  tokenizer = making.tokenizer
  if tokenizer is None:
    training = (text for text, _, held_out in _texts(data) if not held_out)
    tokenizer = tokenizers.train_or_load(data.tokenizer, training)
  left_out.update(cut=0, left_out=0)
  writing = _Writing(data, tokenizer, making.template or chat_files.plain(tokenizer), left_out)
  make = _answered if making.examples == 'conversations' else _preferred
  return tokenizer, [_on_sides(part, lambda source: make(source, writing))
                     for part in _packed_apart(data)]


def _parts(source: config.Source) -> Iterator[config.Source]:
  """All sources that a source is put together of."""
  inner = sources.parts(source)
  return iter(inner) if inner == (source,) else (p for part in inner for p in _parts(part))


class _Writing(NamedTuple):
  """How answers become tokens, and the counts of those that were too long."""

  data: config.Data
  tokenizer: tokenizers.Tokenizer
  template: chat.ChatTemplate
  left_out: dict[str, int]


def _on_sides(data: config.Data, make: Callable[[config.Source], Iterator[tuple[str, _Item]]]
              ) -> Iterator[_Item]:
  """The items that `make` yields with their keys, each with its place and its side."""
  for key, item in make(data.source):
    place = pack.hold_out(key)
    held_out = not data.validation_glob and place < data.validation_fraction
    yield item._replace(place=place, held_out=held_out)
  if data.validation_glob:
    for key, item in make(data.validation_source):
      yield item._replace(place=pack.hold_out(key), held_out=True)


def _answered(source: config.Source, writing: _Writing) -> Iterator[tuple[str, _Item]]:
  """(key, item) of each conversation, which is one segment."""
  for row, weight in conversations.rows(source):
    encoded = conversations.encode(row, writing.tokenizer, writing.template)
    pairs_3m = conversations.pairs(*encoded, weight)
    kept_3m = conversations.within(pairs_3m, row.place, writing.data)
    yield row.key, _item(writing, (pairs_3m,), (kept_3m,), row.num_bytes)


def _preferred(source: config.Source, writing: _Writing) -> Iterator[tuple[str, _Item]]:
  """(key, item) of each pair, which is two segments."""
  for row in preferences.rows(source):
    whole = preferences.parts(row, writing.tokenizer, writing.template)
    kept = preferences.within(whole, row, writing.data)
    yield row.key, _item(writing, whole, kept, row.num_bytes)


def _item(writing: _Writing, whole: tuple[np.ndarray, ...], kept: tuple[np.ndarray, ...],
          num_bytes: int) -> _Item:
  """What goes into one row, or nothing if a part of it has no learned token left."""
  learned = [part[1, part[2] != 0].tolist() for part in kept]
  is_kept = all(learned)
  writing.left_out['cut'] += any(a.shape != b.shape for a, b in zip(whole, kept, strict=True))
  writing.left_out['left_out'] += not is_kept
  return _Item(0.0, False, [kept] if is_kept else [], sum(part.shape[1] for part in whole),
               num_bytes, sum(len(writing.tokenizer.decode_bytes(ids)) for ids in learned))


def _check_splits(data: config.Data, making: Making, splits: dict[str, dict[str, Any]],
                  nearest: float, left_out: dict[str, int]) -> None:
  documents = {name: splits[name]['documents'] for name in SPLITS}
  total = sum(documents.values())
  what = making.examples
  if sum(left_out.values()):
    print(f'note: of {total + left_out["left_out"]} {what}, {left_out["cut"]} were longer than '
          f'Data.seq_len = {data.seq_len} and cut; {left_out["left_out"]} have been left out, '
          'because nothing to learn was within it.', flush=True)
  if not total and left_out.get('left_out'):
    raise UserError(f'The prompts of all {left_out["left_out"]} {what} of {data.source} are as '
                    f'long as Data.seq_len = {data.seq_len}: raise it.')
  if not total:
    raise UserError(f'{data.source} holds no text: give files with text in them.')
  if not documents['train']:
    raise UserError(f'All {total} {what} of {data.source} fall into the validation split: '
                    f'give more {what}, or lower Data.validation_fraction.')
  if data.validation_fraction and not documents['validation']:
    raise UserError(
        f'None of the {total} {what} of {data.source} falls into a validation split of '
        f'{data.validation_fraction:g}: give more {what} (TextFiles.document_start cuts files), '
        f'or set Data.validation_fraction above {nearest:.4f} for one, or to 0 for none.')


def _check_sources(data: config.Data, splits: dict[str, dict[str, Any]]) -> None:
  """Refuses a mixture of which a source has nothing on one side."""
  if not isinstance(data.source, config.Mixture):
    return
  for name, *numbers in zip(data.source.names, *(splits[split]['parts'] for split in SPLITS),
                            strict=True):
    for split, number in zip(SPLITS, numbers, strict=True):
      if not number and (split == 'train' or data.validation_fraction):
        raise UserError(f'The source {name!r} of the mixture has nothing in its {split} split: '
                        'give it more documents, or change Data.validation_fraction.')
