"""The metrics file has no gap and no repeat, whatever killed the run that wrote it."""

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
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import presets, transformer
from jaxrl_pt.types import Weighted


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
  writer._file.close()
  writer._file = open('/dev/full', 'w')
  with pytest.raises(UserError, match='cannot write .*No space left on device'):
    writer.write(1, {}, {})


def test_tensorboard_events_are_written_and_purged(tmp_path):
  write(tmp_path, 1, 4, tensorboard=True)
  write(tmp_path, 3, 5, tensorboard=True)
  files = sorted((tmp_path / 'tensorboard').iterdir())
  assert len(files) >= 1 and any(b'loss' in f.read_bytes() for f in files)


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

ROW = {'step': 12, 'loss': 3.21412, 'gap': 1.0002, 'grad_norm': 9.0, 'time/goodput': 0.981,
       'time/tokens_per_second': 9120.4}


def test_one_plain_line_a_step(tmp_path, capsys):
  write(tmp_path, 1, 3)
  assert capsys.readouterr().out.splitlines() == [
      'step  1/10  loss 1.0000', 'step  2/10  loss 0.5000', 'step  3/10  loss 0.3333']
  assert metrics.describe(ROW, 600) == (
      'step  12/600  loss 3.2141  gap 1.0002  9,120 tokens/s  goodput 98%')
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


@pytest.mark.parametrize('model', [presets.tiny(), presets.stories260k(),
                                   presets.bitnet_v2_400m(), presets.bitnet_2b4t()])
def test_matmul_parameters_are_the_model_s_matrices(model):
  specs = transformer.build(model).specs
  flat = jax.tree_util.tree_flatten_with_path(specs, is_leaf=params.is_spec)[0]
  matrices = sum(math.prod(s.shape) for path, s in flat
                 if len(s.shape) == (3 if 'layers' in jax.tree_util.keystr(path) else 2))
  lookup_only = 0 if model.tied_head else model.vocab_size * model.d_model
  assert metrics.matmul_parameters(model) == matrices - lookup_only


def test_flops_equal_the_compiler_s_count_of_the_forward_pass():
  """XLA counts every dot of the full (not causal) square of attention: C = T."""
  model = presets.tiny(vocab_size=512)
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
