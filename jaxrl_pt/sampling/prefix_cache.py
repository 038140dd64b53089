"""The host's view of the documents that the engine keeps: which one a new prompt begins like.

Every prompt but its last token is a document, and so is every whole response to a lone sample. A
prompt that begins like a kept document shares its pages; one that is a document already needs no
forward pass at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxrl_pt.sampling.admission import ABSENT, FILLING
from jaxrl_pt.sampling.requests import NO_DOCUMENT


class Found(NamedTuple):
  """Where the beginning of a prompt lies."""

  document: int
  parent: int  # a document that it begins like, or NO_DOCUMENT
  shared: int  # tokens that it has in common with the parent
  hit: int  # tokens of it that were kept when it was asked for


@dataclass
class _Row:
  tokens: np.ndarray  # i32[length]; empty while a response that becomes this document is drawn
  users: int  # requests that have not ended and name this row
  used: int  # when it was last named


class PrefixCache:
  """D rows of documents. Final."""

  def __init__(self, num_rows: int, length: int) -> None:
    """Documents of at most `length` tokens."""
    self.tokens = np.zeros((num_rows, length), np.int32)
    self.lengths = np.zeros(num_rows, np.int32)
    self.parents = np.full(num_rows, NO_DOCUMENT, np.int32)
    self.shared = np.zeros(num_rows, np.int32)
    self.content = np.zeros(num_rows, np.int32)
    self.asked = np.zeros(num_rows, np.int32)
    self._rows: dict[int, _Row] = {}
    self._state = np.zeros(num_rows, np.int32)  # as the device last reported it
    self._time = 0

  def find(self, tokens: Sequence[int], num_requests: int) -> Found:
    """The document `tokens` for `num_requests` requests, which is made if it is not there yet.

    A longer document that begins with all of `tokens` is its parent and does not take its place,
    because the requests would then keep all of the longer one's pages until they have begun.

    Raises:
      BlockingIOError: every row is in use.
    """
    wanted = np.asarray(tokens, np.int32)
    parent, shared = NO_DOCUMENT, 0
    for row, note in self._rows.items():
      num = _in_common(note.tokens, wanted)
      if num and num == len(wanted) == len(note.tokens):
        self._name(row, num_requests)
        return Found(row, NO_DOCUMENT, 0, num)
      if num > shared:
        parent, shared = row, num
    row = self._new(wanted, num_requests)
    self.parents[row] = parent if parent in self._rows else NO_DOCUMENT
    self.shared[row] = shared
    return Found(row, int(self.parents[row]), shared, shared)

  def reserve(self) -> int:
    """A row for the sequence of a response that is to be drawn; `fill` says what it became.

    Returns:
      The row, or NO_DOCUMENT if all are in use.
    """
    try:
      row = self._new(np.zeros(0, np.int32), 0)
    except BlockingIOError:
      return NO_DOCUMENT
    self._rows[row].users = 1  # The response; no request begins with this row yet.
    return row

  def fill(self, row: int, tokens: Sequence[int]) -> None:
    """Says which tokens of a reserved row are cached now that its response has ended."""
    kept = np.asarray(tokens[:self.tokens.shape[1]], np.int32)
    self.tokens[row, :len(kept)], self.lengths[row] = kept, len(kept)
    self._rows[row].tokens = kept
    self.done(row)

  def done(self, row: int) -> None:
    """Counts a request that named the row and has ended."""
    self._rows[row].users -= 1

  def report(self, state: np.ndarray) -> None:
    """Takes over what the device says of its documents, and forgets those that it gave up."""
    self._state = state
    for row in [r for r, note in self._rows.items() if not note.users and state[r] == ABSENT]:
      del self._rows[row]

  def clear(self) -> None:
    """Forgets all documents, since the parameters that computed them have changed."""
    for row in list(self._rows):
      del self._rows[row]
      self.content[row] += 1

  def num_kept(self) -> int:
    """Documents that nobody uses now."""
    return sum(not note.users for note in self._rows.values())

  def _name(self, row: int, num_requests: int) -> None:
    self._time += 1
    self._rows[row].users += num_requests
    self._rows[row].used = self._time
    self.asked[row] += num_requests

  def _new(self, tokens: np.ndarray, num_requests: int) -> int:
    row = self._free_row()
    self._rows[row] = _Row(tokens, 0, 0)
    self.tokens[row, :len(tokens)], self.lengths[row] = tokens, len(tokens)
    self.parents[row], self.shared[row] = NO_DOCUMENT, 0
    self.content[row] += 1
    self._name(row, num_requests)
    return row

  def _free_row(self) -> int:
    for row in range(len(self.lengths)):
      if row not in self._rows and self._state[row] != FILLING:
        return row
    parents = {int(self.parents[r]) for r, note in self._rows.items() if note.users}
    unused = [(note.used, row) for row, note in self._rows.items()
              if not note.users and row not in parents and self._state[row] != FILLING]
    if not unused:
      raise BlockingIOError('every document is in use')
    row = min(unused)[1]
    del self._rows[row]
    return row


def _in_common(a: np.ndarray, b: np.ndarray) -> int:
  """How many tokens two sequences begin with in common."""
  num = min(len(a), len(b))
  differs = np.flatnonzero(a[:num] != b[:num])
  return int(differs[0]) if differs.size else num
