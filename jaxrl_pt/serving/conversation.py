"""Turns conversations into prompts, by a template of plain text that suits any model."""

from collections.abc import Sequence
import dataclasses
from dataclasses import dataclass
import json
from pathlib import Path
from typing import Literal, NamedTuple

from jaxrl_pt.data import template_text, token_table
from jaxrl_pt.data.template_text import Span
from jaxrl_pt.data.tokenizer import Tokenizer, begun
from jaxrl_pt.errors import UserError

_CONTENT = '{content}'
# The engine takes four stop tokens, and end of text is one of them.
MOST_STOPS = 3


class Message(NamedTuple):
  """One turn of a conversation."""

  role: Literal['system', 'user', 'assistant']
  content: str


@dataclass(frozen=True)
class Template:
  """The prompt template of a conversation, in which `{content}` stands for what was said.

  system, user, assistant: the texts of turns of these roles.
  opening: the text before the answer to come.
  stop: texts that end the answer, beside end of text.

  Special tokens that are written in the template are those tokens; in `{content}` they are text.
  """

  system: str = '{content}\n\n'
  user: str = 'User: {content}\n\n'
  assistant: str = 'Assistant: {content}\n\n'
  opening: str = 'Assistant:'
  stop: tuple[str, ...] = ('\nUser:',)

  def __post_init__(self) -> None:
    for name in ('system', 'user', 'assistant', 'opening'):
      value = getattr(self, name)
      if not isinstance(value, str) or (name != 'opening' and _CONTENT not in value):
        raise UserError(f'Template.{name} = {value!r}: write a text with {_CONTENT} in it.')
    if (isinstance(self.stop, str) or len(self.stop) > MOST_STOPS
        or not all(isinstance(s, str) and s for s in self.stop)):
      raise UserError(f'Template.stop = {self.stop!r}: write a list of texts, at most '
                      f'{MOST_STOPS}.')
    object.__setattr__(self, 'stop', tuple(self.stop))

  def spans(self, messages: Sequence[Message]) -> list[Span]:
    """The texts of the prompt that asks for the assistant's next turn."""
    turns = {'system': self.system, 'user': self.user, 'assistant': self.assistant}
    spans = []
    for message in messages:
      first, *others = turns[message.role].split(_CONTENT)
      spans.append(Span(first, True))
      for text in others:
        spans += [Span(message.content, False), Span(text, True)]
    return [*spans, Span(self.opening, True)]

  def prompt(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The prompt's tokens, with special tokens only where the template has them."""
    return begun(tokenizer, template_text.encode(tokenizer, self.spans(messages)))

  def stops(self, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The stop tokens and stop texts of an answer: special tokens end it as tokens, not as texts.

    Raises:
      UserError: a stop text holds a special token beside other text.
    """
    special = tokenizer.special_tokens
    texts = tuple(text for text in self.stop if text not in special)
    for text in texts:
      if token_table.find_special(special, text):
        raise UserError(f'Template.stop = {text!r} holds a special token beside other text, which '
                        'no answer can spell: write the token alone.')
    return tuple(special[text] for text in self.stop if text in special), texts


def read_template(path: Path) -> Template:
  """Reads a JSON file that has some of the fields of `Template`.

  Raises:
    UserError: the file is missing, is not JSON or has an unknown field.
  """
  try:
    fields = json.loads(path.read_bytes().decode('utf-8-sig'))
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f'Cannot read the chat template {path} ({e}): give a JSON file in '
                    'UTF-8.') from e
  known = [f.name for f in dataclasses.fields(Template)]
  if not isinstance(fields, dict) or not set(fields) <= set(known):
    raise UserError(f'The chat template {path} must be a JSON object with fields among '
                    f'{", ".join(known)}.')
  try:
    return Template(**fields)
  except (UserError, TypeError) as e:
    raise UserError(f'The chat template {path} is not usable: {e}') from e


def fit(template: Template, tokenizer: Tokenizer, messages: Sequence[Message],
        prompt_len: int) -> tuple[list[int], int]:
  """The prompt of as many of the newest turns as `prompt_len` tokens hold.

  System messages always stay. Of the other messages the oldest are left out first, and the first
  one that stays is the user's.

  Returns:
    (token ids, number of messages left out).

  Raises:
    UserError: even the last message alone is too long.
  """
  system = [m for m in messages if m.role == 'system']
  turns = [m for m in messages if m.role != 'system']
  tokens: list[int] = []
  for start in (i for i, m in enumerate(turns) if m.role == 'user'):
    tokens = template.prompt(tokenizer, [*system, *turns[start:]])
    if len(tokens) <= prompt_len:
      return tokens, start
  raise UserError(f'The message has {len(tokens)} tokens with its frame and the model takes '
                  f'{prompt_len}: shorten it or raise --prompt_len.')
