"""What a tokenizer.json says of itself: its first token of a text, names and bytes of its ids."""

from pathlib import Path
from typing import Any

import tokenizers

from jaxrl_pt.data import token_table
from jaxrl_pt.errors import UserError


def begin_of_text(path: Path) -> str:
  """The token that the file's own post-processor puts before a text; '' where it puts none.

  Raises:
    UserError: the file cannot be read.
  """
  backend = _open(path)
  plain = backend.encode('a', add_special_tokens=False).ids
  whole = backend.encode('a', add_special_tokens=True).ids
  has_more = len(whole) > len(plain) and whole[0] != plain[0]
  return backend.id_to_token(whole[0]) or '' if has_more else ''


def token_of(path: Path, token_id: int) -> str | None:
  """The token of an id; None where there is none.

  Raises:
    UserError: the file cannot be read.
  """
  return _open(path).id_to_token(token_id) if 0 <= token_id < 2**32 else None


def _open(path: Path) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exception for a bad file
    raise UserError(f'{path} is not a usable tokenizer.json ({error}): download it again.'
                    ) from error


def _byte_alphabet() -> dict[str, int]:
  """Character → byte of GPT-2's printable alphabet for byte-level BPE.

  Printable Latin-1 stands for itself; every other byte, in order, takes the next
  code point from 256 on.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _decoder_types(decoder: Any) -> set[str]:
  if not isinstance(decoder, dict):
    return set()
  inner = [_decoder_types(d) for d in decoder.get('decoders', [])]
  return {str(decoder.get('type'))}.union(*inner)


def byte_table(backend: tokenizers.Tokenizer, definition: dict[str, Any]) -> list[bytes]:
  """The bytes of each id of a tokenizer.json, as the kind of its decoder says."""
  types = _decoder_types(definition.get('decoder'))
  alphabet = _byte_alphabet()
  added = {token['id']: token for token in definition.get('added_tokens', [])}
  vocabulary = backend.get_vocab(with_added_tokens=True)
  table = [b''] * (1 + max(vocabulary.values()))
  for piece, i in vocabulary.items():
    if i in added:
      table[i] = b'' if added[i].get('special') else piece.encode()
    elif 'ByteLevel' in types and all(c in alphabet for c in piece):
      table[i] = bytes(alphabet[c] for c in piece)
    elif types & {'Metaspace', 'ByteFallback', 'Replace'}:
      table[i] = token_table.metaspace_piece(piece)
    elif 'WordPiece' in types:
      table[i] = piece[2:].encode() if piece.startswith('##') else b' ' + piece.encode()
    else:
      table[i] = piece.encode()
  return table
