"""Texts, tokenizers and packing."""

from dataclasses import dataclass, replace
import fractions
import math
from typing import Literal, get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.examples import (
  Conversations,
  Demonstrations,
  HybridConversations,
  WeightedConversations,
)
from jaxrl_pt.config.pairs import (
  Preferences,
  ResultPreferences,
  SlipPreferences,
  check_better_is_right,
)
from jaxrl_pt.errors import UserError


@dataclass(frozen=True)
class PythonStdlib:
  """The corpus that needs no files: the source of Python's standard library.

  max_bytes: the largest size of the text, whose files come in a fixed shuffled order.
  """

  max_bytes: int = 8_000_000

  def __post_init__(self) -> None:
    checks.size(self, 'max_bytes', 10_000, 2**40, 1, 'the text')


@dataclass(frozen=True)
class TextFiles:
  """UTF-8 text files (plain or .gz) that match `glob`.

  document_start: a regular expression (in multi-line mode) at whose matches a new document begins;
    with '' each file is one document.
  """

  glob: str
  document_start: str = ''

  def __post_init__(self) -> None:
    checks.text(self, 'glob')
    checks.text(self, 'document_start', empty=True)


@dataclass(frozen=True)
class Jsonl:
  """JSON-lines files (plain or .gz), whose rows have their text in `text_field`."""

  glob: str
  text_field: str = 'text'

  def __post_init__(self) -> None:
    checks.text(self, 'glob')
    checks.text(self, 'text_field')


@dataclass(frozen=True)
class Parquet:
  """Parquet files, whose rows have their text in `column`."""

  glob: str
  column: str = 'text'

  def __post_init__(self) -> None:
    checks.text(self, 'glob')
    checks.text(self, 'column')


@dataclass(frozen=True)
class ArrayRecord:
  """ArrayRecord files of UTF-8 texts or, if `feature` is set, of tf.train.Example.

  feature: the feature that holds the text.
  """

  glob: str
  feature: str = ''

  def __post_init__(self) -> None:
    checks.text(self, 'glob')
    checks.text(self, 'feature', empty=True)


@dataclass(frozen=True)
class HuggingFaceDataset:
  """A data set on disk in the layout of Hugging Face's library `datasets`; the extra of that name.

  path: a folder with Parquet, JSON, CSV or text files, as it is downloaded from the Hub; one that
    `save_to_disk` wrote; or one such file.
  split: the split that is read, of which Data.validation_fraction is held out.
  column: the column with the text.
  """

  path: str
  split: str = 'train'
  column: str = 'text'

  def __post_init__(self) -> None:
    for name in ('path', 'split', 'column'):
      checks.text(self, name)


@dataclass(frozen=True)
class Seqio:
  """A registered seqio Task or Mixture, which is cached once; it needs the `seqio` extra.

  module: the module that registers it when it is imported.
  feature: the feature that holds the token ids.
  """

  name: str
  module: str
  feature: str = 'targets'

  def __post_init__(self) -> None:
    for name in ('name', 'module', 'feature'):
      checks.text(self, name)


MixedSource = (PythonStdlib | TextFiles | Jsonl | Parquet | ArrayRecord | HuggingFaceDataset
               | Demonstrations | Conversations | HybridConversations | WeightedConversations)
# The order of a mixture is kept as a table of one period.
_LONGEST_PERIOD = 100_000


