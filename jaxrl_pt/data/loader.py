"""Prepares a corpus on disk once and reads batches whose order is a function of (seed, step).

`prepare` works once per content: it tokenises and packs a source into ArrayRecord
files, in a directory named by a hash of everything that decides them, which the next
run opens. Reading is index-based (Grain): the example in row b of step s follows
from the seed alone, whatever the number of hosts, workers and restarts.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Generic, TypeVar

from absl import flags
from array_record.python import array_record_module
import grain
import jax
import numpy as np

from jaxrl_pt import config
from jaxrl_pt.data import build, fingerprint, mixture, pack, publish, seqio_tasks, workers
from jaxrl_pt.data import tokenizer as tokenizers
from jaxrl_pt.errors import UserError
from jaxrl_pt.types import Batch

# --- Prepared data --------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _reader(path: str) -> Any:
  return array_record_module.ArrayRecordReader(path)


@dataclasses.dataclass(frozen=True)
class Packed:
  """One split on disk: `num_examples` rows of `seq_len` predicted tokens.

  num_targets: predicted tokens of the whole split, the ends of documents included.
  num_bytes: UTF-8 bytes that those targets spell. These are the bytes of the split's text, less
    each document's first token where no token begins a document, because nothing predicts it then.
    A mean loss in nats per token is loss / ln 2 · num_targets / num_bytes bits per byte.
  digest: sha256 of the rows.
  channels: C, the arrays of a row (`pack.to_batch`).
  num_segments: the most segments of a row.
  parts: the examples of each source of a mixture, which are numbered through; otherwise all.
  """

  path: Path
  seq_len: int
  num_examples: int
  num_targets: int
  num_bytes: int
  digest: str
  channels: int = 3
  num_segments: int = 0
  parts: tuple[int, ...] = ()

  def __len__(self) -> int:
    return self.num_examples

  def _rows(self, ids: Sequence[int]) -> np.ndarray:
    records = _reader(str(self.path)).read(list(ids)) if ids else []
    rows = np.frombuffer(b''.join(records), '<i4').astype(np.int32)
    return rows.reshape(len(ids), self.channels, self.seq_len)

  def batch(self, ids_B: np.ndarray | Sequence[int]) -> Batch:
    """The examples `ids_B` as a Batch of numpy arrays [B, T]."""
    ids_B = np.asarray(ids_B, np.int64)
    if ids_B.size and not (0 <= ids_B.min() and ids_B.max() < len(self)):
      raise IndexError(f'example ids {ids_B} outside 0 … {len(self) - 1}')
    return pack.to_batch(self._rows([int(i) for i in ids_B]), ids_B)

  def example(self, i: int) -> Batch:
    """Example `i` as a Batch of one row."""
    return self.batch([i])


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A tokenizer and its two splits, which `splits` opens when they are asked for."""

  tokenizer: tokenizers.Tokenizer
  directory: Path
  splits: Callable[[], tuple[Packed, Packed]]

  @property
  def train(self) -> Packed:
    return self.splits()[0]

  @property
  def validation(self) -> Packed:
    return self.splits()[1]


def prepare(data: config.Data, directory: Path, making: build.Making = build.DOCUMENTS
            ) -> Prepared:
  """Opens the prepared examples of `data`, making them first where there are none.

  They lie in `data.cache_dir` (or `directory`), named by the config and the content of the
  source's files; they appear whole or not at all, and hosts that prepare the same at once end
  with one copy.

  Raises:
    UserError: the source, tokenizer or directory is unusable, or a split is empty.
  """
  base = Path(data.cache_dir).expanduser() if data.cache_dir else directory
  publish.remove_abandoned(base)  # Preparations that were killed have left directories here.
  cached = None
  if isinstance(data.source, config.Seqio):
    cached = seqio_tasks.cache(data.source, base)
  key, digests = fingerprint.key(data, cached, base, making.form)
  final = base / f'data-{key[:16]}'
  if not (final / build.MANIFEST).exists():
    with publish.new_directory(final, build.MANIFEST) as temporary:
      build.build(data, making, cached, temporary)
  fingerprint.keep(base, digests)
  return open_prepared(final)


