"""Tokenizers between text and ids: bytes, byte-level BPE, any tokenizer.json, SentencePiece.

Every tokenizer is a table of the bytes that each id contributes to text, and decoding joins the
entries of that table. So `decode`, bits per byte and a byte-prefix reward all mean the same bytes.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import gzip
import json
from pathlib import Path
from typing import Protocol
import zlib

import tokenizers

from jaxrl_pt import config
from jaxrl_pt.data import token_table, tokenizer_json
from jaxrl_pt.data.sentencepiece_tokenizer import SentencePieceTokenizer
from jaxrl_pt.errors import UserError

END_OF_TEXT = '<|endoftext|>'


class Tokenizer(Protocol):
  """What the rest of the code reads of a tokenizer; `load(directory)` undoes `save`."""

  @property
  def vocab_size(self) -> int:
    """One more than the highest id."""
    ...

  @property
  def eos_id(self) -> int:
    """The id that ends a document."""
    ...

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """The ids of which any ends a response; the first is `eos_id`."""
    ...

  @property
  def bos_id(self) -> int | None:
    """The id that begins a document; None where models of this tokenizer are trained without."""
    ...

  @property
  def unused_ids(self) -> tuple[int, ...]:
    """Ids below `vocab_size` that no token has."""
    ...

  @property
  def fingerprint(self) -> str:
    """sha256 of everything that decides ids."""
    ...

  def encode(self, text: str) -> list[int]:
    """The ids of `text`; nothing is added, and special tokens written in it stay text."""
    ...

  @property
  def special_tokens(self) -> dict[str, int]:
    """How the special tokens are written in templates, and their ids."""
    ...

  def encode_parsed(self, text: str) -> list[int]:
    """`encode` for an operator's own text: special tokens written in it become those tokens."""
    ...

  @property
  def spellable_tokens(self) -> frozenset[str]:
    """Added tokens that `encode` finds in every text, as they are no special tokens."""
    ...

  def encode_letters(self, text: str) -> list[int]:
    """`encode` in which those tokens stay text too."""
    ...

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text, in parallel where the library can."""
    ...

  def decode_bytes(self, ids: Sequence[int]) -> bytes:
    """The bytes that `ids` spell, without the space some models put before a text."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """`decode_bytes` as UTF-8; what is not valid becomes U+FFFD."""
    ...

  def token_bytes(self) -> list[bytes]:
    """The bytes each id contributes to text, by id; empty for special tokens."""
    ...

  def save(self, directory: Path) -> None:
    """Writes all that `load` needs into `directory`."""
    ...


def begun(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
  """The ids of a text that begins a document: the beginning token, once, and then `ids`.

  Training puts the same token in front of every document, so every prompt has to begin with it too.

  Raises:
    UserError: there are no ids, and no token begins a document.
  """
  if tokenizer.bos_id is None:
    if not ids:
      raise UserError('An empty prompt gives this model nothing to start from, as no token of '
                      'its tokenizer begins a document: write a prompt.')
    return list(ids)
  return list(ids) if list(ids[:1]) == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def drawable(sampler: config.Sampler, tokenizer: Tokenizer, vocab_size: int) -> config.Sampler:
  """Makes a sampler ban every id of a model that no token of its tokenizer has.

  A vocabulary is often padded beyond its tokenizer's. Such an id spells nothing, but a model
  that was never trained on it may think it likely.
  """
  unused = (*tokenizer.unused_ids, *range(tokenizer.vocab_size, vocab_size))
  return dataclasses.replace(sampler, banned=tuple(sorted({*sampler.banned, *unused})))


# --- Bytes ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """Ids 0–255 are the bytes of UTF-8; 256 ends a document and, by default, begins it."""

  bos_id: int | None = 256

  @property
  def vocab_size(self) -> int:
    return 257

  @property
  def eos_id(self) -> int:
    return 256

  @property
  def stop_ids(self) -> tuple[int, ...]:
    return (self.eos_id,)

  @property
  def unused_ids(self) -> tuple[int, ...]:
    return ()

  @functools.cached_property
  def fingerprint(self) -> str:
    return token_table.digest('bytes', self.eos_id, self.bos_id, b'')

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  @property
  def special_tokens(self) -> dict[str, int]:
    return {END_OF_TEXT: self.eos_id}

  def encode_parsed(self, text: str) -> list[int]:
    special = self.special_tokens
    return token_table.encode_between(self.encode, special, text,
                                      token_table.find_special(special, text))

  @property
  def spellable_tokens(self) -> frozenset[str]:
    return frozenset()

  def encode_letters(self, text: str) -> list[int]:
    return self.encode(text)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode_bytes(self, ids: Sequence[int]) -> bytes:
    return bytes(i for i in ids if 0 <= i < 256)

  def decode(self, ids: Sequence[int]) -> str:
    return self.decode_bytes(ids).decode('utf-8', 'replace')

  def token_bytes(self) -> list[bytes]:
    return [bytes([i]) for i in range(256)] + [b'']

  def save(self, directory: Path) -> None:
    token_table.write(directory, {'kind': 'bytes', 'bos_id': self.bos_id,
                      'fingerprint': self.fingerprint}, b'')


# --- tokenizer.json -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class JsonTokenizer(token_table.TableTokenizer):
  """A `tokenizers` pipeline, trained here or read from a tokenizer.json.

  begin_of_text: the token that begins a document; empty for none.
  stop_tokens: tokens that end a response beside `end_of_text`.
  """

  definition: str
  end_of_text: str
  begin_of_text: str
  stop_tokens: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    if self._backend.token_to_id(self.end_of_text) is None:
      raise UserError(f'The tokenizer has no token {self.end_of_text!r}: set '
                      'HuggingFaceTokenizer.end_of_text to its end-of-text token.')
    if self.begin_of_text and self._backend.token_to_id(self.begin_of_text) is None:
      raise UserError(f'The tokenizer has no token {self.begin_of_text!r}: set '
                      'HuggingFaceTokenizer.begin_of_text to the token that begins a document, '
                      "or to '' for models that are trained without one.")
    for token in self.stop_tokens:
      if self._backend.token_to_id(token) is None:
        raise UserError(f'The tokenizer has no token {token!r}: set '
                        'HuggingFaceTokenizer.stop_tokens to tokens that end a response.')

  @functools.cached_property
  def _backend(self) -> tokenizers.Tokenizer:
    # '<|endoftext|>' written in a document is text; only the packer ends documents.
    return self._make_backend(self.definition, special_is_text=True)

  @functools.cached_property
  def _parser(self) -> tokenizers.Tokenizer:
    """The same pipeline, which parses special tokens, for an operator's own texts."""
    return self._make_backend(self.definition, special_is_text=False)

  @functools.cached_property
  def _letters(self) -> tokenizers.Tokenizer:
    """The same pipeline, which takes every added token for a special one, and so for text."""
    definition = json.loads(self.definition)
    added = [token | {'special': True} for token in definition.get('added_tokens', [])]
    return self._make_backend(json.dumps(definition | {'added_tokens': added}),
                              special_is_text=True)

  def _make_backend(self, definition: str, special_is_text: bool) -> tokenizers.Tokenizer:
    try:
      backend = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises bare Exception for a bad definition
      raise UserError(f'Not a usable tokenizer.json: {error}.') from error
    backend.encode_special_tokens = special_is_text
    backend.no_padding()
    backend.no_truncation()
    return backend

  @functools.cached_property
  def _table(self) -> list[bytes]:
    return tokenizer_json.byte_table(self._backend, json.loads(self.definition))

  @functools.cached_property
  def _dummy_space(self) -> bool:
    return token_table.join(self._table, self.encode('a'), False).startswith(b' ')

  @functools.cached_property
  def eos_id(self) -> int:
    found = self._backend.token_to_id(self.end_of_text)
    assert found is not None  # __post_init__ has looked
    return found

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    found = map(self._backend.token_to_id, self.stop_tokens)
    return tuple(dict.fromkeys([self.eos_id, *(i for i in found if i is not None)]))

  @functools.cached_property
  def bos_id(self) -> int | None:
    return self._backend.token_to_id(self.begin_of_text) if self.begin_of_text else None

  @functools.cached_property
  def unused_ids(self) -> tuple[int, ...]:
    used = set(self._backend.get_vocab(with_added_tokens=True).values())
    return tuple(i for i in range(self.vocab_size) if i not in used)

  @functools.cached_property
  def fingerprint(self) -> str:
    return token_table.digest('tokenizer.json', self.eos_id, self.bos_id, self.definition.encode())

  def encode(self, text: str) -> list[int]:
    return list(self._backend.encode(text, add_special_tokens=False).ids)

  @functools.cached_property
  def special_tokens(self) -> dict[str, int]:
    added = json.loads(self.definition).get('added_tokens', [])
    return {token['content']: token['id'] for token in added if token.get('special')}

  def encode_parsed(self, text: str) -> list[int]:
    return list(self._parser.encode(text, add_special_tokens=False).ids)

  @functools.cached_property
  def spellable_tokens(self) -> frozenset[str]:
    added = json.loads(self.definition).get('added_tokens', [])
    return frozenset(token['content'] for token in added if not token.get('special'))

  def encode_letters(self, text: str) -> list[int]:
    return list(self._letters.encode(text, add_special_tokens=False).ids)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [list(encoding.ids) for encoding in encodings]

  def save(self, directory: Path) -> None:
    description = {'kind': 'tokenizer.json', 'end_of_text': self.end_of_text,
                   'begin_of_text': self.begin_of_text, 'stop_tokens': self.stop_tokens,
                   'fingerprint': self.fingerprint}
    token_table.write(directory, description, self.definition.encode())


