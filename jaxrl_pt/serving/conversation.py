"""Conversations as prompts: a template of plain text, which models without a chat format know too.
"""

from collections.abc import Sequence
import dataclasses
from dataclasses import dataclass
import json
from pathlib import Path
from typing import Literal, NamedTuple

from jaxrl_pt.data.tokenizer import Tokenizer, begun
from jaxrl_pt.errors import UserError

_CONTENT = '{content}'


class Message(NamedTuple):
  """One turn."""

  role: Literal['system', 'user', 'assistant']
  content: str


@dataclass(frozen=True)
class Template:
  """How turns become text; `{content}` stands for what was said.

  opening: what stands before the answer to come. stop: what ends it, beside end of text.
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
    if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
      raise UserError(f'Template.stop = {self.stop!r}: write a list of texts.')
    object.__setattr__(self, 'stop', tuple(self.stop))

  def text(self, messages: Sequence[Message]) -> str:
    """The prompt that asks for the assistant's next turn."""
    turns = {'system': self.system, 'user': self.user, 'assistant': self.assistant}
    return ''.join(turns[m.role].replace(_CONTENT, m.content) for m in messages) + self.opening


def read_template(path: Path) -> Template:
  """A JSON file with some of the fields of `Template`.

  Raises:
    UserError: no such file, not JSON, an unknown field.
  """
  try:
    fields = json.loads(path.read_bytes().decode('utf-8'))
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
  """The prompt of the newest turns that the model's prompt length takes.

  System messages always stay; of the others the oldest are left out first, and what is kept
  starts with a turn of the user.

  Returns:
    (token ids, number of messages left out).

  Raises:
    UserError: the last message alone is too long.
  """
  system = [m for m in messages if m.role == 'system']
  turns = [m for m in messages if m.role != 'system']
  tokens: list[int] = []
  for start in (i for i, m in enumerate(turns) if m.role == 'user'):
    tokens = begun(tokenizer, tokenizer.encode(template.text([*system, *turns[start:]])))
    if len(tokens) <= prompt_len:
      return tokens, start
  raise UserError(f'The message has {len(tokens)} tokens with its frame and the model takes '
                  f'{prompt_len}: shorten it or raise --prompt_len.')
