"""The order of a mixture's examples: shares, seeds and indices."""

import dataclasses
from fractions import Fraction
import json
from pathlib import Path
from typing import Any

import grain
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl_pt import config
from jaxrl_pt.data import build, loader, mixture, pack
from jaxrl_pt.data import sources as sources_of
from jaxrl_pt.errors import UserError


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7))
def test_counts_are_within_one_of_the_exact_shares_after_any_number(shares: list[int]):
  plan, total = mixture.interleaving(shares), sum(shares)
  counts = [0] * len(shares)
  for n in range(2 * total + 3):
    source, number = plan[n]
    assert number == counts[source]  # No example of a source is left out or comes twice.
    counts[source] += 1
    for count, share in zip(counts, shares, strict=True):
      assert abs(count - Fraction((n + 1) * share, total)) < 1


def test_many_sources_of_uneven_shares():
  shares = [1, 1, 1, 5, 100, 333, 9559]
  plan = mixture.interleaving(shares)
  counts_nS = np.cumsum(plan.source_W[:, None] == np.arange(len(shares)), axis=0)
  n = np.arange(1, 10_001)[:, None]
  assert np.abs(counts_nS - n * np.array(shares) / 10_000).max() < 1
  np.testing.assert_array_equal(counts_nS[-1], shares)


def test_the_order_is_a_function_of_the_index():
  order = mixture.order([5, 3, 40], [3, 1, 1], seed=7)
  whole = [order[n] for n in range(100)]
  assert [mixture.order([5, 3, 40], [3, 1, 1], seed=7)[n] for n in reversed(range(100))] == (
      whole[::-1])
  assert [mixture.order([5, 3, 40], [3, 1, 1], seed=8)[n] for n in range(100)] != whole
  first, second, third = ([n for n in whole if low <= n < high]
                          for low, high in ((0, 5), (5, 8), (8, 48)))
  assert (len(first), len(second), len(third)) == (60, 20, 20)
  for low in range(0, 60, 5):  # Each epoch of a source is a permutation of it.
    assert sorted(first[low:low + 5]) == [0, 1, 2, 3, 4]
  assert sorted(second[:3]) == [5, 6, 7] and len(set(third)) == 20
  assert len({tuple(first[low:low + 5]) for low in range(0, 60, 5)}) > 1


@pytest.mark.parametrize('shares', [[1], [1, 1], [99_999, 1]])
def test_few_sources(shares: list[int]):
  plan = mixture.interleaving(shares)
  np.testing.assert_array_equal(np.bincount(plan.source_W, minlength=len(shares)), shares)


# --- Prepared ---------------------------------------------------------------------


def write(folder: Path, name: str, texts: list[str]) -> config.Jsonl:
  path = folder / f'{name}.jsonl'
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  return config.Jsonl(str(path))


@pytest.fixture
def data(tmp_path: Path) -> config.Data:
  """Three sources whose texts are written with letters of their own."""
  sources = tuple(write(tmp_path, letter, [letter * (5 + i % 9) + f'{i}' for i in range(number)])
                  for letter, number in (('a', 60), ('b', 200), ('c', 90)))
  mixed = config.Mixture(('first', 'second', 'third'), sources, (0.6, 0.3, 0.1))
  return config.Data(mixed, config.Bytes(), seq_len=16, validation_fraction=0.2)


def letters(packed: loader.Packed, ids: range) -> set[str]:
  """The letters in the targets of some examples."""
  targets = packed.batch(ids).targets
  return {chr(x) for x in np.unique(targets) if ord('a') <= x <= ord('c')}


def test_each_source_has_rows_and_held_out_documents_of_its_own(data: config.Data,
                                                                tmp_path: Path):
  prepared = loader.prepare(data, tmp_path / 'data')
  for packed in (prepared.train, prepared.validation):
    ends = np.cumsum(packed.parts)
    assert ends[-1] == len(packed) and min(packed.parts) > 0
    for letter, end, number in zip('abc', ends, packed.parts, strict=True):
      assert letters(packed, range(end - number, end)) == {letter}
  text = json.loads((prepared.directory / 'manifest.json').read_text())
  assert text['train']['documents'] + text['validation']['documents'] == 350


def test_a_document_is_on_one_side_whichever_source_has_it(data: config.Data, tmp_path: Path):
  alone = loader.prepare(dataclasses.replace(data, source=data.source.sources[1]),
                         tmp_path / 'alone')
  mixed = loader.prepare(data, tmp_path / 'data')
  assert mixed.train.parts[1] == len(alone.train)
  first = mixed.train.parts[0]
  np.testing.assert_array_equal(mixed.train.batch(range(first, first + len(alone.train))).targets,
                                alone.train.batch(range(len(alone.train))).targets)
  # The prompt of a held-out demonstration is a document of another source.
  problems = config.Demonstrations(config.Arithmetic(60))
  held_out = next(key for _, key in sources_of.keyed_documents(problems)
                  if pack.hold_out(key) < 0.2)
  with_answer = next(text for text, key in sources_of.keyed_documents(problems) if key == held_out)
  assert pack.hold_out(with_answer) >= 0.2
  leaking = config.Mixture(('a', 'b'), (problems, write(tmp_path, 'leak', [
      with_answer, *'abcdefghijklmnopqrstuvwxyz'])), (1.0, 1.0))
  with pytest.raises(UserError, match='out of one of the sources of the mixture'):
    loader.prepare(dataclasses.replace(data, source=leaking), tmp_path / 'data')


