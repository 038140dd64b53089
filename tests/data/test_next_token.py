"""Positions and prompts, written out for a small packed row."""

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import next_token as nt
from jaxrl_pt.models import transformer
from jaxrl_pt.types import Batch

EOT = 0


def pack(documents, length, example_id):
  """One row: inputs are the documents, targets the next token, end of text after the last."""
  fields = {k: np.zeros((1, length), np.int32) for k in (
      'tokens', 'targets', 'positions', 'segments')}
  weights = np.zeros((1, length), np.float32)
  at = 0
  for number, document in enumerate(documents, start=1):
    span = slice(at, at + len(document))
    fields['tokens'][0, span] = document
    fields['targets'][0, span] = document[1:] + [EOT]
    fields['positions'][0, span] = range(len(document))
    fields['segments'][0, span] = number
    weights[0, span] = 1
    at += len(document)
  return Batch(**fields, weights=weights, ids=np.array([example_id], np.int32))


def stack(*batches):
  return jax.tree.map(lambda *xs: np.concatenate(xs), *batches)


#            t:  0   1   2   3     4   5   6   7   8   9 = padding
ROW_A = pack([[11, 12, 13, 14], [21, 22, 23, 24, 25]], 10, example_id=7)
ROW_B = pack([[31, 32, 33, 34, 35, 36, 37, 38, 39, 40]], 10, example_id=2)
BOTH = stack(ROW_A, ROW_B)


def select(**options):
  return nt.select_positions(np.full((2, 10), 1.0), BOTH, min_entropy=0.5, **options)


def pairs(positions):
  return list(zip(positions.example.tolist(), positions.t.tolist()))


def test_entropy_is_that_of_the_16_likeliest_renormalised():
  config = cfg.Model(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
                     vocab_size=41)
  model = transformer.build(config)
  params = P.init(model.specs, jax.random.key(0))
  params = {**params, 'embed': params['embed'] * 40}
  got = jax.jit(lambda p, b: nt.position_entropy(model, p, b))(params, BOTH)
  hidden = jax.jit(model.apply)(params, BOTH.tokens, BOTH.positions, BOTH.segments)
  logits = np.asarray(hidden @ model.head(params), np.float64)
  top = np.sort(logits, -1)[..., -16:]
  q = np.exp(top) / np.exp(top).sum(-1, keepdims=True)
  np.testing.assert_allclose(got, -(q * np.log(q)).sum(-1), atol=1e-4)
  assert np.std(got) > 0.05
  assert np.max(got) <= np.log(16)


def test_selection():
  everything = select()
  assert pairs(everything) == [(7, t) for t in range(9)] + [(2, t) for t in range(10)]
  assert pairs(select(min_context=3)) == [(7, 2), (7, 3), (7, 6), (7, 7), (7, 8)] + [
      (2, t) for t in range(2, 10)]
  assert pairs(select(min_continuation=4)) == [(7, 0), (7, 4), (7, 5)] + [
      (2, t) for t in range(7)]
  assert pairs(select(min_context=10)) == [(2, 9)]
  assert pairs(select(min_context=11)) == []
  assert pairs(select(min_continuation=11)) == []
  has_bytes = np.arange(41) != EOT
  assert pairs(select(predictable=has_bytes)) == [
      (7, t) for t in (0, 1, 2, 4, 5, 6, 7)] + [(2, t) for t in range(9)]


def test_selection_by_entropy_keeps_the_threshold_itself():
  entropy = np.zeros((2, 10), np.float32)
  entropy[0, 9], entropy[0, 5], entropy[1, 3] = 3.0, 0.5, 0.75  # (0, 9) is padding
  chosen = nt.select_positions(entropy, BOTH, min_entropy=0.5)
  assert pairs(chosen) == [(7, 5), (2, 3)]
  np.testing.assert_array_equal(chosen.entropy, [0.5, 0.75])


def test_prompts_stay_inside_their_segment():
  rows = nt.Positions(np.array([7, 2, 7, 7]), np.array([5, 4, 3, 8], np.int32),
                      np.array([1, 2, 3, 4], np.float32))
  prompts = nt.build_prompts(BOTH, rows, prompt_len=3, num_continuation=4)
  np.testing.assert_array_equal(prompts.tokens, [[21, 22, 0], [33, 34, 35], [12, 13, 14],
                                                 [23, 24, 25]])
  np.testing.assert_array_equal(prompts.lengths, [2, 3, 3, 3])
  np.testing.assert_array_equal(prompts.extras['continuation'], [
      [23, 24, 25, EOT], [36, 37, 38, 39], [EOT, 0, 0, 0], [EOT, 0, 0, 0]])
  np.testing.assert_array_equal(prompts.extras['continuation_lengths'], [4, 4, 1, 1])
  np.testing.assert_array_equal(prompts.ids, [75, 24, 73, 78])
  np.testing.assert_array_equal(prompts.extras['entropy'], [1, 2, 3, 4])
  assert {str(x.dtype) for x in jax.tree.leaves(prompts)} == {'int32', 'float32'}