def open_prepared(directory: Path) -> Prepared:
  """Opens what `prepare` made, checking that its files are whole.

  Raises:
    UserError: the manifest or a split is missing or damaged.
  """
  try:
    manifest = json.loads((directory / build.MANIFEST).read_text())
    channels = 3 if manifest.get('kind', 'documents') == 'documents' else 4
    splits = {}
    for name in build.SPLITS:
      counts, path = manifest[name], directory / f'{name}.array_record'
      if not path.is_file() or _reader(str(path)).num_records() != counts['examples']:
        raise ValueError(f'{path.name} is incomplete')
      splits[name] = Packed(path, manifest['seq_len'], counts['examples'], counts['targets'],
                            counts['target_bytes'], counts['digest'], channels,
                            counts.get('segments', 0),
                            tuple(counts.get('parts', [counts['examples']])))
  except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
    raise UserError(f'The prepared data in {directory} are damaged ({error}): delete that '
                    'directory and run again to remake them.') from error
  tokenizer = tokenizers.load(directory / 'tokenizer')
  both = splits['train'], splits['validation']
  return Prepared(tokenizer, directory, lambda: both)


# --- Reading --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Load:
  """Loads a host's part of a global batch of example ids: some rows, and some tokens of each."""

  packed: Packed
  rows: np.ndarray
  tokens: np.ndarray

  def __call__(self, ids_B: np.ndarray) -> Batch:
    batch: Batch = self.packed.batch(np.asarray(ids_B)[self.rows])
    return jax.tree.map(lambda x: x if x.ndim == 1 else x[:, self.tokens], batch)


_LoadedT = TypeVar('_LoadedT')


