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
from jaxrl_pt.serving.text import CALLS

_CONTENT = '{content}'
# The engine takes four stop tokens, and end of text is one of them.
MOST_STOPS = 3


class Call(NamedTuple):
  """A call of a tool by the assistant."""

  name: str
  arguments: str  # the text of a JSON object


class Message(NamedTuple):
  """One turn of a conversation; a tool's turn is the result of a call."""

  role: Literal['system', 'user', 'assistant', 'tool']
  content: str
  calls: tuple[Call, ...] = ()  # those that end an assistant's turn


@dataclass(frozen=True)
class Template:
  """The prompt template of a conversation, in which `{content}` stands for what was said.

  system, user, assistant, tool: the texts of turns of these roles. The content of an assistant that
    has called tools ends with the calls, each between lines `<tool_call>` and `</tool_call>`.
  tools: what the first system message ends with where there are tools; `{content}` stands for
    their descriptions, one JSON object a line.
  opening: the text before the answer to come.
  stop: texts that end the answer, beside end of text.

  Special tokens that are written in the template are those tokens; in `{content}` they are text.
  """

  system: str = '{content}\n\n'
  user: str = 'User: {content}\n\n'
  assistant: str = 'Assistant: {content}\n\n'
  tool: str = 'Tool: <tool_response>\n{content}\n</tool_response>\n\n'
  tools: str = (
      '# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are '
      'provided with function signatures within <tools></tools> XML tags:\n<tools>\n{content}\n'
      '</tools>\n\nFor each function call, return a json object with function name and arguments '
      'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
      '"arguments": <args-json-object>}\n</tool_call>')
  opening: str = 'Assistant:'
  stop: tuple[str, ...] = ('\nUser:',)

  def __post_init__(self) -> None:
    for name in ('system', 'user', 'assistant', 'tool', 'tools', 'opening'):
      value = getattr(self, name)
      if not isinstance(value, str) or (name != 'opening' and _CONTENT not in value):
        raise UserError(f'Template.{name} = {value!r}: write a text with {_CONTENT} in it.')
    if (isinstance(self.stop, str) or len(self.stop) > MOST_STOPS
        or not all(isinstance(s, str) and s for s in self.stop)):
      raise UserError(f'Template.stop = {self.stop!r}: write a list of texts, at most '
                      f'{MOST_STOPS}.')
    object.__setattr__(self, 'stop', tuple(self.stop))

  def spans(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Span]:
    """The texts of the prompt that asks for the assistant's next turn.

    Args:
      messages: the turns so far.
      tools: the descriptions of the tools that may be called, as JSON.
    """
    turns = {'system': self.system, 'user': self.user, 'assistant': self.assistant,
             'tool': self.tool}
    offer = _filled(self.tools, [Span('\n'.join(tools), False)]) if tools else []
    spans = []
    if offer and not any(m.role == 'system' for m in messages):
      messages = [Message('system', ''), *messages]
    for message in messages:
      content = [Span(message.content, False)]
      if message.role == 'system' and offer:
        content += [Span('\n\n', True)] * bool(message.content) + offer
        offer = []
      for i, call in enumerate(message.calls):
        content += _call(call, '\n' if message.content or i else '')
      spans += _filled(turns[message.role], content)
    return [*spans, Span(self.opening, True)]

  def prompt(self, tokenizer: Tokenizer, messages: Sequence[Message],
             tools: Sequence[str] = ()) -> list[int]:
    """The prompt's tokens, with special tokens only where the template has them."""
    return begun(tokenizer, template_text.encode(tokenizer, self.spans(messages, tools)))

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


def _filled(turn: str, content: Sequence[Span]) -> list[Span]:
  """A text of the template with `content` in each of its places."""
  first, *others = turn.split(_CONTENT)
  spans = [Span(first, True)]
  for text in others:
    spans += [*content, Span(text, True)]
  return spans


def _call(call: Call, before: str) -> list[Span]:
  said = f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": {call.arguments}}}'
  return [Span(f'{before}{CALLS.start}\n', True), Span(said, False), Span(f'\n{CALLS.end}', True)]


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
