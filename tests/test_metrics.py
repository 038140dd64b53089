"""The metrics file has no gap and no repeat, whatever killed the run that wrote it."""

import contextlib
import dataclasses
import io
import json
import math
import os
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import pytest
from rich.console import Console as RichConsole

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics, params
from jaxrl_pt.errors import Unwritable, UserError
from jaxrl_pt.models import transformer
from jaxrl_pt.types import Weighted
from tests.shapes import STORIES260K, shape


def write(workdir: Path, first: int, last: int, resume: int | None = None, **options) -> None:
  options = {'num_steps': 10, 'tensorboard': False, **options}
  with metrics.Writer(workdir, resume_step=first - 1 if resume is None else resume,
                      **options) as writer:
    for step in range(first, last + 1):
      writer.write(step, {'loss': 1 / step}, {'seconds': 0.5 + first})


def test_resume_repeats_and_loses_no_row(tmp_path):
  write(tmp_path, 1, 7)
  write(tmp_path, 6, 10)  # resumed from the checkpoint of step 5
  rows = metrics.read_rows(tmp_path / 'metrics.jsonl')
  assert [r['step'] for r in rows] == list(range(1, 11))
  assert [metrics.deterministic(r) for r in rows] == [
      {'step': s, 'loss': 1 / s} for s in range(1, 11)]
  assert [r['time/seconds'] for r in rows] == [1.5] * 5 + [6.5] * 5


def test_a_new_run_starts_a_new_file(tmp_path):
  write(tmp_path, 1, 4)
  write(tmp_path, 1, 2)
  assert [r['step'] for r in metrics.read_rows(tmp_path / 'metrics.jsonl')] == [1, 2]


@pytest.mark.parametrize('cut', range(1, 40, 3))
def test_a_row_torn_anywhere_is_dropped(tmp_path, cut):
  write(tmp_path, 1, 5)
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes()[:-cut])
  whole = path.read_bytes().count(b'\n')
  assert [r['step'] for r in metrics.read_rows(path)] == list(range(1, whole + 1))
  write(tmp_path, whole + 1, 6)
  assert [r['step'] for r in metrics.read_rows(path)] == [1, 2, 3, 4, 5, 6]


def test_a_row_is_on_disk_before_the_next_step(tmp_path):
  with metrics.Writer(tmp_path, resume_step=0, num_steps=3, tensorboard=False) as writer:
    for step in (1, 2, 3):
      writer.write(step, {}, {})
      assert len(metrics.read_rows(tmp_path / 'metrics.jsonl')) == step


def test_json_is_strict_and_non_finite_numbers_come_back(tmp_path):
  values = {'a': math.nan, 'b': math.inf, 'c': -math.inf, 'd': 0.1}
  with metrics.Writer(tmp_path, resume_step=0, num_steps=1, tensorboard=False) as writer:
    writer.write(1, values, {})
  path = tmp_path / 'metrics.jsonl'

  def refuse(name: str) -> float:
    raise AssertionError(f'{name} is not JSON')
  raw = json.loads(path.read_text(), parse_constant=refuse)
  assert raw == {'step': 1, 'a': 'NaN', 'b': 'Infinity', 'c': '-Infinity', 'd': 0.1}
  row = metrics.read_rows(path)[0]
  assert math.isnan(row['a']) and row['b'] == math.inf and row['c'] == -math.inf


def test_floats_survive_exactly(tmp_path):
  write_values = [float(jnp.float32(x)) for x in (0.1, 1e-30, 3.14159, 1e30)]
  with metrics.Writer(tmp_path, resume_step=0, num_steps=4, tensorboard=False) as writer:
    for i, x in enumerate(write_values):
      writer.write(i + 1, {'x': x}, {})
  assert [r['x'] for r in metrics.read_rows(tmp_path / 'metrics.jsonl')] == write_values


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(UserError, match='line 2 of .*metrics.jsonl is not a row'):
    metrics.read_rows(path)
  with pytest.raises(UserError, match='cannot read .*absent.jsonl'):
    metrics.read_rows(tmp_path / 'absent.jsonl')


