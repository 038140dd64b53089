"""What a tokenizer.json says of itself: the token that begins a text, and the name of an id."""

from pathlib import Path

import tokenizers

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
