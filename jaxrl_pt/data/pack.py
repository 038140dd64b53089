"""Packs documents of token ids into rows of `seq_len` predicted tokens.

A document d_0 … d_{n-1} becomes the n + 1 pairs (input, target) = (bos, d_0), (d_0, d_1), …,
(d_{n-1}, eos), so every token is predicted exactly once, the first one from the token that
begins a document. For models without such a token the first pair is missing. A document
of more than `seq_len` pairs is cut into pieces; a piece's first input is the last
target of the piece before it, so no target is lost. Pieces are then placed
best-fit: into the fullest open row that still has room. A row of the file is
i32[3, T]: inputs, targets, segments (0 is padding); the rest follows from these. Where only
some targets are learned, a fourth array has their weights, as the bits of float32.
"""

import bisect
from collections.abc import Iterable, Iterator
import hashlib
from typing import Literal, NamedTuple

import numpy as np

from jaxrl_pt.errors import UserError
from jaxrl_pt.types import Batch

# At most so many rows wait for a piece that fits. More rows pad less and hold more memory.
_MAX_OPEN_ROWS = 1024


def hold_out(text: str | bytes) -> float:
  """A document's place in [0, 1), which follows from a hash of its text alone.

  The document is held out for validation if its place is below `validation_fraction`. So equal
  documents fall on the same side, and an added document moves no other one.
  """
  raw = text.encode() if isinstance(text, str) else text
  return int.from_bytes(hashlib.sha256(raw).digest()[:6], 'big') / 2**48


class Ends(NamedTuple):
  """The ids that stand before and after a document."""

  bos: int | None  # the input before the first token; None for models without one
  eos: int  # the target of the last token


def pieces(tokens_n: np.ndarray, ends: Ends, seq_len: int,
           long_documents: Literal['split', 'cut', 'error'] = 'split') -> list[np.ndarray]:
  """Cuts one document into pairs (input, target) of at most `seq_len`.

  Args:
    tokens_n: int[n] ids of one document, without beginning and end.
    ends: the ids before and after a document.
    seq_len: T, the most pairs of a piece.
    long_documents: what becomes of a document of more than T pairs: 'split' makes pieces of it,
      'cut' keeps the first piece, 'error' refuses it.

  Returns:
    i32[2, m] inputs and targets, m ≤ T, in order; none for an empty document.

  Raises:
    UserError: the document is too long and long_documents is 'error'.
  """
  if not len(tokens_n):
    return []
  begin = [] if ends.bos is None else [ends.bos]
  line = np.concatenate([begin, tokens_n, [ends.eos]]).astype(np.int32)
  pairs_2n = np.stack([line[:-1], line[1:]])
  n = pairs_2n.shape[1]
  if n > seq_len and long_documents == 'error':
    raise UserError(f'A document has {n} tokens{" with the one that begins it" if begin else ""}, '
                    f"Data.seq_len is {seq_len} and Data.long_documents is 'error': raise "
                    "seq_len, or set long_documents = 'split' or 'cut'.")
  end = seq_len if long_documents == 'cut' else n
  return [pairs_2n[:, low:low + seq_len] for low in range(0, min(n, end), seq_len)]


class Packer:
  """Best-fit packing of a stream in bounded memory; the same stream gives the same rows."""

  def __init__(self, seq_len: int) -> None:
    self._seq_len = seq_len
    self._room: list[tuple[int, int]] = []  # sorted (free slots, row number)
    self._open: dict[int, list[np.ndarray]] = {}  # The parts in each open row.
    self._num_rows = 0

  def add(self, *parts: np.ndarray) -> Iterator[np.ndarray]:
    """Places a piece in one row, and yields the rows i32[C + 1, T] that are closed by it.

    Args:
      *parts: i32[C, m] of each segment that the piece is made of: inputs, targets, and their
        weights as the bits of float32 if C is 3.
    """
    length = sum(part.shape[1] for part in parts)
    found = bisect.bisect_left(self._room, (length, -1))
    if found < len(self._room):
      room, row = self._room.pop(found)
    else:
      room, row = self._seq_len, self._num_rows
      self._num_rows += 1
      self._open[row] = []
    self._open[row] += parts
    if room > length:
      bisect.insort(self._room, (room - length, row))
    else:
      yield self._close(row)
    if len(self._room) > _MAX_OPEN_ROWS:
      yield self._close(self._room.pop(0)[1])

  def flush(self) -> Iterator[np.ndarray]:
    """Yields the rows that are still open."""
    for row in sorted(self._open):
      yield self._close(row)
    self._room = []

  def _close(self, row: int) -> np.ndarray:
    parts, low = self._open.pop(row), 0
    row_CT = np.zeros((parts[0].shape[0] + 1, self._seq_len), np.int32)
    for segment, part_Cm in enumerate(parts, 1):
      high = low + part_Cm.shape[1]
      row_CT[:2, low:high] = part_Cm[:2]
      row_CT[2, low:high] = segment
      row_CT[3:, low:high] = part_Cm[2:]
      low = high
    return row_CT


def num_targets(part_Cm: np.ndarray) -> int:
  """The number of targets of a part i32[C, m] that the loss counts."""
  return part_Cm.shape[1] if len(part_Cm) == 2 else int(np.count_nonzero(part_Cm[2]))


def pack(documents: Iterable[np.ndarray], ends: Ends, seq_len: int,
         long_documents: Literal['split', 'cut', 'error'] = 'split') -> Iterator[np.ndarray]:
  """Packs a stream of documents int[n] and yields rows i32[3, T]; `pieces` says what it refuses."""
  packer = Packer(seq_len)
  for tokens_n in documents:
    for piece_2m in pieces(tokens_n, ends, seq_len, long_documents):
      yield from packer.add(piece_2m)
  yield from packer.flush()


def to_batch(rows_BCT: np.ndarray, ids_B: np.ndarray) -> Batch:
  """Makes rows i32[B, C, T] and their example ids i32[B] a Batch of numpy arrays.

  positions[t] = t − (first t of its segment). The weights are the bits of the fourth array of a
  row; where a row has three, weights[t] = [segment ≠ 0].
  """
  segments_BT = np.ascontiguousarray(rows_BCT[:, 2])
  t_T = np.arange(segments_BT.shape[1], dtype=np.int32)
  starts_BT = np.zeros_like(segments_BT)
  starts_BT[:, 1:] = np.where(segments_BT[:, 1:] != segments_BT[:, :-1], t_T[1:], 0)
  first_BT = np.maximum.accumulate(starts_BT, axis=1)
  real_BT = segments_BT > 0
  weights_BT = real_BT.astype(np.float32)
  if rows_BCT.shape[1] > 3:
    weights_BT = np.ascontiguousarray(rows_BCT[:, 3]).view(np.float32)
  return Batch(
      tokens=np.ascontiguousarray(rows_BCT[:, 0]),  # type: ignore[arg-type]
      targets=np.ascontiguousarray(rows_BCT[:, 1]),  # type: ignore[arg-type]
      positions=np.where(real_BT, t_T - first_BT, 0).astype(np.int32),  # type: ignore[arg-type]
      segments=segments_BT,  # type: ignore[arg-type]
      weights=weights_BT,  # type: ignore[arg-type]
      ids=ids_B.astype(np.int32))  # type: ignore[arg-type]