def test_unwritable_and_full(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write .*file/metrics.jsonl'):
    metrics.Writer(tmp_path / 'file', resume_step=0, num_steps=1, tensorboard=False)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='this system has no /dev/full')
def test_a_full_disk_is_one_sentence(tmp_path):
  writer = metrics.Writer(tmp_path, resume_step=0, num_steps=1, tensorboard=False)
  os.close(writer._file)
  writer._file = os.open('/dev/full', os.O_WRONLY)
  with pytest.raises(UserError, match='cannot write .*No space left on device'):
    writer.write(1, {}, {})


def test_tensorboard_events_are_written_and_purged(tmp_path):
  write(tmp_path, 1, 4, tensorboard=True)
  write(tmp_path, 3, 5, tensorboard=True)
  files = sorted((tmp_path / 'tensorboard').iterdir())
  assert len(files) >= 1 and any(b'loss' in f.read_bytes() for f in files)


# --- What a resume finds -------------------------------------------------------------------


def rows_file(workdir: Path, steps) -> Path:
  path = workdir / 'metrics.jsonl'
  path.write_text(''.join(f'{{"step": {step}}}\n' for step in steps))
  return path


@pytest.mark.parametrize('steps, said', [
    ([1, 2, 4, 5], 'row 3 should be step 3, but is step 4'),
    ([1, 2, 3], 'row 4 should be step 4, but is the end of the file'),
    ([], 'row 1 should be step 1, but is the end of the file'),
    ([1, 2, 2, 3, 4, 5], 'row 3 should be step 3, but is step 2'),
    ([1, 3, 2, 4, 5], 'row 2 should be step 2, but is step 3'),
    ([1, 2, 3, 4, 5, 3], 'row 6 should be the end of the file, but is step 3'),
    ([0, 1, 2, 3, 5], 'row 5 should be step 4, but is step 5'),
    ([-1, 1, 2, 3, 4, 5], 'row 1 should be step 1, but is step -1')])
def test_rows_before_a_checkpoint_must_all_be_there_once_in_order(tmp_path, steps, said):
  path = rows_file(tmp_path, steps)
  before = path.read_bytes()
  with pytest.raises(UserError) as error:
    write(tmp_path, 6, 6)
  assert said in str(error.value) and '--allow_changes metrics.jsonl' in str(error.value)
  assert path.read_bytes() == before
  write(tmp_path, 6, 6, incomplete=True)
  left = [row['step'] for row in metrics.read_rows(path)]
  assert left == sorted({step for step in steps if step <= 5} | {6})


