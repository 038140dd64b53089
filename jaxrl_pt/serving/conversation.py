"""Conversations at a terminal or a server: their prompts, and what is left out of one too long."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_pt.data.chat import ChatTemplate, prompt_ids
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError


class Call(NamedTuple):
  """A call of a tool by the assistant."""

  name: str
  arguments: str  # the text of a JSON object


def fit(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[dict[str, Any]],
        prompt_len: int, drawn: Mapping[int, Sequence[int]]) -> tuple[list[int], int]:
  """The prompt of as many of the newest turns as `prompt_len` tokens hold.

  System messages always stay. Of the other messages the oldest are left out first, and the first
  one that stays is the user's.

  Args:
    template, tokenizer: of the model.
    messages: the turns so far.
    prompt_len: most tokens of a prompt.
    drawn: as in `prompt_ids`.

  Returns:
    (token ids, number of messages left out).

  Raises:
    UserError: even the last message alone is too long, or the template refuses the messages.
  """
  system = [i for i, m in enumerate(messages) if m['role'] == 'system']
  turns = [i for i, m in enumerate(messages) if m['role'] != 'system']
  tokens: list[int] = []
  for start in (n for n, i in enumerate(turns) if messages[i]['role'] == 'user'):
    kept = sorted([*system, *turns[start:]])
    tokens = prompt_ids(template, tokenizer, [messages[i] for i in kept], drawn={
        n: drawn[i] for n, i in enumerate(kept) if i in drawn})
    if len(tokens) <= prompt_len:
      return tokens, start
  raise UserError(f'The message has {len(tokens)} tokens with its frame and the model takes '
                  f'{prompt_len}: shorten it or raise --prompt_len.')
