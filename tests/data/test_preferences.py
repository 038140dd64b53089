"""Pairs: both completions of a prompt stand in one row, side by side."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data import build, generated, loader
from jaxrl_pt.errors import UserError

MAKING = build.Making('preferences')
BOS = EOS = 256


def prepare(directory: Path, rows: list[dict], seq_len: int = 64, fraction: float = 0.0,
            long: str = 'cut') -> loader.Prepared:
  path = directory / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  data = cfg.Data(cfg.Preferences(str(path)), cfg.Bytes(), seq_len, fraction, '', long)
  return loader.prepare(data, directory, MAKING)


def drawn(size: int = 30) -> list[dict]:
  return [{'prompt': f'{i % 10}?', 'chosen': f'yes{"!" * (i % 5)}', 'rejected': f'no {i}'}
          for i in range(size)]


def segments_of(packed: loader.Packed) -> list[list[tuple[bytes, bytes]]]:
  """(all inputs, learned targets) of the segments of each row; each ends with its end as input."""
  batch = packed.batch(range(len(packed)))
  rows = []
  for row in range(len(packed)):
    rows.append([])
    for segment in range(1, int(batch.segments[row].max()) + 1):
      here = np.asarray(batch.segments[row]) == segment
      inputs, targets, weights = (np.asarray(x[row])[here] for x in (
          batch.tokens, batch.targets, batch.weights))
      assert inputs[0] == BOS and inputs[-1] == EOS and weights[-1] == 0
      learned = targets[weights > 0]
      assert learned[-1] == EOS and (inputs[1:] == targets[:-1]).all()
      rows[-1].append((bytes(map(int, inputs[1:-1])), bytes(map(int, learned[:-1]))))
  return rows


def test_pairs_stay_together_and_only_completions_are_learned(tmp_path: Path):
  rows = drawn()
  packed = prepare(tmp_path, rows).train
  found = segments_of(packed)
  assert packed.num_segments == max(map(len, found)) and len(found) < len(rows)
  pairs = [tuple(segments[i:i + 2]) for segments in found for i in range(0, len(segments), 2)]
  expected = [tuple(((r['prompt'] + r[name]).encode(), r[name].encode())
                    for name in ('chosen', 'rejected')) for r in rows]
  assert sorted(pairs) == sorted(expected)


def test_pairs_with_one_prompt_are_held_out_together(tmp_path: Path):
  prepared = prepare(tmp_path, drawn(200), fraction=0.3)
  sides = [{text[:2] for row in segments_of(split) for text, _ in row}
           for split in (prepared.train, prepared.validation)]
  assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_long_pairs_are_cut_in_half_rows_or_refused(tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]):
  rows = [{'prompt': 'p', 'chosen': 'c' * 40, 'rejected': 'r'},
          {'prompt': 'p' * 20, 'chosen': 'c' * 9, 'rejected': 'r'}]
  batch = prepare(tmp_path, rows, seq_len=32).train.batch([0])
  assert 'of 2 preferences, 2 were longer than Data.seq_len = 32 and cut; 1 have been left out' in (
      capsys.readouterr().out)
  segments, weights = np.asarray(batch.segments[0]), np.asarray(batch.weights[0])
  assert [int((segments == i).sum()) for i in (1, 2)] == [16, 4]
  assert [int(weights[segments == i].sum()) for i in (1, 2)] == [15, 2]
  with pytest.raises(UserError, match='pairs.jsonl:1 has 47 tokens in both completions'):
    prepare(tmp_path, rows, seq_len=32, long='error')


@pytest.mark.parametrize('row, expected', [
    ({'prompt': 'a', 'chosen': 'b'}, "has no field 'rejected', only 'prompt', 'chosen'"),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': ['c']}, "'rejected' is no text"),
    ({'prompt': 'a', 'chosen': ' ', 'rejected': 'c'}, "'chosen' is empty"),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}, "'chosen' and 'rejected' are the same"),
    ({'prompt': 'a', 'chosen': 'b\ud800', 'rejected': 'b'}, 'half of a surrogate pair'),
])
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: dict, expected: str):
  with pytest.raises(UserError) as caught:
    prepare(tmp_path, [*drawn(2), row])
  assert 'pairs.jsonl:3' in str(caught.value) and expected in str(caught.value)


def test_generated_preferences_are_right_against_a_slip():
  for source in (cfg.Arithmetic(200, num_terms=4), cfg.RedundantChecks(200)):
    for i in range(source.size):
      prompt, chosen, rejected = generated.preference(source, i)
      found = generated.problem(source, i)
      assert prompt == found.prompt and chosen.rpartition('#')[2] == found.answer
      assert rejected != chosen
      if isinstance(source, cfg.Arithmetic):
        assert rejected.rpartition('#')[2] != found.answer


def test_the_last_turn_of_messages_is_learned(tmp_path: Path):
  said = lambda role, text: {'role': role, 'content': text}
  before = [said('user', 'a?'), said('assistant', 'b'), said('user', 'c?')]
  rows = [{'prompt': before, 'chosen': [said('assistant', 'd')],
           'rejected': [said('assistant', 'e')]},
          {'prompt': 'a?', 'chosen': [*before, said('assistant', 'd')],
           'rejected': [*before, said('assistant', 'e')]}]
  text = 'User: a?\n\nAssistant: b\0\n\nUser: c?\n\nAssistant: '
  for row in rows:
    batch = prepare(tmp_path, [row], seq_len=128).train.batch([0])
    for segment, answer in ((1, 'd'), (2, 'e')):
      here = np.asarray(batch.segments[0]) == segment
      targets, weights = (np.asarray(x[0])[here] for x in (batch.targets, batch.weights))
      assert bytes(t % 256 for t in targets[:-1]) == (text + answer).encode() + b'\0'
      assert bytes(t % 256 for t in targets[weights > 0]) == f' {answer}'.encode() + b'\0'
  with pytest.raises(UserError, match='differ before their last turns'):
    prepare(tmp_path, [{'chosen': [*before, said('assistant', 'd')],
                        'rejected': [said('user', 'c?'), said('assistant', 'e')]}])