@pytest.mark.parametrize('steps', [[1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
def test_whole_rows_are_taken(tmp_path, steps):
  write_from = 6
  path = rows_file(tmp_path, steps)
  write(tmp_path, write_from, 6)
  assert [row['step'] for row in metrics.read_rows(path)] == [s for s in steps if s < 6] + [6]


@pytest.mark.parametrize('line', [
    'null', '[]', '[{"step": 2}]', '3', '"step"', '{}', '{"step": null}', '{"step": true}',
    '{"step": 1.5}', '{"step": "2"}', '{"step": 2, "loss": null}', '{"step": 2, "loss": [1]}',
    '{"step": 2, "loss": "0.5"}', '{"step": 2, "loss": {}}', '[' * 100_000,
    '{"step": ' + '9' * 5000 + '}', '\x00' * 20, '\udcff'])
def test_whatever_is_no_row_is_named_with_its_line(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n' + line.encode(errors='surrogateescape') + b'\n')
  with pytest.raises(UserError, match='line 2 of .*metrics.jsonl is not a row'):
    write(tmp_path, 2, 3)


# --- Files that go away --------------------------------------------------------------------


def test_a_deleted_file_stops_the_run_and_is_put_back(tmp_path):
  with metrics.Writer(tmp_path, resume_step=0, num_steps=9, tensorboard=False) as writer:
    writer.write(1, {'loss': 0.5}, {})
    (tmp_path / 'metrics.jsonl').unlink()
    with pytest.raises(Unwritable, match='deleted or renamed while .* put back'):
      writer.write(2, {'loss': 0.25}, {})
  assert metrics.read_rows(tmp_path / 'metrics.jsonl') == [
      {'step': 1, 'loss': 0.5}, {'step': 2, 'loss': 0.25}]


def test_a_file_in_the_place_of_ours_stops_the_run(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with metrics.Writer(tmp_path, resume_step=0, num_steps=9, tensorboard=False) as writer:
    writer.write(1, {}, {})
    path.unlink()
    path.write_text('{"step": 1}\n')
    with pytest.raises(Unwritable, match='another file has taken its place'):
      writer.write(2, {}, {})
  assert path.read_text() == '{"step": 1}\n'


def test_a_work_directory_that_goes_away_stops_the_run_and_stays_away(tmp_path):
  work = tmp_path / 'work'
  work.mkdir()
  with metrics.Writer(work, resume_step=0, num_steps=9, tensorboard=True) as writer:
    writer.write(1, {}, {})
    work.rename(tmp_path / 'elsewhere')
    with pytest.raises(Unwritable, match='the work directory .*work was deleted or renamed'):
      writer.write(2, {}, {})
  assert not work.exists()


def test_rows_are_synced_on_request(tmp_path, monkeypatch):
  synced = []
  with metrics.Writer(tmp_path, resume_step=0, num_steps=9, tensorboard=False) as writer:
    writer.write(1, {}, {})
    monkeypatch.setattr(os, 'fsync', lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    writer.sync()
  assert synced == [(tmp_path / 'metrics.jsonl').stat().st_ino]


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='this system has no /dev/full')
def test_event_files_and_standard_output_on_a_full_disk(tmp_path, monkeypatch):
  with metrics.Writer(tmp_path, resume_step=0, num_steps=9, tensorboard=True) as writer:
    full = open('/dev/full', 'w')
    with monkeypatch.context() as patched:
      patched.setattr(metrics.sys, 'stdout', full)
      with pytest.raises(Unwritable, match='cannot write standard output .No space left'):
        writer.write(1, {}, {})
    with contextlib.suppress(OSError):  # What it could not write, it cannot close.
      full.close()
    writer._events._file.close()
    writer._events._file = open('/dev/full', 'wb', buffering=0)
    with pytest.raises(Unwritable, match='cannot write .*tfevents.*No space left on device'):
      writer.write(2, {'loss': 1.0}, {})


def test_events_are_read_back_by_tensorboard_s_own_format(tmp_path):
  """Each record is framed with its length and checksums; a purge comes before the scalars."""
  from tensorboardX.proto import event_pb2
  from tensorboardX.record_writer import masked_crc32c
  write(tmp_path, 4, 5, tensorboard=True, incomplete=True)
  (path,) = (tmp_path / 'tensorboard').iterdir()
  data, events = path.read_bytes(), []
  while data:
    size = int.from_bytes(data[:8], 'little')
    assert int.from_bytes(data[8:12], 'little') == masked_crc32c(data[:8])
    record, data = data[12:12 + size], data[12 + size:]
    assert int.from_bytes(data[:4], 'little') == masked_crc32c(record)
    events.append(event_pb2.Event.FromString(record))
    data = data[4:]
  assert events[0].file_version == 'brain.Event:2'
  assert (events[1].step, events[1].session_log.status) == (4, event_pb2.SessionLog.START)
  scalars = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events[2:]]
  assert scalars == [(step, {'loss': pytest.approx(1 / step), 'time/seconds': 4.5})
                     for step in (4, 5)]


# --- Values -------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5, width=32), st.booleans()), min_size=1, max_size=12))
def test_host_values_divide_once(pairs):
  x = jnp.array([p[0] for p in pairs])
  mask = jnp.array([p[1] for p in pairs])
  kept = [p[0] for p in pairs if p[1]]
  value = metrics.host_values({'x': Weighted.of(x, mask)})['x']
  assert value == pytest.approx(sum(kept) / len(kept) if kept else 0.0, abs=1e-5)
  assert isinstance(value, float)


def test_host_values_keep_nan():
  assert math.isnan(metrics.host_values({'x': Weighted.single(jnp.nan)})['x'])


# --- Console --------------------------------------------------------------------------------

ROW = {'step': 12, 'loss': 3.21412, 'mismatch': 1.0002, 'grad_norm': 9.0, 'time/goodput': 0.981,
       'time/tokens_per_second': 9120.4}


def test_one_plain_line_a_step(tmp_path, capsys):
  write(tmp_path, 1, 3)
  assert capsys.readouterr().out.splitlines() == [
      'step  1/10  loss 1.0000', 'step  2/10  loss 0.5000', 'step  3/10  loss 0.3333']
  assert metrics.describe(ROW, 600) == (
      'step  12/600  loss 3.2141  mismatch 1.0002  9,120 tokens/s  goodput 98%')
  pairs = {'step': 9, 'accuracy': 0.8, 'validation/loss': 0.6, 'validation/margin': 0.25}
  assert metrics.describe(pairs, 9) == (
      'step 9/9  accuracy 0.800  validation 0.6000  held-out margin 0.250')
  write(tmp_path, 4, 10, log_every=4)
  assert [line[:10] for line in capsys.readouterr().out.splitlines()] == [
      'step  4/10', 'step  8/10', 'step 10/10']


def test_a_terminal_gets_a_bar_with_the_time_left():
  out = io.StringIO()
  terminal = RichConsole(file=out, force_terminal=True, width=100, _environ={})
  console = metrics.Console(0, 20, terminal)
  for step in range(1, 13):
    console.step({**ROW, 'step': step}, shown=True)
  console.close()
  text = out.getvalue()
  assert 'step 12/20  loss 3.2141' in text and 'left' in text and '%' in text


# --- FLOPs ----------------------------------------------------------------------------------


@pytest.mark.parametrize('model', [shape('tiny'), STORIES260K, shape('bitnet_v2_400m'),
                                   shape('bitnet_2b4t')])
def test_matmul_parameters_are_the_model_s_matrices(model):
  specs = transformer.build(model).specs
  flat = jax.tree_util.tree_flatten_with_path(specs, is_leaf=params.is_spec)[0]
  matrices = sum(math.prod(s.shape) for path, s in flat
                 if len(s.shape) == (3 if 'layers' in jax.tree_util.keystr(path) else 2))
  lookup_only = 0 if model.tied_head else model.vocab_size * model.d_model
  assert metrics.matmul_parameters(model) == matrices - lookup_only


def test_flops_equal_the_compiler_s_count_of_the_forward_pass():
  """XLA counts every dot of the full (not causal) square of attention: C = T."""
  model = dataclasses.replace(shape('tiny'), vocab_size=512)
  T = 64
  built = transformer.build(model, cfg.Compute(unroll=0))
  weights = params.abstract(built.specs)
  tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)

  def forward(p, tokens_BT):
    hidden_BTD = built.apply(p, tokens_BT, jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))
    return hidden_BTD @ p['embed'].T
  counted = jax.jit(forward).lower(weights, tokens).cost_analysis()['flops'] / T
  stated = metrics.flops_per_token(model, T, backward=False)
  assert stated <= counted <= 1.12 * stated  # the rest: norms, softmax, RoPE
  assert metrics.flops_per_token(model, T) == 3 * stated


def test_mfu_only_where_the_peak_is_known():
  assert metrics.peak_flops('TPU v5 lite') == 197e12
  assert metrics.peak_flops('cpu') is None
  assert metrics.mfu(1e9, jax.devices('cpu')) is None
