"""Conversations from which a policy learns the assistant's tokens alone.

A row of a JSON-lines file has `messages`, a list of {"role", "content"} with any number of turns
and perhaps `tools`, or `prompt` and `completion`.

Messages are written by a chat template (`data.chat`), up to the assistant's last turn. The loss
counts what the assistant writes in each of its turns, and the token that ends the turn. A prompt
and its completion are encoded apart, as they are when the completion is sampled, and joined as ids:
a beginning token if the tokenizer has one, the prompt, the completion, the end of text. The loss
counts the completion and the end:

    ids      bos p_1 … p_n c_1 … c_m eos
    learned   0  0  …  0   1  …  1   1
"""

from collections.abc import Iterator
import decimal
import json
from typing import Any, NamedTuple

import numpy as np

from jaxrl_pt import config
from jaxrl_pt.data import chat, chat_messages, hybrid_examples, sources, template_text
from jaxrl_pt.data.template_text import Span
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError

_EXPECTED = '{"messages": […]} or {"prompt": "…", "completion": "…"}'


class Row(NamedTuple):
  """One conversation.

  place: 'file:line', for messages.
  key: what the conversation was asked first. Conversations of one key stand on one side of a split.
  prompt, completion: both empty where there are messages.
  messages, tools: as `chat.encode_conversation` takes them; empty where there is a prompt.
  only_last: whether the assistant's last turn alone is learned.
  marked: the completion in pieces, where some of them are tags of the operator's; else ().
  """

  place: str
  key: str
  prompt: str = ''
  completion: str = ''
  messages: tuple[Any, ...] = ()
  tools: tuple[Any, ...] = ()
  only_last: bool = False
  marked: tuple[Span, ...] = ()

  @property
  def text(self) -> str:
    """What was said, for a tokenizer to be trained on."""
    said = [message['content'] or '' for message in self.messages]
    return self.prompt + self.completion + '\n'.join(said)

  @property
  def num_bytes(self) -> int:
    return len(self.text.encode())


def rows(source: config.Source) -> Iterator[tuple[Row, float]]:
  """Yields each conversation of a source with the weight of its loss, always in the same order.

  Raises:
    UserError: a row is no conversation; the message names its file and line.
  """
  match source:
    case config.WeightedConversations(sources=parts, weights=weights):
      for part, weight in zip(parts, weights, strict=True):
        for row, _ in rows(part):
          yield row, weight
    case config.Demonstrations(source=problems):
      for number, shown in enumerate(sources.demonstrations(problems)):
        place = f'demonstration {number} of {problems}'
        yield Row(place, shown.key, shown.prompt, shown.response), 1.0
    case config.HybridConversations():
      for example in hybrid_examples.examples(source):
        completion = ''.join(span.text for span in example.completion)
        yield Row(example.place, example.prompt, example.prompt, completion,
                  marked=example.completion), 1.0
    case config.Conversations(glob=pattern):
      for place, found in sources.json_rows(pattern):
        yield of_row(found, place), 1.0
    case _:
      raise UserError(f'{source} holds no conversations: set Data.source to @cfg.Conversations().')


def of_row(row: dict[str, Any], place: str) -> Row:
  """The conversation of a JSON object.

  Raises:
    UserError: it holds none.
  """
  if 'messages' not in row:
    return of_fields(row, place, 'completion', _EXPECTED)
  return of_messages(row['messages'], row.get('tools') or (), place)


def of_messages(messages: Any, tools: Any, place: str, *, only_last: bool = False) -> Row:
  """The conversation of a list of messages, of which the last turn of the assistant ends it.

  Raises:
    UserError: a message is malformed, or the assistant says nothing.
  """
  try:
    turns = chat_messages.checked(_plain(messages))
    offered = chat_messages.check_tools(_plain(tools))
  except UserError as error:
    raise UserError(f'{place}: {error}') from error
  except RecursionError as error:
    raise UserError(f'{place}: messages or tools are nested too deeply: drop the row.') from error
  answers = [turn for turn in turns if turn['role'] == 'assistant']
  if not any((turn['content'] or '').strip() or turn.get('tool_calls') for turn in answers):
    raise UserError(f'{place}: the assistant says nothing in messages, so that nothing is learned '
                    'from it: drop the row.')
  before = turns[:turns.index(answers[0])]
  asked = [turn['content'] for turn in before if turn['role'] == 'user'][:1]
  key = asked[0] if asked else json.dumps(before, ensure_ascii=False, sort_keys=True)
  return Row(place, key, messages=tuple(turns), tools=tuple(offered), only_last=only_last)