@dataclass(frozen=True)
class Mixture:
  """Several sources, from which training draws examples in proportion to weights.

  Each source is split and packed for itself, and starts anew when all its examples have been drawn.

  names: what the sources are called in the metrics, in their order.
  sources: all of documents, or all of conversations.
  weights: one for each source. The numbers of examples stand to one another as these decimal
    numbers do, exactly.
  """

  names: tuple[str, ...]
  sources: tuple[MixedSource, ...]
  weights: tuple[float, ...]

  def __post_init__(self) -> None:
    checks.texts(self, 'names', 'a list of names such as [\'code\', \'books\']', 1)
    if len(set(self.names)) < len(self.names):
      checks.fail(self, 'names', 'names that differ')
    for name in ('sources', 'weights'):
      if not isinstance(getattr(self, name), (list, tuple)):
        checks.fail(self, name, 'a list')
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if (len(self.sources) != len(self.names)
        or not all(isinstance(source, get_args(MixedSource)) for source in self.sources)):
      checks.fail(self, 'sources', f'{len(self.names)} sources, one for each name: '
                  f'{checks.one_of(get_args(MixedSource))}')
    if (len(self.weights) != len(self.names)
        or not all(checks.is_weight(weight) and weight > 0 for weight in self.weights)):
      checks.fail(self, 'weights', f'{len(self.names)} numbers above 0, one for each name')
    object.__setattr__(self, 'weights', tuple(map(float, self.weights)))
    if sum(self.shares) > _LONGEST_PERIOD:
      checks.fail(self, 'weights', f'numbers of fewer digits, whose ratios are those of whole '
                  f'numbers with a sum of at most {_LONGEST_PERIOD}')

  @property
  def shares(self) -> tuple[int, ...]:
    """Whole numbers without a common divisor that stand to one another as the weights do."""
    exact = [fractions.Fraction(repr(weight)) for weight in self.weights]
    scale = math.lcm(*(x.denominator for x in exact))
    whole = [int(x * scale) for x in exact]
    return tuple(x // math.gcd(*whole) for x in whole)


Source = MixedSource | Seqio | Preferences | SlipPreferences | ResultPreferences | Mixture

# What a packed example is made of.
Examples = Literal['documents', 'conversations', 'preferences']
# The sources of each kind of example.
SOURCES_OF: dict[Examples, tuple[type, ...]] = {
    'documents': (PythonStdlib, TextFiles, Jsonl, Parquet, ArrayRecord, HuggingFaceDataset, Seqio,
                  Demonstrations, Mixture),
    'conversations': (Conversations, HybridConversations, WeightedConversations, Demonstrations,
                      Mixture),
    'preferences': (Preferences, SlipPreferences, ResultPreferences)}


@dataclass(frozen=True)
class Bytes:
  """One token for each UTF-8 byte, with ids 0–255; end of text is 256."""


@dataclass(frozen=True)
class TrainedBPE:
  """Byte-level BPE that is trained on the training documents and saved with the run."""

  vocab_size: int

  def __post_init__(self) -> None:
    checks.size(self, 'vocab_size', 257, 2**24, 16, 'the table of its pieces')


@dataclass(frozen=True)
class HuggingFaceTokenizer:
  """A Hugging Face `tokenizer.json` (plain or .gz) on disk.

  end_of_text: its EOS token.
  begin_of_text: the token that its models see before every document, such as '<s>'; '' for models
    that are trained without one. A model that is trained from scratch should have one; where the
    file has no such token, it can be that of `end_of_text`.
  stop_tokens: tokens at which a response ends too, such as '<|im_end|>'.
  """

  path: str
  end_of_text: str
  begin_of_text: str
  stop_tokens: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    checks.text(self, 'path')
    checks.text(self, 'end_of_text')
    if self.begin_of_text != '':
      checks.text(self, 'begin_of_text')
    _check_stops(self)


@dataclass(frozen=True)
class SentencePiece:
  """A SentencePiece `.model` file on disk.

  has_begin: whether every document begins with the file's beginning piece, or with its end piece
    where it has none; False for models that are trained without one.
  stop_tokens: control pieces at which a response ends too.
  """

  path: str
  has_begin: bool = True
  stop_tokens: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    checks.text(self, 'path')
    checks.flag(self, 'has_begin')
    _check_stops(self)


# The sampler's programs have room for eight tokens, and end of text is one of them.
_MOST_STOPS = 7


def _check_stops(tokenizer: HuggingFaceTokenizer | SentencePiece) -> None:
  stops = tokenizer.stop_tokens
  if not isinstance(stops, tuple) or len(stops) > _MOST_STOPS or not all(
      isinstance(token, str) and token for token in stops):
    checks.fail(tokenizer, 'stop_tokens', f"at most {_MOST_STOPS} tokens, as ('<|im_end|>',)")


@dataclass(frozen=True)
class PolicyTokenizer:
  """The tokenizer of the policy that the run starts from."""


Tokenizer = Bytes | TrainedBPE | HuggingFaceTokenizer | SentencePiece | PolicyTokenizer


_WITHOUT_GLOB = (PythonStdlib, Seqio, Demonstrations, WeightedConversations, SlipPreferences,
                 ResultPreferences, HuggingFaceDataset, Mixture)


@dataclass(frozen=True)
class Data:
  """Documents, their tokenizer, and the packed examples made of them.

  seq_len: the number of predicted tokens of a packed example.
  validation_fraction: the share of the documents, chosen whole by a hash, that is held out.
  validation_glob: files of the source's kind that are the validation split instead; none of their
    documents may be among those of the source.
  long_documents: whether a document longer than seq_len is 'split' over examples, 'cut' after its
    first seq_len tokens, or an 'error'.
  cache_dir: the folder where prepared examples are kept and shared between runs; '' for the run's
    own work directory.
  num_workers: the number of Grain's worker processes on each host; with 0 the training process
    reads.
  """

  source: Source
  tokenizer: Tokenizer
  seq_len: int
  validation_fraction: float = 0.02
  validation_glob: str = ''
  long_documents: Literal['split', 'cut', 'error'] = 'split'
  cache_dir: str = ''
  num_workers: int = 0

  def __post_init__(self) -> None:
    checks.instance(self, 'source', *get_args(Source))
    check_better_is_right(self.source, 'Data.source')
    checks.instance(self, 'tokenizer', *get_args(Tokenizer))
    checks.size(self, 'seq_len', 2, 2**24, 4, 'the tokens of one example')
    checks.number(self, 'validation_fraction', 0.0, 0.5)
    checks.text(self, 'validation_glob', empty=True)
    if self.validation_glob and isinstance(self.source, _WITHOUT_GLOB):
      raise UserError('Data.validation_glob goes with a source of files: leave it empty for '
                      f'{type(self.source).__name__}.')
    checks.choice(self, 'long_documents', Literal['split', 'cut', 'error'])
    checks.text(self, 'cache_dir', empty=True)
    checks.size(self, 'num_workers', 0, 256, 2**26, 'so many processes')

  @property
  def validation_source(self) -> Source:
    """The source of the validation split, where `validation_glob` is set."""
    assert not isinstance(self.source, _WITHOUT_GLOB)
    return replace(self.source, glob=self.validation_glob)
