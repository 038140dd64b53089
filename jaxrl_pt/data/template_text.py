"""Encodes templates of the operator that have the texts of others in them.

Special tokens that the operator has written into a template, such as `<|im_start|>`, are those
tokens. The same characters in what a user, a problem or a document says stay text, so that
nobody can end a turn or a document from inside.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_pt.data import token_table
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError

_LEAD = '\n'  # A text that most tokenizers keep apart from the one after it.


class Span(NamedTuple):
  """A piece of a text; `is_template` where the operator wrote it."""

  text: str
  is_template: bool


def template(text: str) -> list[Span]:
  """A text that the operator wrote, as the only span."""
  return [Span(text, True)]


def around(text: str, before: str, after: str) -> list[Span]:
  """The spans of a text of others between two pieces of a template."""
  return [Span(before, True), Span(text, False), Span(after, True)]


def encode(tokenizer: Tokenizer, spans: Sequence[Span]) -> list[int]:
  """The ids of the joined text, in which the special tokens of template spans become those tokens.

  Where the template has no special token, this is `tokenizer.encode` of the whole text, which is
  not cut where spans meet. It is not cut either where the other spans spell no special token,
  because the tokenizer's own parser then finds those of the template alone. Otherwise the text is
  cut at the template's special tokens, and the pieces between them are encoded apart.
  """
  text = ''.join(span.text for span in spans)
  special = tokenizer.special_tokens
  places: set[tuple[int, int]] = set()
  start = 0
  for span in spans:
    if span.is_template:
      places |= {(start + a, start + b) for a, b in token_table.find_special(special, span.text)}
    start += len(span.text)
  if not places:
    return tokenizer.encode(text)
  if places == set(token_table.find_special(special, text)):
    return tokenizer.encode_parsed(text)
  return token_table.encode_between(tokenizer.encode, special, text, sorted(places))


def encode_next(tokenizer: Tokenizer, spans: Sequence[Span]) -> list[int]:
  """`encode` of a text that goes on after other tokens.

  Some tokenizers put a space before a text. There is none where a text only goes on, which is found
  by encoding it after a line break.
  """
  table = tokenizer.token_bytes()
  if not b''.join(table[i] for i in tokenizer.encode('a')).startswith(b' '):
    return encode(tokenizer, spans)
  lead = tokenizer.encode(_LEAD)
  ids = encode(tokenizer, [Span(_LEAD, False), *spans])
  return ids[len(lead):] if lead and ids[:len(lead)] == lead else encode(tokenizer, spans)


def one_token(tokenizer: Tokenizer, setting: str, text: str) -> int:
  """The id of the only token of a text, which may be a special token.

  Raises:
    UserError: the text is not one token; `setting` names it.
  """
  ids = encode(tokenizer, template(text))
  if len(ids) != 1:
    raise UserError(f'{setting} = {text!r} is {len(ids)} tokens: choose a text that is one and '
                    'that the corpus does not use.')
  return ids[0]
