"""Pairs of a chosen and a rejected completion of one prompt, packed together into rows.

A row of a JSON-lines file has `prompt`, `chosen` and `rejected`, all of them texts; or `chosen` and
`rejected` are lists of messages, which go on after those of `prompt` if that is a list too, and
else are whole conversations. Of messages the assistant's last turn is learned.

A pair becomes two neighbouring segments of one row, each with the prompt before its completion.
Each segment ends with its end as an input, whose target has no weight: it is where a reward model
reads the score.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxrl_pt import config
from jaxrl_pt.data import chat, conversations, generated, sources
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError

_EXPECTED = '{"prompt": "…", "chosen": "…", "rejected": "…"}'


class Row(NamedTuple):
  """A pair of conversations that differ in what the assistant says last."""

  chosen: conversations.Row
  rejected: conversations.Row

  @property
  def key(self) -> str:
    """What both were asked. Pairs of one key stand on one side of a split."""
    return self.chosen.key

  @property
  def num_bytes(self) -> int:
    return self.chosen.num_bytes + self.rejected.num_bytes


def rows(source: config.Source) -> Iterator[Row]:
  """Yields each pair of a source, always in the same order.

  Raises:
    UserError: a row is no pair; the message names its file and line.
  """
  match source:
    case config.SlipPreferences() | config.ResultPreferences():
      for pair in generated.pairs(source):
        yield Row(*(conversations.Row(pair.place, pair.query, pair.query, text)
                    for text in (pair.better, pair.worse)))
    case config.Preferences(glob=pattern):
      for place, row in sources.json_rows(pattern):
        yield of_row(place, row)
    case _:
      raise UserError(f'{source} holds no preferences: set Data.source to @cfg.Preferences().')


def pairs(source: config.PairSource) -> Iterator[generated.Pair]:
  """Yields each pair of a source as texts, always in the same order.

  Raises:
    UserError: as `rows`; or both texts are the same but for space round them.
  """
  if isinstance(source, config.Preferences):
    return map(as_texts, rows(source))
  return generated.pairs(source)


def as_texts(row: Row) -> generated.Pair:
  """A pair as texts; the query of a conversation of several turns has their roles in it.

  Raises:
    UserError: both texts are the same but for space round them, or one is no text.
  """
  place, last = row.chosen.place, []
  for side in row:
    said = side.messages[-1]['content'] if side.messages else side.completion
    if not (said or '').strip():
      raise UserError(f'{place}: one of the responses has no text, so that there is nothing to '
                      'judge: drop the row.')
    last.append(said)
  if last[0].strip() == last[1].strip():
    raise UserError(f"{place}: 'chosen' and 'rejected' are the same text, so that neither is "
                    'better: drop the row.')
  asked = row.chosen.messages[:-1]
  query = row.chosen.prompt
  if len(asked) == 1:
    query = asked[0]['content'] or ''
  elif asked:
    query = '\n\n'.join(f'{turn["role"]}: {turn["content"] or ""}' for turn in asked)
  return generated.Pair(place, query, *last)


def of_row(place: str, row: dict[str, Any]) -> Row:
  """A pair of a JSON object.

  Raises:
    UserError: it is none; the message begins with the place.
  """
  names = 'chosen', 'rejected'
  if isinstance(row.get('chosen'), list) and isinstance(row.get('rejected'), list):
    prompt = row.get('prompt')
    before = prompt if isinstance(prompt, list) else []
    pair = Row(*(conversations.of_messages([*before, *row[name]], row.get('tools') or (), place,
                                           only_last=True) for name in names))
    if pair.chosen.messages[:-1] != pair.rejected.messages[:-1]:
      raise UserError(f"{place}: 'chosen' and 'rejected' differ before their last turns, so that "
                      'they do not answer the same: drop the row.')
  else:
    pair = Row(*(conversations.of_fields(row, place, name, _EXPECTED) for name in names))
  if pair.chosen == pair.rejected:
    raise UserError(f"{place}: 'chosen' and 'rejected' are the same, so that nothing is preferred: "
                    'drop the row.')
  return pair


def parts(row: Row, tokenizer: Tokenizer, template: chat.ChatTemplate) -> tuple[np.ndarray, ...]:
  """i32[3, m] of both segments."""
  return tuple(_part(each, tokenizer, template) for each in row)


def within(whole: tuple[np.ndarray, ...], row: Row, data: config.Data) -> tuple[np.ndarray, ...]:
  """Both segments, each cut to half of Data.seq_len if together they are longer.

  Raises:
    UserError: they are longer, and Data.long_documents is 'error'.
  """
  length = sum(part.shape[1] for part in whole)
  if length <= data.seq_len:
    return whole
  if data.long_documents == 'error':
    raise UserError(f'{row.chosen.place} has {length} tokens in both completions with their '
                    f"prompts, Data.seq_len is {data.seq_len} and Data.long_documents is 'error': "
                    "raise seq_len, drop the row, or set long_documents = 'cut'.")
  return tuple(part[:, :data.seq_len // 2] for part in whole)


def _part(row: conversations.Row, tokenizer: Tokenizer, template: chat.ChatTemplate
          ) -> np.ndarray:
  ids, learned = conversations.encode(row, tokenizer, template)
  part_3m = conversations.pairs(ids, learned)
  return np.concatenate([part_3m, np.asarray([[ids[-1]], [0], [0]], np.int32)], 1)