class TrainIterator(Generic[_LoadedT]):
  """Yields batches without end; that of step s depends on (data, seed, batch size, s) alone."""

  def __init__(self, steps: grain.MapDataset, num_workers: int, identity: dict[str, Any]) -> None:
    self._steps, self._num_workers, self._identity = steps, num_workers, identity
    self._step = 0
    self._iterator: Any = None

  def __iter__(self) -> 'TrainIterator[_LoadedT]':
    return self

  def __next__(self) -> _LoadedT:
    if self._iterator is None:
      self._iterator = iter(self._from(self._step))
    batch: _LoadedT = next(self._iterator)
    self._step += 1
    return batch

  def _from(self, step: int) -> grain.IterDataset:
    # Two threads keep a batch ahead of the step without taking the CPU from it.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches = self._steps.slice(slice(step, None)).to_iter_dataset(options)
    if not self._num_workers:
      return batches
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which nothing here parses
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers),
                               worker_init_fn=workers.outlive_signals)

  def get_state(self) -> dict[str, Any]:
    """The next step, and what the order of examples follows from, as values for JSON."""
    return {'step': self._step, **self._identity}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues at `state` as if it had never stopped, on any number of hosts and workers.

    Raises:
      UserError: the state belongs to other data, another seed or batch size.
    """
    for name, value in self._identity.items():
      if state.get(name) != value:
        raise UserError(f'The checkpoint’s data iterator has {name} = {state.get(name)!r}, this '
                        f'run has {value!r}: resume with the same data, seed and batch size, or '
                        'start in a new work directory.')
    self._step = int(state['step'])
    self.close()

  def close(self) -> None:
    """Stops reading ahead; the next batch starts it again."""
    if self._iterator is not None:
      self._iterator.close()
    self._iterator = None


def train_iterator(packed: Packed, *, seed: int, batch_size: int,
                   rows: np.ndarray | None = None, tokens: np.ndarray | None = None,
                   num_workers: int = 0, shares: tuple[int, ...] = ()) -> TrainIterator[Batch]:
  """Yields this host's rows and tokens of the global batch of each step.

  The global order is a permutation of the examples, drawn anew each epoch from `seed` and cut
  every `batch_size` rows; a batch may span two epochs. Each source of a mixture has a permutation
  of its own, and `mixture.interleaving` says whose turn it is.

  Args:
    packed: the training split.
    seed: decides the order.
    batch_size: B, the rows over all hosts.
    rows: which of the B rows this host reads (`parallel.hosts.owned`); None reads all.
    tokens: which of a row's T tokens this host keeps; None keeps all.
    num_workers: processes that read ahead; 0 reads in threads of this process.
    shares: those of a mixture's sources (`config.Mixture.shares`).

  Raises:
    UserError: fewer than B examples.
  """
  _check_enough(packed, batch_size, 'training')
  load = _Load(packed, np.arange(batch_size) if rows is None else rows,
               np.arange(packed.seq_len) if tokens is None else tokens)
  identity: dict[str, Any] = {'seed': seed, 'batch_size': batch_size, 'digest': packed.digest}
  if shares:
    order = mixture.order(packed.parts, shares, seed)
    identity['shares'] = list(shares)
  else:
    order = mixture.permuted(0, len(packed), seed)
  return TrainIterator(order.batch(batch_size).map(load), num_workers, identity)


def shuffled(source: Any, load: Callable[[np.ndarray], _LoadedT], *, seed: int, batch_size: int
             ) -> TrainIterator[_LoadedT]:
  """Yields what `load` makes of the numbers of each step's examples, without end.

  The order is that of `train_iterator`, for a source of another kind than packed text.

  Args:
    source: its `num_examples` and `digest` are read.
    load: i64[B] numbers of examples → a batch.
    seed: decides the order.
    batch_size: B.

  Raises:
    UserError: fewer than B examples.
  """
  if source.num_examples < batch_size:
    raise UserError(f'There are {source.num_examples} examples, fewer than one batch of '
                    f'{batch_size}: give more, or lower the batch size.')
  order = mixture.permuted(0, source.num_examples, seed)
  identity = {'seed': seed, 'batch_size': batch_size, 'digest': source.digest}
  return TrainIterator(order.batch(batch_size).map(load), 0, identity)


def eval_batches(packed: Packed, batch_size: int, limit: int = 0) -> Iterator[Batch]:
  """Yields the examples in file order; the last batch is filled up with rows of weight 0.

  Args:
    packed: the validation split.
    batch_size: B.
    limit: the most batches; 0 takes all.

  Raises:
    UserError: the split has no example.
  """
  _check_enough(packed, 1, 'validation')
  return _eval_batches(packed, batch_size, limit)


def _eval_batches(packed: Packed, batch_size: int, limit: int) -> Iterator[Batch]:
  starts = range(0, len(packed), batch_size)
  for low in starts[:limit] if limit else starts:
    ids = np.arange(low, low + batch_size)
    yield padded_batch(packed, np.where(ids < len(packed), ids, -1))


def padded_batch(packed: Packed, ids_B: np.ndarray) -> Batch:
  """The examples `ids_B` as a batch; −1, which may stand at the end only, is a row of weight 0."""
  ids = [int(i) for i in ids_B if i >= 0]
  padding = np.zeros((len(ids_B) - len(ids), packed.channels, packed.seq_len), np.int32)
  return pack.to_batch(np.concatenate([packed._rows(ids), padding]), np.asarray(ids_B))


def _check_enough(packed: Packed, batch_size: int, split: str) -> None:
  if len(packed) < batch_size:
    raise UserError(f'The {split} split has {len(packed)} examples of {packed.seq_len} tokens, '
                    f'fewer than one batch of {batch_size}: give more text, or lower '
                    'Data.seq_len or Train.batch_size.')
