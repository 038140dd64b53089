"""SentencePiece models as tokenizers."""

from collections.abc import Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxrl_pt.data import token_table
from jaxrl_pt.errors import UserError


class Piece(NamedTuple):
  """An entry of a SentencePiece model."""

  text: str
  score: float
  kind: Literal['text', 'unknown', 'control', 'byte', 'unused']


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer(token_table.TableTokenizer):
  """A SentencePiece model; text is normalised by the model's own rules first.

  has_begin: whether a document begins with the model's own beginning piece or, where it has
  none, with the one that ends documents.
  stop_tokens: pieces that end a response beside the one that ends documents.
  """

  definition: bytes
  has_begin: bool = True
  stop_tokens: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    if self.eos_id < 0:
      raise UserError('The SentencePiece model has no end-of-sentence piece: documents cannot '
                      'be ended; use a model trained with one.')
    for token in self.stop_tokens:
      if token not in self.special_tokens:
        raise UserError(f'The SentencePiece model has no control piece {token!r}: set '
                        'SentencePiece.stop_tokens to pieces that end a response.')

  @functools.cached_property
  def _backend(self) -> Any:
    try:
      import sentencepiece  # an extra: only this kind of tokenizer needs it
    except ImportError as error:
      raise UserError('A SentencePiece tokenizer needs the extra `sentencepiece`: '
                      "pip install 'jaxrl_pt[sentencepiece]'.") from error
    try:
      return sentencepiece.SentencePieceProcessor(model_proto=self.definition)
    except (RuntimeError, TypeError) as error:
      raise UserError('Not a SentencePiece model: give the path of a `.model` file.') from error

  @functools.cached_property
  def _table(self) -> list[bytes]:
    backend = self._backend
    table = []
    for i in range(backend.vocab_size()):
      if backend.is_unknown(i):
        table.append('\ufffd'.encode())  # it stood for text that is lost: let decoding show it
      elif backend.is_control(i) or backend.is_unused(i):
        table.append(b'')
      else:
        table.append(token_table.metaspace_piece(backend.id_to_piece(i)))
    return table

  @functools.cached_property
  def _dummy_space(self) -> bool:
    return bool(self._backend.encode('a', out_type=str)[0].startswith('▁'))

  @functools.cached_property
  def eos_id(self) -> int:
    return int(self._backend.eos_id())

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    others = [self.special_tokens[token] for token in self.stop_tokens]
    return tuple(dict.fromkeys([self.eos_id, *others]))

  @functools.cached_property
  def bos_id(self) -> int | None:
    own = int(self._backend.bos_id())
    return (own if own >= 0 else self.eos_id) if self.has_begin else None

  @functools.cached_property
  def unused_ids(self) -> tuple[int, ...]:
    return tuple(i for i in range(self.vocab_size) if self._backend.is_unused(i))

  @functools.cached_property
  def fingerprint(self) -> str:
    return token_table.digest('sentencepiece', self.eos_id, self.bos_id, self.definition)

  def encode(self, text: str) -> list[int]:
    return list(self._backend.encode(text))

  @functools.cached_property
  def special_tokens(self) -> dict[str, int]:
    return {self._backend.id_to_piece(i): i for i in range(self.vocab_size)
            if self._backend.is_control(i)}

  @property
  def adds_space(self) -> bool:
    """Whether encoding puts a space before a text."""
    return self._dummy_space

  def pieces(self) -> list[Piece]:
    """The model's table, by id."""
    backend = self._backend
    tests: tuple[tuple[Any, Any], ...] = (
        (backend.is_unknown, 'unknown'), (backend.is_control, 'control'),
        (backend.is_byte, 'byte'), (backend.is_unused, 'unused'))
    return [Piece(backend.id_to_piece(i), backend.get_score(i),
                  next((kind for test, kind in tests if test(i)), 'text'))
            for i in range(backend.vocab_size())]

  def encode_parsed(self, text: str) -> list[int]:
    """SentencePiece itself never parses control pieces: each text between two of them is a text
    of its own, with the space that the model puts before one."""
    return token_table.encode_between(self.encode, self.special_tokens, text,
                                      token_table.find_special(self.special_tokens, text))

  @property
  def spellable_tokens(self) -> frozenset[str]:
    return frozenset()

  def encode_letters(self, text: str) -> list[int]:
    return self.encode(text)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return list(self._backend.encode(list(texts)))

  def save(self, directory: Path) -> None:
    description = {'kind': 'sentencepiece', 'has_begin': self.has_begin,
                   'stop_tokens': self.stop_tokens,
                   'fingerprint': self.fingerprint}
    token_table.write(directory, description, self.definition)