def test_prompts_equal_a_slow_definition_everywhere():
  rows = select()
  prompts = nt.build_prompts(BOTH, rows, prompt_len=4, num_continuation=3)
  documents = {(7, 0): [11, 12, 13, 14], (7, 4): [21, 22, 23, 24, 25],
               (2, 0): list(range(31, 41))}
  for r, (example, t) in enumerate(pairs(rows)):
    start = 4 if example == 7 and t >= 4 else 0
    document = documents[example, start] + [EOT]
    cut = t - start + 1
    length, count = prompts.lengths[r], prompts.extras['continuation_lengths'][r]
    assert prompts.tokens[r, :length].tolist() == document[max(0, cut - 4):cut]
    assert prompts.extras['continuation'][r, :count].tolist() == document[cut:cut + 3]
  assert len(set(prompts.ids.tolist())) == len(rows)


def test_ids_do_not_depend_on_which_examples_are_at_hand():
  rows = nt.Positions(np.array([2]), np.array([4], np.int32), np.ones(1, np.float32))
  alone = nt.build_prompts(ROW_B, rows, prompt_len=3, num_continuation=2)
  both = nt.build_prompts(BOTH, rows, prompt_len=3, num_continuation=2)
  jax.tree.map(np.testing.assert_array_equal, alone, both)
  with pytest.raises(ValueError, match='do not hold every example'):
    nt.build_prompts(ROW_A, rows, prompt_len=3, num_continuation=2)


def test_ids_of_a_large_data_set_wrap_without_an_error():
  example = 2**31 - 5
  batch = ROW_A.replace(ids=np.array([example], np.int32))
  rows = nt.Positions(np.array([example]), np.array([4], np.int32), np.ones(1, np.float32))
  prompts = nt.build_prompts(batch, rows, prompt_len=3, num_continuation=2)
  assert int(prompts.ids[0]) % 2**32 == (example * 10 + 4) % 2**32


def test_a_context_that_text_repeats_is_counted_once():
  # Rows 7 and 8 are equal documents; row 2 begins like them and goes on otherwise.
  rows = stack(pack([[11, 12, 13]], 4, 7), pack([[11, 12, 13]], 4, 8), pack([[11, 12, 99]], 4, 2))
  positions = nt.Positions(np.array([7, 7, 8, 8, 2, 2]), np.array([0, 2, 0, 2, 1, 2], np.int32),
                           np.ones(6, np.float32))
  prompts = nt.build_prompts(rows, positions, prompt_len=4, num_continuation=2)
  assert nt.distinct_rows(prompts).tolist() == [0, 1, 4, 5]
  # Padding is no token: a shorter prompt is another one.
  zero = nt.build_prompts(pack([[5, 0, 6]], 4, 1), nt.Positions(
      np.array([1, 1]), np.array([0, 1], np.int32), np.ones(2, np.float32)),
                          prompt_len=4, num_continuation=1)
  assert nt.distinct_rows(zero).tolist() == [0, 1]


def test_padding_rows_have_no_continuation():
  prompts = nt.build_prompts(BOTH, select().take(np.arange(3)), prompt_len=3, num_continuation=2)
  padded = nt.pad_prompts(prompts, 5)
  assert padded.tokens.shape == (5, 3)
  np.testing.assert_array_equal(padded.extras['continuation_lengths'], [2, 2, 2, 0, 0])
  np.testing.assert_array_equal(padded.lengths, [1, 2, 3, 1, 1])


def test_steps_go_through_the_table_once_an_epoch():
  rows = np.concatenate([nt.step_rows(10, 4, seed=3, step=s) for s in range(5)])
  assert sorted(rows[:10]) == list(range(10))
  assert sorted(rows[10:]) == list(range(10))
  assert rows[:10].tolist() != rows[10:].tolist()
  np.testing.assert_array_equal(nt.step_rows(10, 4, seed=3, step=2), rows[8:12])
  assert (nt.step_rows(10, 10, seed=4, step=0) != rows[:10]).any()
  # A batch larger than the table takes rows twice rather than fail.
  assert sorted(nt.step_rows(3, 6, seed=0, step=0)) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize('num_rows, num_prompts', [
    (5, 8), (8, 5), (10, 4), (7, 6), (7, 7), (6, 12), (5, 23), (100, 64), (1, 3), (2, 3)])
