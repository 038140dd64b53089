"""What tokenizers share: a table of the bytes of each id, a fingerprint, files on disk."""

import abc
from collections.abc import Callable, Mapping, Sequence
import functools
import hashlib
import json
from pathlib import Path
import re
from typing import Any

_BYTE_PIECE = re.compile(r'<0x([0-9A-Fa-f]{2})>')
DESCRIPTION, DEFINITION = 'tokenizer_config.json', {
    'tokenizer.json': 'tokenizer.json', 'sentencepiece': 'tokenizer.model'}


def join(table: list[bytes], ids: Sequence[int], dummy_space: bool) -> bytes:
  """The bytes that ids spell, without the space that encoding may have put before the text."""
  # A model's vocabulary may be padded beyond the tokenizer's: such ids spell nothing.
  joined = b''.join(table[i] for i in ids if 0 <= i < len(table))
  return joined[1:] if dummy_space and joined.startswith(b' ') else joined


def digest(kind: str, eos_id: int, bos_id: int | None, definition: bytes) -> str:
  """A tokenizer's fingerprint: sha256 of everything that decides its ids."""
  begins = '' if bos_id is None else f'{bos_id}\n'
  return hashlib.sha256(f'{kind}\n{eos_id}\n{begins}'.encode() + definition).hexdigest()


def write(directory: Path, description: dict[str, Any], definition: bytes) -> None:
  """Writes all that `tokenizer.load` reads of a tokenizer."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + '\n')
  if definition:
    (directory / DEFINITION[description['kind']]).write_bytes(definition)


def metaspace_piece(piece: str) -> bytes:
  """The bytes of a SentencePiece-style piece: ▁ is a space, and <0xNN> is a byte."""
  byte = _BYTE_PIECE.fullmatch(piece)
  return bytes([int(byte[1], 16)]) if byte else piece.replace('▁', ' ').encode()


def find_special(special: Mapping[str, int], text: str) -> list[tuple[int, int]]:
  """The places of special tokens in a text; where several begin, the longest counts."""
  if not special:
    return []
  pattern = '|'.join(re.escape(s) for s in sorted(special, key=len, reverse=True))
  return [found.span() for found in re.finditer(pattern, text)]


def encode_between(encode: Callable[[str], list[int]], special: Mapping[str, int], text: str,
                   places: Sequence[tuple[int, int]]) -> list[int]:
  """The ids of a text whose `places` are special tokens; the pieces between are encoded apart."""
  ids: list[int] = []
  end = 0
  for start, stop in places:
    ids += [*(encode(text[end:start]) if start > end else ()), special[text[start:stop]]]
    end = stop
  return ids + (encode(text[end:]) if end < len(text) else [])


class TableTokenizer(abc.ABC):
  """The part of a tokenizer that needs only its table of bytes."""

  @functools.cached_property
  @abc.abstractmethod
  def _table(self) -> list[bytes]:
    """The bytes that each id contributes to text."""

  @functools.cached_property
  @abc.abstractmethod
  def _dummy_space(self) -> bool:
    """Whether encoding puts a space before the text that decoding must take away."""

  @property
  def vocab_size(self) -> int:
    return len(self._table)

  def decode_bytes(self, ids: Sequence[int]) -> bytes:
    return join(self._table, ids, self._dummy_space)

  def decode(self, ids: Sequence[int]) -> str:
    return self.decode_bytes(ids).decode('utf-8', 'replace')

  def token_bytes(self) -> list[bytes]:
    return list(self._table)