def test_a_source_without_documents_on_a_side_is_named(data: config.Data, tmp_path: Path):
  for texts, what in ((['x'], 'second'), (['one'] * 3, 'second')):
    few = config.Mixture(('first', 'second'), (data.source.sources[0], write(tmp_path, 'x', texts)),
                         (1.0, 1.0))
    with pytest.raises(UserError, match=f"source '{what}' of the mixture"):
      loader.prepare(dataclasses.replace(data, source=few), tmp_path / 'data')


def test_names_and_weights_do_not_decide_the_examples(data: config.Data, tmp_path: Path):
  prepared = loader.prepare(data, tmp_path / 'data')
  other = dataclasses.replace(data.source, names=('x', 'y', 'z'), weights=(1, 1, 1))
  assert loader.prepare(dataclasses.replace(data, source=other),
                        tmp_path / 'data').directory == prepared.directory
  turned = dataclasses.replace(data.source, sources=data.source.sources[::-1])
  assert loader.prepare(dataclasses.replace(data, source=turned),
                        tmp_path / 'data').directory != prepared.directory


def ids_of(packed: loader.Packed, steps: int, first: int = 0, **settings: Any) -> np.ndarray:
  batches = loader.train_iterator(packed, **{'seed': 3, 'batch_size': 8, 'shares': (6, 3, 1),
                                             **settings})
  if first:
    batches.set_state({**batches.get_state(), 'step': first})
  found = np.stack([next(batches).ids for _ in range(steps)])
  batches.close()
  return found


def test_batches_hold_the_shares_whatever_hosts_workers_and_resumes(data: config.Data,
                                                                    tmp_path: Path):
  packed = loader.prepare(data, tmp_path / 'data').train
  whole = ids_of(packed, 40)
  source = np.searchsorted(np.cumsum(packed.parts), whole, side='right').reshape(-1)
  counts = np.cumsum(source[:, None] == np.arange(3), axis=0)
  exact = np.arange(1, 321)[:, None] * np.array([0.6, 0.3, 0.1])
  assert np.abs(counts - exact).max() < 1 and tuple(counts[-1]) == (192, 96, 32)
  np.testing.assert_array_equal(ids_of(packed, 40, rows=np.arange(3, 6)), whole[:, 3:6])
  np.testing.assert_array_equal(ids_of(packed, 27, first=13), whole[13:])
  np.testing.assert_array_equal(ids_of(packed, 12, num_workers=2), whole[:12])
  batches = loader.train_iterator(packed, seed=3, batch_size=8, shares=(6, 3, 1))
  with pytest.raises(UserError, match='shares'):
    batches.set_state({**batches.get_state(), 'shares': [1, 1, 1]})


def test_conversations_are_mixed_and_their_losses_weighted(tmp_path: Path):
  """Each source is packed for itself, and the assistant's tokens alone have a weight."""
  said = lambda user, assistant: {'messages': [{'role': 'user', 'content': user},
                                               {'role': 'assistant', 'content': assistant}]}
  for name, rows in (('chat', [said(f'AAA{i}', f'b{i}') for i in range(40)]),
                     ('half', [{'prompt': f'CCC{i}', 'completion': f'd{i}'} for i in range(40)])):
    (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  chat, half = (config.Conversations(str(tmp_path / f'{name}.jsonl')) for name in ('chat', 'half'))
  mixed = config.Mixture(
      ('chat', 'half', 'sums'),
      (chat, config.WeightedConversations((half,), (0.5,)),
       config.Demonstrations(config.Arithmetic(60))), (2, 1, 1))
  data = config.Data(mixed, config.Bytes(), 64, 0.2, long_documents='error')
  prepared = loader.prepare(data, tmp_path / 'data', build.Making('conversations'))
  packed, ends = prepared.train, np.cumsum(prepared.train.parts)
  assert min(packed.parts) > 0 and min(prepared.validation.parts) > 0
  for end, part, weight, learned in zip(ends, packed.parts, (1, 0.5, 1), 'bd#', strict=True):
    rows = packed.batch(range(end - part, end))
    assert set(np.unique(rows.weights)) == {0, weight}
    of_assistant = {chr(x) for x in rows.targets[rows.weights > 0] if x < 256}
    assert learned in of_assistant and not of_assistant & set('AC')
  ids = ids_of(packed, 16, shares=mixed.shares)
  counts = np.bincount(np.searchsorted(ends, ids.reshape(-1), side='right'))
  np.testing.assert_array_equal(counts, [64, 32, 32])


@pytest.mark.parametrize('number', [1, 2, 7])
def test_batches_of_one_row_have_grains_own_order_of_all_epochs(number: int):
  own = mixture.permuted(3, 3 + number, seed=5)
  grains = grain.MapDataset.range(3, 3 + number).shuffle(seed=5).repeat()
  assert [own[n] for n in range(40)] == [grains[n] for n in range(40)]
  for order in (own, mixture.order([1, number], [1, 2], seed=5)):
    rows = iter(order.batch(1).to_iter_dataset())
    assert [next(rows).tolist() for _ in range(20)] == [[order[n]] for n in range(20)]
