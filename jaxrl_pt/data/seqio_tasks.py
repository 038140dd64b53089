"""seqio Tasks and Mixtures, cached once as ArrayRecord files of token ids.

TensorFlow and seqio are imported by `cache` alone, and only where no cache is
there yet: training from a cached task needs neither.
"""

from collections.abc import Iterator
import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

from array_record.python import array_record_module
import numpy as np

from jaxrl_pt import config
from jaxrl_pt.data import pack, publish, splits
from jaxrl_pt.data.tokenizer import SentencePieceTokenizer, Tokenizer
from jaxrl_pt.errors import UserError

_MANIFEST, _MODEL = 'manifest.json', 'tokenizer.model'
_HELD_OUT = 'validation'


def cache(source: config.Seqio, base: Path) -> Path:
  """Writes every split of a registered Task or Mixture under `base`, unless it is there.

  The cache has one epoch in seqio's own unshuffled order, one record of i32 ids an example, beside
  the vocabulary's SentencePiece model (extra ids included) and a manifest. If the definition of a
  task changes under the same name, delete its cache.

  Returns:
    The directory of the cache.

  Raises:
    UserError: seqio or the module is missing, the task, feature or 'train' split does not
      exist, or the vocabulary is not SentencePiece.
  """
  key = hashlib.sha256(repr(source).encode()).hexdigest()[:16]
  final = base / f'seqio-{key}'
  if (final / _MANIFEST).exists():
    return final
  task = _task(source)
  vocabulary = task.output_features[source.feature].vocabulary
  with publish.new_directory(final, _MANIFEST) as directory:
    (directory / _MODEL).write_bytes(vocabulary.sp_model)
    counts = {split: _write_split(task, source, split, directory / f'{split}.array_record')
              for split in ('train', _HELD_OUT) if split in task.splits}
    manifest = {'name': source.name, 'module': source.module, 'feature': source.feature,
                'vocab_size': vocabulary.vocab_size,
                'model_sha256': hashlib.sha256(vocabulary.sp_model).hexdigest(),
                'splits': counts}
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=2) + '\n')
  return final


def _task(source: config.Seqio) -> Any:
  """The registered Task or Mixture, once it is known to have what the cache needs."""
  try:
    import seqio
  except ImportError as error:
    raise UserError(f'The seqio task {source.name} needs the extra `seqio`: pip install '
                    "'jaxrl_pt[seqio]'.") from error
  try:
    importlib.import_module(source.module)
  except ImportError as error:
    raise UserError(f'Seqio.module = {source.module!r} cannot be imported ({error}): give the '
                    'module that registers the task.') from error
  try:
    task = seqio.get_mixture_or_task(source.name)
  except ValueError as error:
    raise UserError(f'{source.module} registers no seqio Task or Mixture {source.name!r}: check '
                    'Seqio.name.') from error
  if source.feature not in task.output_features:
    raise UserError(f'The seqio task {source.name} has no feature {source.feature!r}: set '
                    f'Seqio.feature to one of {sorted(task.output_features)}.')
  if 'train' not in task.splits:
    raise UserError(f"The seqio task {source.name} has no split 'train', only "
                    f'{sorted(task.splits)}.')
  vocabulary = task.output_features[source.feature].vocabulary
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    raise UserError(f'The feature {source.feature!r} of the seqio task {source.name} has a '
                    f'{type(vocabulary).__name__}: only SentencePieceVocabulary is supported.')
  return task


def _write_split(task: Any, source: config.Seqio, split: str, path: Path) -> dict[str, int]:
  examples = task.get_dataset(sequence_length=None, split=split, shuffle=False, seed=0,
                              num_epochs=1)
  writer = publish.RecordWriter(path)
  counts = {'examples': 0, 'tokens': 0}
  for example in examples.as_numpy_iterator():
    ids_n = np.asarray(example[source.feature])
    if ids_n.ndim != 1 or ids_n.dtype.kind not in 'iu':
      raise UserError(f'The feature {source.feature!r} of the seqio task {source.name} holds '
                      f'{ids_n.dtype}{list(ids_n.shape)}, not a sequence of token ids.')
    writer.write(ids_n.astype('<i4').tobytes())
    counts['examples'] += 1
    counts['tokens'] += len(ids_n)
  writer.close()
  return counts


def check_tokenizer(cached: Path, tokenizer: Tokenizer) -> None:
  """Refuses a run whose tokenizer is not the vocabulary that the task's ids come from.

  Raises:
    UserError: the tokenizer is another.
  """
  model = cached / _MODEL
  same = (isinstance(tokenizer, SentencePieceTokenizer)
          and tokenizer.definition == model.read_bytes())
  if not same:
    raise UserError('Data.tokenizer is not the vocabulary of the seqio task: set Data.tokenizer '
                    f"= @cfg.SentencePiece() and SentencePiece.path = '{model}'.")


def documents(cached: Path, validation_fraction: float, tokenizer: Tokenizer
              ) -> Iterator[tuple[float, bool, np.ndarray, int]]:
  """Yields (place in [0, 1), held out?, ids i32[n], bytes of text) of each cached example.

  The task's own validation split is held out if it has one, else a share of 'train'
  by hash. End of text at the end of an example is dropped: the packer adds it.
  """
  own_split = (cached / f'{_HELD_OUT}.array_record').exists()
  for split in ('train', _HELD_OUT) if own_split else ('train',):
    reader = array_record_module.ArrayRecordReader(str(cached / f'{split}.array_record'))
    for i in range(reader.num_records()):
      record = reader.read([i])[0]
      ids_n = np.frombuffer(record, '<i4').astype(np.int32)
      if len(ids_n) and ids_n[-1] == tokenizer.eos_id:
        ids_n = ids_n[:-1]
      place = pack.hold_out(record)
      held_out = split == _HELD_OUT if own_split else place < validation_fraction
      yield place, held_out, ids_n, len(tokenizer.decode_bytes(ids_n.tolist()))


def refuse_shared(cached: Path, validation_fraction: float, tokenizer: Tokenizer) -> None:
  """Refuses a task whose training and validation splits share an example.

  Raises:
    UserError: an example is in both.
  """
  def texts(held_out: bool) -> Iterator[str]:
    for _, is_held_out, ids_n, _ in documents(cached, validation_fraction, tokenizer):
      if is_held_out == held_out and len(ids_n):
        yield tokenizer.decode(ids_n.tolist())

  splits.refuse_overlap(texts(False), texts(True), 'examples',
                        "take them out of the task's 'validation' split, or of 'train'.")
