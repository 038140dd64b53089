"""`jaxrl-pt preflight` on runs that fit and on one that does not."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import main
from jaxrl_pt.tpu import child, chips, roofline, search
from jaxrl_pt.tpu import compile as compiling
from tests.golden.regenerate import REQUIRED

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                                  reason='libtpu is not installed: make libtpu')
# The shipped tiny runs unroll their layers, for a CPU; here they are compiled once.
SCANNED = ['--gin_bindings', 'cfg.Compute.unroll = 1']
TINY = ['preflight', '--gin_file', 'gin/run/pretrain_tiny.gin', '--topology', 'v5e:1x1', *SCANNED]


@needs_libtpu
def test_a_tiny_run_fits_with_its_kernels(capsys):
  assert main.main([*TINY, '--json', '--gin_bindings', 'cfg.NextToken.int4_from = 1.0']) == 0
  result = json.loads(capsys.readouterr().out)
  [row] = result['programs']
  assert result['fits'] and row['fits'] and row['num_devices'] == 1
  # Parameters and both moments, in float32.
  assert row['hbm']['arguments'] == pytest.approx(3 * 4 * 0.9e6, rel=0.3)
  # 4 layers of 7 BitLinear. W_o's input of 128 is rotated by the kernel; W_down's of
  # 384 = 12 · 32 has no factor of 64 or 128 and is left to XLA.
  assert sum(k['times'] for n, k in row['kernels'].items() if 'ternary_matmul' in n) == 4 * 7
  assert sum(k['times'] for n, k in row['kernels'].items() if 'hadamard' in n) == 4
  assert row['collectives'] == []
  assert row['static_prediction']['seconds'] > 0


@needs_libtpu
@pytest.mark.parametrize('topology', [
    pytest.param('v4:2x2x1', marks=pytest.mark.slow),
    pytest.param('v5p:2x2x1', marks=pytest.mark.slow),
    pytest.param('tpu7x:2x2x1', marks=pytest.mark.slow)])
def test_other_generations_compile_too(topology, capsys):
  code = main.main(['preflight', '--gin_file', 'gin/run/pretrain_tiny.gin', '--topology', topology,
                    '--json', *SCANNED, '--gin_bindings', 'cfg.NextToken.int4_from = 1.0'])
  [row] = json.loads(capsys.readouterr().out)['programs']
  assert code == 0 and row['fits']
  # 2-bit integers are missing on v4: its products are XLA's.
  kernels = ' '.join(row['kernels'])
  assert 'hadamard_quantize' in kernels
  assert ('ternary_matmul' in kernels) == (not topology.startswith('v4'))


@pytest.mark.slow
@needs_libtpu
def test_several_slices_say_what_travels_between_them(capsys):
  several = [*TINY, '--slices', '2', '--gin_bindings', 'cfg.Mesh.data = 2', '--gin_bindings',
             'cfg.NextToken.int4_from = 1.0']
  assert main.main([*several, '--json']) == 0
  [row] = json.loads(capsys.readouterr().out)['programs']
  assert row['fits'] and row['num_devices'] == row['num_slices'] == 2
  # Each slice holds all parameters, so each sends at least every gradient once, in float32.
  assert row['bytes_between_slices'] >= 4 * 0.85e6
  assert '2 slices of v5e:1x1 (2 devices): fits' in compiling.text(row)
  assert 'to other slices' in compiling.text(row)
  assert main.main([*TINY, '--slices', '3', '--no_search', '--gin_bindings',
                    'cfg.Mesh.data = 1', '--gin_bindings', 'cfg.Mesh.tensor = 3']) == 2
  assert 'cannot span 3 slices' in capsys.readouterr().err


@pytest.mark.slow
@needs_libtpu
def test_rpt_compiles_as_one_program(capsys):
  code = main.main(['preflight', '--gin_file', 'gin/run/rpt_tiny.gin', '--topology', 'v6e:1x1',
                    '--json', *SCANNED])
  [row] = json.loads(capsys.readouterr().out)['programs']
  assert code == 0 and row['fits'] and 'sampler' in row['program']


@needs_libtpu
def test_what_does_not_fit_is_an_answer(capsys):
  code = main.main([*TINY, '--no_search', '--gin_bindings', 'cfg.Model.num_layers = 4096',
                    '--gin_bindings', 'cfg.Model.d_ff = 8192'])
  out = capsys.readouterr().out
  assert code == 1
  assert 'DOES NOT FIT' in out and 'GiB' in out and 'Traceback' not in out


@needs_libtpu
@pytest.mark.parametrize('change, message', [
    (['--topology', 'v5e:3x5'], 'choose another slice shape'),
    (['--topology', 'v9:2x2'], 'is no TPU topology'),
    (['--topology', 'v5e:2x2', '--gin_bindings', 'cfg.Mesh.fsdp = 3'], 'fsdp = 0')])
def test_mistakes_are_one_sentence(change, message, capsys):
  assert main.main([*TINY, *change]) == 2
  [*_, last] = capsys.readouterr().err.strip().splitlines()
  assert message in last


@pytest.mark.slow
@needs_libtpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize('adapter, fits', [
    ((), True), (('cfg.Model.adapter = @cfg.NoAdapter()', "cfg.Model.param_dtype = 'float32'"),
                 False)], ids=['LoRA', 'full'])
def test_adapters_fit_a_slice_that_full_fine_tuning_does_not(adapter, fits, capsys):
  bindings = [flag for binding in (*REQUIRED['opo_lora_7b'], *adapter)
              for flag in ('--gin_bindings', binding)]
  code = main.main(['preflight', '--gin_file', 'gin/run/opo_lora_7b.gin', '--topology', 'v5e:4x4',
                    '--no_search', '--json', *bindings])
  rows = json.loads(capsys.readouterr().out)['programs']
  learner = next(row for row in rows if row['program'].startswith('learner'))
  assert (code == 0) == fits and learner['fits'] == fits


def test_without_the_compiler_one_sentence(monkeypatch, capsys):
  monkeypatch.setattr(child.importlib.util, 'find_spec', lambda name: None)
  assert main.main(TINY) == 2
  assert 'pip install libtpu' in capsys.readouterr().err


def test_the_search_goes_from_mild_to_harsh():
  run = compiling.load(['gin/run/pretrain_tiny.gin'], [])
  attempts = list(search._attempts(run, 4))
  assert attempts[0] == ["cfg.Compute.remat = 'block'", 'cfg.Compute.loss_chunk = 8192']
  assert all(a[:2] == attempts[0] for a in attempts)
  # 16 rows on 4 devices: down to one row a device at once, the batch kept.
  assert attempts[1][2:] == ['cfg.Train.accumulation = 2']
  assert attempts[2][2:] == ['cfg.Train.accumulation = 4']
  assert not any('batch_size' in binding for a in attempts for binding in a)


def test_the_search_halves_a_batch_that_cannot_be_accumulated():
  run = compiling.load(['gin/run/rpt_tiny.gin'], [])
  attempts = list(search._attempts(run, 4))
  assert [a[-1] for a in attempts[1:]] == [
      f'cfg.Rollouts.num_prompts = {n}' for n in (16, 8, 4)]


def test_the_search_returns_the_first_that_fits(monkeypatch):
  tried = []

  def compile_run(topology, files, bindings, slices):
    tried.append(bindings)
    return [{'fits': 'cfg.Train.accumulation = 4' in bindings, 'error': 'needs more'}]

  monkeypatch.setattr(search.compiling, 'compile_run', compile_run)
  lines = []
  found = search.fitting('v5e:1x1', ['gin/run/pretrain_tiny.gin'], [], lines.append)
  assert found[-1] == 'cfg.Train.accumulation = 4'
  assert len(tried) == 3 and len(lines) == 6


def test_the_search_says_when_nothing_fits(monkeypatch):
  monkeypatch.setattr(search.compiling, 'compile_run',
                      lambda *args: [{'fits': False, 'error': 'needs more'}])
  assert search.fitting('v5e:1x1', ['gin/run/pretrain_tiny.gin'], [], lambda line: None) == []


def test_multiply_adds_of_a_traced_program():
  def program(x, w):
    def layer(x, _):
      return jnp.sin(x @ w), None
    x, _ = jax.lax.scan(layer, x, None, length=3)
    codes = x.astype(jnp.int8)
    return jnp.matmul(codes, codes.T, preferred_element_type=jnp.int32)

  traced = jax.jit(program).trace(jnp.ones((4, 8)), jnp.ones((8, 8)))
  assert roofline.multiply_adds(traced.jaxpr.jaxpr) == {'bf16': 3 * 4 * 8 * 8, 'int8': 4 * 4 * 8}


def test_the_roofline_names_its_bound():
  chip = chips.chip('v5e')
  bound = roofline.estimate(chip, roofline.MultiplyAdds({'bf16': 98.5e12}), 82e9, 20e9)
  assert bound.mxu == pytest.approx(1, rel=1e-3)
  assert bound.hbm == pytest.approx(0.1, rel=1e-3) and bound.ici == pytest.approx(0.1)
  assert bound.bound == 'mxu' and bound.seconds == bound.mxu


def test_data_paths_need_not_exist():
  run = compiling.load(['gin/run/pretrain_2b4t.gin'], [])
  assert isinstance(run.data.source, cfg.ArrayRecord)


@pytest.mark.parametrize('each, want, most_tries', [(1, 7, 3), (12, 6, 3), (40, 2, 2), (99, 0, 1)])
def test_the_search_finds_the_most_slots(each, want, most_tries, monkeypatch):
  """Of a sampler with 20 of 100 bytes, and `each` for a slot. Each of 16 shards has 8 responses.

  This is arithmetic over what the compiler says, so a function stands for it.
  """
  tries = []

  def compile_run(topology, gin_files, bindings, slices, only):
    assert only == search.SAMPLER
    tries.append(int(bindings[-1].rpartition(' ')[2]))
    total = 20 + each * tries[-1]
    yield {'fits': total <= 100, 'error': 'too large', 'capacity': 100, 'hbm': {'total': total}}

  monkeypatch.setattr(compiling, 'compile_run', compile_run)
  found = search.most_slots('v5e:4x4', ['gin/run/opo_tiny.gin'], [], print)
  assert found == ([] if not want else search._slots(want)) and len(tries) <= most_tries