def test_a_step_repeats_no_row_while_others_are_left(num_rows, num_prompts):
  steps = [nt.step_rows(num_rows, num_prompts, 3, s) for s in range(40)]
  for rows in steps:
    for start in range(0, num_prompts, num_rows):
      part = rows[start:start + num_rows]
      assert len(set(part)) == len(part)
  # Every epoch has each row once all the same, and a step is what it is whatever came before.
  flat = np.concatenate(steps)
  for start in range(0, len(flat) - num_rows + 1, num_rows):
    assert sorted(flat[start:start + num_rows]) == list(range(num_rows))
  nt._order.cache_clear()
  for s in (31, 7, 38):
    np.testing.assert_array_equal(nt.step_rows(num_rows, num_prompts, 3, s), steps[s])


def test_table_is_scored_once_and_again_when_anything_changes(tmp_path):
  path, calls = tmp_path / 'sub' / 'positions.npz', []

  def score():
    calls.append(1)
    return select()

  def load(key):
    table = nt.load_or_score(path, key, score)
    assert pairs(table) == pairs(select())
    assert table.entropy.dtype == np.float32
    return len(calls)

  assert [load('a'), load('a'), load('b'), load('b'), load('a')] == [1, 1, 2, 2, 3]
  path.write_bytes(path.read_bytes()[:100])
  assert [load('a'), load('a')] == [4, 4]
  path.write_bytes(b'')
  assert load('a') == 5
  assert [p.name for p in path.parent.iterdir()] == ['positions.npz']


def test_key_names_weights_and_settings():
  params = {'w': np.ones((2, 2), np.float32)}
  key = nt.table_key(params, min_entropy=0.5, prompt_len=8)
  assert key == nt.table_key({'w': np.ones((2, 2), np.float32)}, prompt_len=8, min_entropy=0.5)
  assert key != nt.table_key(params, min_entropy=0.6, prompt_len=8)
  assert key != nt.table_key({'w': np.eye(2, dtype=np.float32)}, min_entropy=0.5, prompt_len=8)


def test_no_positions_at_all():
  table = nt.concatenate([])
  assert len(table) == 0
  assert len(nt.concatenate([select(), select()])) == 2 * len(select())


def shared_documents():
  """Two examples of three and one segments; every position is in the table but for a few."""
  segments = np.array([[1] * 5 + [2] * 4 + [3] * 3, [1] * 10 + [0] * 2], np.int32)
  tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
  batch = Batch(tokens, tokens + 1, np.zeros((2, 12), np.int32), segments,
                (segments > 0).astype(np.float32), np.array([7, 9], np.int32))
  rows = [(7, t) for t in (0, 2, 4, 5, 8, 11)] + [(9, t) for t in range(9)]
  table = nt.Positions(np.array([e for e, _ in rows]), np.array([t for _, t in rows]),
                               np.ones(len(rows), np.float32))
  return batch, table


def test_positions_of_a_document_are_found():
  batch, table = shared_documents()
  documents = nt.document_rows(batch, table, prompt_len=4, num_positions=2)
  found = [[(int(table.example[r]), int(table.t[r])) for r in d if r >= 0] for d in documents]
  # Position 4 of the first segment has five tokens of context; the third segment has one position.
  assert found == [[(7, 0), (7, 2)], [(7, 5), (7, 8)], [(9, 0), (9, 1), (9, 2), (9, 3)]]


def test_prompts_that_share_a_document_see_what_they_would_see_alone():
  batch, table = shared_documents()
  documents = nt.document_rows(batch, table, prompt_len=4, num_positions=2)
  rows = nt.step_documents(documents, 3, 2, seed=1, step=4)
  np.testing.assert_array_equal(rows, nt.step_documents(documents, 3, 2, seed=1, step=4))
  alone = nt.build_prompts(batch, table.take(rows), prompt_len=4, num_continuation=2)
  shared = nt.share_documents(alone, 2)
  assert shared.tokens.shape == (3, 4) and shared.lengths.shape == (6,)
  for n, length in enumerate(shared.lengths):
    np.testing.assert_array_equal(shared.tokens[n // 2][:length], alone.tokens[n][:length])
  every = {tuple(nt.step_documents(documents, 3, 2, 1, s)) for s in range(20)}
  assert len(every) > 1
