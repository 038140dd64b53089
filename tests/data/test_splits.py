"""Splits that share nothing: the counting helper, and every place that puts two sides together."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt.data import build, loader, next_token, problems, splits
from jaxrl_pt.environments import next_token as next_token_environment
from jaxrl_pt.environments import problems as problems_environment
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import sft

ROOT = Path(__file__).parents[2]
SUMS = cfg.Arithmetic(size=3000, num_terms=2, num_digits=1, noise=0.5)  # of 100 sums


# --- Counting -----------------------------------------------------------------------


def test_what_is_apart_is_counted_by_distinct_held_out_items():
  found = splits.refuse_overlap(['a', 'b', 'b'], iter(['c', 'd', 'c']), 'letters')
  assert (found.num_training, found.num_held_out) == (3, 2)
  assert str(found) == ('letters: none of the 2 distinct held-out ones is among the 3 trained on')


def test_an_overlap_is_refused_with_its_size_and_an_example():
  with pytest.raises(UserError, match=r"2 of the 4 distinct held-out letters \(50%\) are trained "
                                      r"on too, such as 'b': sort them out\."):
    splits.refuse_overlap(iter('abcc'), ['c', 'b', 'x', 'y', 'c'], 'letters', 'sort them out.')
  with pytest.raises(UserError, match=r"such as 'x{59}…: leave"):
    splits.refuse_overlap(['x' * 100], ['x' * 100], 'texts')


# --- Documents ----------------------------------------------------------------------


def _files(tmp_path: Path, train: list[str], valid: list[str]) -> cfg.Data:
  for name, texts in (('train', train), ('valid', valid)):
    (tmp_path / f'{name}.txt').write_text(''.join(f'# {text}\n' for text in texts))
  return cfg.Data(cfg.TextFiles(str(tmp_path / 'train.txt'), '^# '), cfg.Bytes(), 32,
                  validation_glob=str(tmp_path / 'valid.txt'))


def test_validation_files_that_repeat_a_training_document_are_refused(tmp_path):
  data = _files(tmp_path, ['one', 'two', 'three'], ['four', 'two'])
  with pytest.raises(UserError, match=r"1 of the 2 distinct held-out documents \(50%\).*'# two'.*"
                                      'Data.validation_glob'):
    loader.prepare(data, tmp_path / 'data')
  assert not list((tmp_path / 'data').glob('*/manifest.json'))
  apart = _files(tmp_path, ['one', 'two', 'three'], ['four', 'five'])
  assert len(loader.prepare(apart, tmp_path / 'data').validation) > 0


def _prompts_of(packed: loader.Packed) -> set[bytes]:
  """What stands before '=' in the documents of a split of bytes."""
  batch = packed.batch(np.arange(len(packed)))
  found = set()
  for tokens, targets, positions, segments in zip(batch.tokens, batch.targets, batch.positions,
                                                  batch.segments, strict=True):
    for number in range(1, int(np.max(segments)) + 1):
      here = segments == number
      first = [t for t in np.asarray(tokens)[here][:1] if t < 256]
      text = bytes(int(t) for t in (*first, *np.asarray(targets)[here]) if t < 256)
      if np.asarray(positions)[here][0] == 0:
        found.add(text.partition(b'=')[0] + b'=')
  return found


def test_demonstrations_are_split_by_their_prompts(tmp_path):
  data = cfg.Data(cfg.Demonstrations(SUMS), cfg.Bytes(), 64, validation_fraction=0.3)
  prepared = loader.prepare(data, tmp_path)
  train, validation = _prompts_of(prepared.train), _prompts_of(prepared.validation)
  assert len(train | validation) == 100 and len(validation) > 15
  assert not train & validation
  asked = cfg.Problems(SUMS, held_out=0.3)
  assert validation == {p.encode() for p in problems.prompts(asked, held_out=True)}
  assert train == {p.encode() for p in problems.prompts(asked, held_out=False)}


# --- RPT's positions ----------------------------------------------------------------


def test_held_out_positions_are_of_documents_that_training_never_saw(tmp_path):
  # Documents of one corpus that come several times, and share no beginning with another.
  rng = np.random.default_rng(0)
  texts = [f'{i:04d} ' + ' '.join(map(str, rng.integers(0, 100, 12))) for i in range(80)] * 3
  (tmp_path / 'text').write_text(''.join(f'# {text}\n' for text in rng.permutation(texts)))
  data = cfg.Data(cfg.TextFiles(str(tmp_path / 'text'), '^# '), cfg.Bytes(), 64,
                  validation_fraction=0.3)
  prepared = loader.prepare(data, tmp_path / 'data')
  contexts = {}
  for name, packed in (('train', prepared.train), ('validation', prepared.validation)):
    batch = packed.batch(np.arange(len(packed)))
    # The first pieces of documents, whose contexts hold the document's number.
    positions = next_token.select_positions(np.ones(batch.tokens.shape, np.float32), batch,
                                            min_entropy=0.5, min_context=12)
    prompts = next_token.build_prompts(batch, positions, prompt_len=64, num_continuation=1)
    contexts[name] = {bytes(int(t) for t in row[:n] if t < 256)
                      for row, n in zip(prompts.tokens, prompts.lengths, strict=True)}
  contexts = {name: {text for text in found if text.startswith(b'# ')}
              for name, found in contexts.items()}
  assert len(contexts['validation']) > 100
  assert splits.refuse_overlap(contexts['train'], contexts['validation'], 'contexts')


# --- A run and the policy that it starts from ---------------------------------------


def _check(run: cfg.Run, start: cfg.Run) -> None:
  """As the jobs of both objectives do."""
  if isinstance(run.objective, cfg.RL):
    problems_environment.check_held_out(run.objective.problems, start)
  elif isinstance(run.objective, cfg.Supervised):
    sft.check_held_out(run.data, start.data)
  else:
    next_token_environment.check_held_out(run.data, start.data, run.objective.start_from)


def _run(data: cfg.Data, objective) -> cfg.Run:
  model = cfg.Model(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
                    vocab_size=264)
  batch_size = 0 if isinstance(objective, cfg.RL) else 4  # RL has no use for it.
  return cfg.Run(seed=0, model=model, data=data, objective=objective,
                 optimizer=cfg.AdamW(cfg.ConstantRate(1e-3)), train=cfg.Train(1, batch_size))


def _start(fraction: float, source=SUMS) -> cfg.Run:
  return _run(cfg.Data(cfg.Demonstrations(source), cfg.Bytes(), 64, validation_fraction=fraction),
              cfg.NextToken())


def _rl(held_out: float, source=SUMS) -> cfg.Run:
  rollouts = cfg.Rollouts(num_prompts=2, group_size=2, prompt_len=8, response_tokens=8)
  return _run(_start(0.02).data, cfg.RL('start', cfg.Problems(source, held_out=held_out),
                                        cfg.AnswerMatch(), rollouts=rollouts,
                                        algorithm=cfg.Algorithm()))


def test_problems_that_the_start_policy_read_are_refused():
  with pytest.raises(UserError, match=r'distinct held-out prompts \(\d+%\) are trained on too, '
                                      r"such as '\d\+\d=': hold out as much there as here, by "
                                      r'Data.validation_fraction = Problems.held_out = 0.3'):
    _check(_rl(0.3), _start(0.1))
  # Other problems of the same kind are problems all the same.
  with pytest.raises(UserError, match='distinct held-out prompts'):
    _check(_rl(0.3, dataclasses.replace(SUMS, seed=1)), _start(0.1))
  _check(_rl(0.3), _start(0.3))
  _check(_rl(0.2), _start(0.3))
  # Sums of four terms are none of two.
  _check(_rl(0.3, dataclasses.replace(SUMS, size=50, num_terms=4)), _start(0.0))


@pytest.mark.parametrize('source', [
    cfg.WeightedConversations((cfg.Demonstrations(SUMS),), (1.0,)), cfg.SlipPreferences(SUMS)])
def test_prompts_of_supervised_stages_are_compared_too(source):
  examples = cfg.SFT('a') if isinstance(source, cfg.WeightedConversations) else cfg.DPO('a')
  run = lambda fraction: _run(cfg.Data(source, cfg.PolicyTokenizer(), 64, fraction,
                                       long_documents='cut'), examples)
  with pytest.raises(UserError, match='distinct held-out prompts'):
    _check(_rl(0.3), run(0.2))
  _check(_rl(0.2), run(0.3))
  with pytest.raises(UserError, match='distinct held-out prompts.*hold out no more here'):
    _check(run(0.3), _start(0.2))
  _check(run(0.2), _start(0.2))


def test_problems_of_an_earlier_reinforcement_are_refused():
  with pytest.raises(UserError, match='its Problems.held_out = Problems.held_out = 0.3'):
    _check(_rl(0.3), dataclasses.replace(_rl(0.1), data=_start(0.3).data))
  _check(_rl(0.3), dataclasses.replace(_rl(0.3), data=_start(0.3).data))


def test_documents_that_the_start_policy_read_are_refused(tmp_path, capsys):
  rollouts = cfg.Rollouts(num_prompts=2, group_size=2, prompt_len=8, response_tokens=1)
  method = cfg.RPT('start', rollouts=rollouts, algorithm=cfg.Algorithm())
  (tmp_path / 'text').write_text(''.join(f'# document {i}\n' for i in range(200)))
  data = cfg.Data(cfg.TextFiles(str(tmp_path / 'text'), '^# '), cfg.Bytes(), 32,
                  validation_fraction=0.1)
  more = dataclasses.replace(data, validation_fraction=0.3)
  check = lambda ours, theirs: _check(_run(ours, method), _run(theirs, cfg.NextToken()))
  check(data, data)
  check(data, more)
  check(dataclasses.replace(data, seq_len=64), data)
  with pytest.raises(UserError, match=r'distinct held-out documents.*split Data as the policy in '
                                      r'start did'):
    check(more, data)
  gone = dataclasses.replace(data, source=cfg.TextFiles(str(tmp_path / 'gone')))
  check(more, gone)
  assert 'Not checked' in capsys.readouterr().out


def _fewer(value: Any) -> Any:
  """The settings, with at most 6,000 of each source's problems, which are always its first."""
  if isinstance(value, tuple):
    return tuple(map(_fewer, value))
  if not dataclasses.is_dataclass(value):
    return value
  fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
  return type(value)(**{name: min(old, 6000) if name == 'size' else _fewer(old)
                        for name, old in fields.items()})


@functools.cache  # Most runs share their problems.
def _counted(data: cfg.Data, asked: cfg.Problems) -> splits.Apart:
  """By counting, not by the settings."""
  return splits.refuse_overlap(build.split_keys(data, held_out=False),
                               problems.prompts(asked, held_out=True), 'prompts')


@pytest.mark.parametrize('path', sorted(p.name for p in (ROOT / 'gin/run').glob('*_tiny.gin')))
def test_shipped_runs_measure_what_their_start_policy_never_read(path, monkeypatch):
  monkeypatch.chdir(ROOT)
  run, _ = gin_bindings.load([f'gin/run/{path}'], [])
  if 'start_from' not in run.objective.policy_fields or not run.objective.start_from:
    return
  start, _ = gin_bindings.load([f'gin/run/{Path(run.objective.start_from).name}.gin'], [])
  _check(run, start)
  if isinstance(run.objective, cfg.RL) and not isinstance(run.objective.problems.source,
                                                          cfg.ReasoningGym):
    # An episode of several turns says more than one answer, and takes as much longer.
    least = 50 if isinstance(run.objective.verifier, cfg.Interactive) else 150
    assert _counted(_fewer(start.data), _fewer(run.objective.problems)).num_held_out > least