def _plain(value: Any) -> Any:
  """A value of JSON whose numbers are floats, as templates write them."""
  match value:
    case decimal.Decimal():
      return float(value)
    case list() | tuple():
      return [_plain(each) for each in value]
    case dict():
      return {name: _plain(each) for name, each in value.items()}
    case _:
      return value


def of_fields(row: dict[str, Any], place: str, field: str, expected: str) -> Row:
  """The conversation in a prompt and a completion of a JSON object.

  Args:
    row: the object.
    place: 'file:line', for messages.
    field: the name of the completion.
    expected: what a row looks like, for messages.

  Raises:
    UserError: there are no such fields, they hold no text, or the completion is empty.
  """
  prompt, completion = (_text_of(row, name, place, expected) for name in ('prompt', field))
  if not completion.strip():
    raise UserError(f'{place}: {field!r} is empty, so that nothing is learned from it: drop the '
                    'row.')
  return Row(place, prompt, prompt, completion)


def _text_of(row: dict[str, Any], name: str, place: str, expected: str) -> str:
  if name not in row:
    there = ', '.join(map(repr, row)) or 'none'
    raise UserError(f'{place} has no field {name!r}, only {there}: write {expected}.')
  value = row[name]
  if not isinstance(value, str):
    raise UserError(f'{place}: {name!r} is no text: write {expected}.')
  if not sources.is_unicode(value):
    raise UserError(f'{place} holds half of a surrogate pair (\\ud800–\\udfff) in {name!r}: '
                    'that is not text; mend or drop the row.')
  return value


# --- Tokens -----------------------------------------------------------------------


def encode(row: Row, tokenizer: Tokenizer, template: chat.ChatTemplate
           ) -> tuple[np.ndarray, np.ndarray]:
  """The ids i32[n] of a conversation, and bool[n] which of them are learned.

  Raises:
    UserError: the template refuses the messages; it names the row.
  """
  if row.messages:
    try:
      found = chat.encode_conversation(template, tokenizer, row.messages, row.tools,
                                       only_last=row.only_last)
    except UserError as error:
      raise UserError(f'{row.place}: {error}') from error
    return np.asarray(found.tokens, np.int32), np.asarray(found.is_written, bool)
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  asked = [*begin, *tokenizer.encode(row.prompt)]
  completion = (template_text.encode(tokenizer, row.marked) if row.marked
                else tokenizer.encode(row.completion))
  answer = [*completion, tokenizer.eos_id]
  learned_n = np.arange(len(asked) + len(answer)) >= len(asked)
  return np.asarray([*asked, *answer], np.int32), learned_n


def pairs(ids_n: np.ndarray, learned_n: np.ndarray, weight: float = 1.0) -> np.ndarray:
  """i32[3, n − 1]: inputs, targets, and the float32 weights of the targets by their bits.

  Args:
    ids_n: int[n] ids of a conversation.
    learned_n: bool[n], which of them are learned.
    weight: of the learned ones; the others have 0.
  """
  weights_m = learned_n[1:].astype(np.float32) * np.float32(weight)
  return np.stack([ids_n[:-1], ids_n[1:], weights_m.view(np.int32)]).astype(np.int32)


def within(pairs_3m: np.ndarray, place: str, data: config.Data) -> np.ndarray:
  """The first Data.seq_len pairs.

  Raises:
    UserError: there are more, and Data.long_documents is 'error'.
  """
  if pairs_3m.shape[1] > data.seq_len and data.long_documents == 'error':
    raise UserError(f'{place} has {pairs_3m.shape[1] + 1} tokens, Data.seq_len is {data.seq_len} '
                    "and Data.long_documents is 'error': raise seq_len, drop the row, or set "
                    "long_documents = 'cut'.")
  return pairs_3m[:, :data.seq_len]
