"""Encodes templates of the operator that have the texts of others in them.

Special tokens that the operator has written into a template, such as `<|im_start|>`, are those
tokens. The same characters in what a user, a problem or a document says stay text, so that
nobody can end a turn or a document from inside.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_pt.data import token_table
from jaxrl_pt.data.tokenizer import Tokenizer


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