def _train_bpe(vocab_size: int, documents: Iterable[str]) -> JsonTokenizer:
  """Trains a byte-level BPE over all 256 bytes, so that no text is out of vocabulary."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  backend.train_from_iterator(documents, trainer)
  return JsonTokenizer(backend.to_str(), END_OF_TEXT, END_OF_TEXT)


# --- Construction ---------------------------------------------------------------


def _read(path: str) -> bytes:
  try:
    raw = Path(path).expanduser().read_bytes()
    return gzip.decompress(raw) if path.endswith('.gz') else raw
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f'Cannot read the tokenizer file {path}: {error}.') from error


def train_or_load(tokenizer: config.Tokenizer, documents: Iterable[str]) -> Tokenizer:
  """The tokenizer that a config names; only TrainedBPE reads `documents`.

  Raises:
    UserError: the file is missing or is no tokenizer, or there is no end-of-text token.
  """
  match tokenizer:
    case config.Bytes():
      return ByteTokenizer()
    case config.TrainedBPE(vocab_size=vocab_size):
      return _train_bpe(vocab_size, documents)
    case config.HuggingFaceTokenizer(path=path):
      try:
        definition = _read(path).decode('utf-8-sig')
      except UnicodeDecodeError as error:
        raise UserError(f'{path} is not a tokenizer.json: not UTF-8 at byte offset '
                        f'{error.start}.') from error
      return _named(path, lambda: JsonTokenizer(
          definition, tokenizer.end_of_text, tokenizer.begin_of_text, tokenizer.stop_tokens))
    case config.PolicyTokenizer():
      raise UserError('Data.tokenizer = @cfg.PolicyTokenizer() names no tokenizer without a policy '
                      'to start from: choose another.')
    case config.SentencePiece(path=path):
      model = _read(path)
      return _named(path, lambda: SentencePieceTokenizer(
          model, tokenizer.has_begin, tokenizer.stop_tokens))


def _named(path: str, build: Callable[[], Tokenizer]) -> Tokenizer:
  try:
    return build()
  except UserError as error:
    raise UserError(f'{path}: {error}') from error


def load(directory: Path) -> Tokenizer:
  """The tokenizer that `save` wrote into `directory`; nothing else is read.

  A tokenizer that was saved before documents had a beginning token goes on without one.

  Raises:
    UserError: no tokenizer is there, or its files are not those that were saved.
  """
  try:
    description = json.loads((directory / token_table.DESCRIPTION).read_text())
    kind, fingerprint = description['kind'], description['fingerprint']
    path = directory / token_table.DEFINITION.get(kind, token_table.DESCRIPTION)
    definition, stops = path.read_bytes(), tuple(description.get('stop_tokens', ()))
    if kind == 'tokenizer.json':
      tokenizer: Tokenizer = JsonTokenizer(definition.decode(), description['end_of_text'],
                                           description.get('begin_of_text', ''), stops)
    elif kind == 'sentencepiece':
      tokenizer = SentencePieceTokenizer(definition, description.get('has_begin', False), stops)
    elif kind == 'bytes':
      tokenizer = ByteTokenizer(description.get('bos_id'))
    else:
      raise UserError(f'{directory} holds a tokenizer of unknown kind {kind!r}.')
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'No readable tokenizer in {directory} ({error!r}): give a directory that '
                    'a run has saved.') from error
  if tokenizer.fingerprint != fingerprint:
    raise UserError(f'The tokenizer in {directory} is not the one that was saved there '
                    '(fingerprints differ): restore its files.')
  return tokenizer
