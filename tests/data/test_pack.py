"""Packing: no target is lost, none is predicted twice, segments stay whole."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl_pt.data import pack
from jaxrl_pt.errors import UserError

EOS, BOS = 0, 1
ENDS, NO_BEGIN = pack.Ends(BOS, EOS), pack.Ends(None, EOS)


def _document(number: int, length: int) -> np.ndarray:
  """Ids that say which document and which place they are from (eos is 0)."""
  return (number + 1) * 1000 + np.arange(length, dtype=np.int32)


def _pack(lengths: list[int], seq_len: int, ends: pack.Ends = ENDS) -> np.ndarray:
  documents = [_document(n, length) for n, length in enumerate(lengths)]
  rows = list(pack.pack(documents, ends, seq_len))
  return np.stack(rows) if rows else np.zeros((0, 3, seq_len), np.int32)


LENGTHS = st.lists(st.integers(0, 70), max_size=30)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 33), ends=st.sampled_from([ENDS, NO_BEGIN]))
def test_every_token_is_predicted_once(lengths: list[int], seq_len: int, ends: pack.Ends) -> None:
  """Without a token that begins documents, nothing predicts the first of each."""
  batch = pack.to_batch(_pack(lengths, seq_len, ends), np.arange(1))
  predicted = np.asarray(batch.targets)[np.asarray(batch.weights) > 0].tolist()
  unpredicted = int(ends.bos is None)
  expected = [t for n, length in enumerate(lengths) if length
              for t in [*_document(n, length)[unpredicted:].tolist(), EOS]]
  assert sorted(predicted) == sorted(expected)


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 33))
def test_the_beginning_is_the_input_before_each_first_token(lengths: list[int],
                                                            seq_len: int) -> None:
  """… and nowhere else: a piece of a document that was cut does not begin one."""
  rows = _pack(lengths, seq_len)
  begins = rows[:, 1][(rows[:, 0] == BOS) & (rows[:, 2] > 0)].tolist()
  assert sorted(begins) == [_document(n, 1)[0] for n, length in enumerate(lengths) if length]
  assert not (rows[:, 1] == BOS).any()


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 33))
def test_segments_are_runs_of_one_document(lengths: list[int], seq_len: int) -> None:
  """Slow definition: walk every row token by token."""
  rows = _pack(lengths, seq_len)
  batch = pack.to_batch(rows, np.arange(len(rows)))
  for row in range(len(rows)):
    tokens, targets, positions, segments, weights = (
        np.asarray(x)[row].tolist() for x in
        (batch.tokens, batch.targets, batch.positions, batch.segments, batch.weights))
    position, current = 0, 0
    for t in range(seq_len):
      if segments[t] == 0:
        assert (tokens[t], targets[t], positions[t], weights[t]) == (0, 0, 0, 0)
        assert not any(segments[t:])  # padding stands at the end
        break
      if segments[t] != current:
        assert segments[t] == current + 1
        position, current = 0, segments[t]
      elif t:
        assert tokens[t] == targets[t - 1]
      if tokens[t] == BOS:
        assert position == 0 and targets[t] % 1000 == 0
      else:
        assert targets[t] in (tokens[t] + 1, EOS)
      assert weights[t] == 1
      assert positions[t] == position
      position += 1


def test_a_long_document_continues_from_the_last_target() -> None:
  cut = pack.pieces(np.arange(2, 12), ENDS, 4)
  assert [p.shape[1] for p in cut] == [4, 4, 3]
  assert cut[0][0].tolist() == [BOS, 2, 3, 4]
  assert all(before[1, -1] == after[0, 0] for before, after in zip(cut, cut[1:]))
  assert cut[-1][1, -1] == EOS


def test_documents_that_fit_are_never_cut() -> None:
  lengths = [5, 7, 3, 8, 1, 2, 6, 4]
  rows = _pack(lengths, 8, NO_BEGIN)
  whole = [tuple(_document(n, length)) for n, length in enumerate(lengths)]
  found = [tuple(row[0][row[2] == s]) for row in rows for s in range(1, row[2].max() + 1)]
  assert sorted(found) == sorted(whole)
  assert len(rows) == 5  # 36 pairs: 8 | 5+3 | 7+1 | 6+2 | 4, one row above the bound of ⌈36/8⌉


def test_open_rows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(pack, '_MAX_OPEN_ROWS', 3)
  packer = pack.Packer(10)
  closed = [row for n in range(50)
            for row in packer.add(pack.pieces(_document(n, 6), NO_BEGIN, 10)[0])]
  rest = list(packer.flush())
  assert len(rest) == 3 and len(closed) + len(rest) == 50


def test_same_documents_same_rows() -> None:
  lengths = np.random.default_rng(0).integers(1, 40, 200).tolist()
  np.testing.assert_array_equal(_pack(lengths, 16), _pack(lengths, 16))
  filled = (_pack(lengths, 16)[:, 2] > 0).mean()
  assert filled > 0.97


def test_long_document_error() -> None:
  pack.pieces(np.arange(8), NO_BEGIN, 8, 'error')
  pack.pieces(np.arange(7), ENDS, 8, 'error')
  with pytest.raises(UserError, match='9 tokens, Data'):
    pack.pieces(np.arange(9), NO_BEGIN, 8, 'error')
  with pytest.raises(UserError, match='9 tokens with the one that begins it'):
    pack.pieces(np.arange(8), ENDS, 8, 'error')


def test_hold_out_is_a_uniform_hash_of_the_text() -> None:
  places = [pack.hold_out(f'document {n}') for n in range(4000)]
  assert all(0 <= p < 1 for p in places)
  assert abs(sum(p < 0.1 for p in places) / 4000 - 0.1) < 0.02  # 4 standard deviations
  assert pack.hold_out('é') == pack.hold_out('é'.encode())
