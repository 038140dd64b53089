"""GGUF files: what they hold, by the package's own reader and by llama.cpp's formulas."""

import dataclasses
import functools
import json
import math
from pathlib import Path
import sys

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.errors import UserError
from jaxrl_pt.interop import gguf_file, verify
from jaxrl_pt.main import main
from jaxrl_pt.models import transformer
from jaxrl_pt.nn.quant import ternary
from tests.interop.test_exchange import make_source, mistake, no_file_above

gguf = pytest.importorskip('gguf')

W1A8 = cfg.Quant('ternary', 'int8')
LLAMA = cfg.Model(num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=8,
                  vocab_size=40, tied_head=False, norm_epsilon=1e-6)
BITNET = cfg.Model(num_layers=2, d_model=256, d_ff=512, num_heads=4, num_kv_heads=2, head_dim=64,
                   vocab_size=40, activation='relu2', sub_norm=True, quant=W1A8)
MODELS = {
    'llama': LLAMA,
    'llama3': dataclasses.replace(LLAMA, rope=cfg.Llama3Rope(8.0, 1.0, 4.0, 32), rope_theta=5e5),
    'qwen2': dataclasses.replace(LLAMA, qkv_bias=True, param_dtype='bfloat16'),
    'qwen3': dataclasses.replace(LLAMA, qk_norm=True, head_dim=12, tied_head=True),
    'bitnet': dataclasses.replace(BITNET, activation='swiglu'),
    'bitnet-b1.58': BITNET,
    'ternary llama': dataclasses.replace(LLAMA, d_model=256, head_dim=64, d_ff=80, quant=W1A8)}


@functools.cache
def draw(config):
  specs = transformer.build(config).specs
  params = jax.jit(lambda key: P.init(specs, key))(jax.random.key(0))
  noise = lambda x: 0.1 * np.random.default_rng(x.size).random(x.shape, np.float32)
  return jax.tree.map(lambda x: (x + noise(x)).astype(x.dtype), params)


def saved(path, config, ternary_type='TQ2_0'):
  keys = gguf_file.metadata(config, ternary_type, 'tiny', 77)
  gguf_file.save_model(path, config, draw(config), keys, ternary_type)
  return keys


def tensors(path):
  return {t.name: gguf.quants.dequantize(t.data, t.tensor_type)
          for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize('name, ternary_type', [
    *((name, 'TQ2_0') for name in MODELS), ('bitnet', 'TQ1_0'), ('ternary llama', 'TQ1_0')])
def test_a_file_is_read_back_to_the_same_tensors(tmp_path, name, ternary_type):
  config = MODELS[name]
  keys = saved(tmp_path / 'm', config, ternary_type)
  difference = verify.check_gguf(tmp_path / 'm', config, draw(config), keys, ternary_type)
  assert difference == 0 if config.quant != W1A8 else 0 < difference < 0.1
  field = gguf.GGUFReader(tmp_path / 'm').get_field('general.architecture')
  assert field.contents() == gguf_file.architecture(config)


@pytest.mark.parametrize('ternary_type', ['TQ2_0', 'TQ1_0'])
def test_ternary_matrices_are_codes_times_a_scale_bit_for_bit(tmp_path, ternary_type):
  saved(tmp_path / 'm', BITNET, ternary_type)
  reader, found = gguf.GGUFReader(tmp_path / 'm'), tensors(tmp_path / 'm')
  for ours, theirs in (('wq', 'attn_q'), ('wv', 'attn_v'), ('wo', 'attn_output'),
                       ('w_gate', 'ffn_gate'), ('w_up', 'ffn_up'), ('w_down', 'ffn_down')):
    for layer in range(2):
      codes, scale = ternary(draw(BITNET)['layers'][ours][layer])
      rounded = np.float32(np.float16(scale[0, 0]))
      np.testing.assert_array_equal(found[f'blk.{layer}.{theirs}.weight'],
                                    np.asarray(codes).T * rounded)
  kinds = {t.name: t.tensor_type.name for t in reader.tensors}
  assert kinds['blk.1.ffn_down.weight'] == ternary_type
  assert kinds['token_embd.weight'] == kinds['blk.0.attn_sub_norm.weight'] == 'F32'
  assert 'output.weight' not in kinds
  field = reader.get_field('general.file_type')
  assert field.contents() == gguf.LlamaFileType[f'MOSTLY_{ternary_type}']


def test_rows_of_other_widths_are_f16_with_the_same_numbers(tmp_path):
  config = MODELS['ternary llama']
  keys = gguf_file.metadata(config, 'TQ1_0', 'tiny', 77)
  assert gguf_file.save_model(tmp_path / 'm', config, draw(config), keys, 'TQ1_0') == 2
  kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / 'm').tensors}
  assert kinds['blk.0.ffn_down.weight'] == 'F16' and kinds['blk.0.ffn_up.weight'] == 'TQ1_0'
  codes, scale = ternary(draw(config)['layers']['w_down'][1])
  np.testing.assert_array_equal(tensors(tmp_path / 'm')['blk.1.ffn_down.weight'],
                                np.asarray(codes).T * np.float32(np.float16(scale[0, 0])))


def adjacent(x, angle):
  """RoPE over the pairs (2i, 2i + 1), as ggml's `llama` models have it."""
  pairs = x.reshape(*x.shape[:-1], -1, 2)
  z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
  return np.stack([z.real, z.imag], -1).reshape(x.shape)


def halves(x, angle):
  """RoPE over the pairs (i, i + E/2), as ours and ggml's other models have it."""
  first, second = np.split(x, 2, -1)
  z = (first + 1j * second) * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize('name, rotate', [('llama', adjacent), ('qwen3', halves)])
def test_scores_of_attention_are_ours_with_the_rope_of_llama_cpp(tmp_path, name, rotate):
  config = dataclasses.replace(MODELS[name], head_dim=8)
  saved(tmp_path / 'm', config)
  found, random = tensors(tmp_path / 'm'), np.random.default_rng(0)
  angle = 10_000.0 ** (-np.arange(4) / 4)
  x = random.standard_normal((2, 32))

  def scores(wq, wk, turn):
    q = turn((x[0] @ wq).reshape(4, 8), 5 * angle)
    k = turn((x[1] @ wk).reshape(2, 8), 3 * angle)
    return (q.reshape(2, 2, 8) * k[:, None]).sum(-1)

  layers = draw(config)['layers']
  ours = scores(np.asarray(layers['wq'][1]), np.asarray(layers['wk'][1]), halves)
  theirs = scores(found['blk.1.attn_q.weight'].T, found['blk.1.attn_k.weight'].T, rotate)
  np.testing.assert_allclose(theirs, ours, rtol=1e-5)


def test_factors_of_frequencies_are_those_of_llama_3(tmp_path):
  config = MODELS['llama3']
  saved(tmp_path / 'm', config)
  factors = []
  for i in range(4):
    wavelength = 2 * math.pi * 5e5 ** (i / 4)
    if wavelength < 32 / 4.0:
      factors.append(1.0)
    elif wavelength > 32 / 1.0:
      factors.append(8.0)
    else:
      smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
      factors.append(1 / ((1 - smooth) / 8.0 + smooth))
  np.testing.assert_allclose(tensors(tmp_path / 'm')['rope_freqs.weight'], factors, rtol=1e-5)


@pytest.mark.parametrize('change, words', [
    ({'quant': cfg.Quant('ternary', 'int8', hadamard=True)}, 'rotates no activations'),
    ({'quant': cfg.Quant('ternary', 'int4')}, 'has no int4 activations'),
    ({'tied_head': False}, 'no head of its own'),
    ({'head_dim': 32}, 'num_heads × head_dim = d_model'),
    ({'rope': cfg.Llama3Rope()}, 'scales RoPE'),
    ({'sub_norm': False}, 'cannot be exported'), ({'qk_norm': True}, 'cannot be exported')])
def test_what_llama_cpp_does_not_compute_is_refused(change, words):
  with pytest.raises(UserError, match=words):
    gguf_file.metadata(dataclasses.replace(BITNET, **change), 'TQ2_0', 'x', 1)


def test_a_scale_that_float16_would_lose_is_refused(tmp_path):
  keys = gguf_file.metadata(BITNET, 'TQ2_0', 'x', 1)
  small = jax.tree.map(lambda x: x * 1e-4, draw(BITNET))
  with pytest.raises(UserError, match='weight has the scale'):
    gguf_file.save_model(tmp_path / 'm', BITNET, small, keys, 'TQ2_0')


def test_a_file_of_another_model_is_not_verified(tmp_path):
  keys, path = saved(tmp_path / 'm', LLAMA), tmp_path / 'm'
  other = jax.tree.map(lambda x: x, draw(LLAMA))
  other['layers']['wk'] = other['layers']['wk'].at[1, 0, 0].add(1.0)
  with pytest.raises(UserError, match='holds other numbers of layers/wk'):
    verify.check_gguf(path, LLAMA, other, keys, 'TQ2_0')
  with pytest.raises(UserError, match='says llama.rope.freq_base'):
    verify.check_gguf(path, LLAMA, draw(LLAMA), {**keys, 'llama.rope.freq_base': 7.0}, 'TQ2_0')
  with pytest.raises(UserError, match='has no tensor blk.2'):
    gguf_file.load_model(path, dataclasses.replace(LLAMA, num_layers=3), {}, 'TQ2_0')
  path.write_bytes(b'GGUF')
  with pytest.raises(UserError, match='not a readable GGUF file'):
    gguf_file.load_model(path, LLAMA, keys, 'TQ2_0')


# --- The command ------------------------------------------------------------------------


@pytest.fixture(scope='module')
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp('gguf')
  config = dataclasses.replace(BITNET, d_ff=768, vocab_size=320)
  source = make_source(folder / 'source', config)
  (source / 'generation_config.json').write_text('{"eos_token_id": [1, 7]}')
  (source / 'chat_template.jinja').write_text('{{ messages }}')
  settings = json.loads((source / 'config.json').read_text())
  (source / 'config.json').write_text(json.dumps(settings | {'max_position_embeddings': 123}))
  assert main(['import', str(source), '--workdir', str(folder / 'run')]) == 0
  return folder / 'run'


@pytest.mark.parametrize('kind', ['gguf', 'gguf-tq1'])
def test_export_writes_one_file_with_the_tokenizer(workdir: Path, tmp_path, capsys, kind):
  path = tmp_path / 'deep' / 'model.gguf'
  assert main(['export', '--workdir', str(workdir), str(path), '--format', kind, '--verify']) == 0
  assert 'Read back, its tensors are the same' in capsys.readouterr().out
  assert [p.name for p in path.parent.iterdir()] == ['model.gguf']
  reader = gguf.GGUFReader(path)
  value = lambda key: reader.get_field(key).contents()
  assert value('general.architecture') == 'bitnet-b1.58' and value('general.name') == 'run'
  assert value('bitnet-b1.58.context_length') == 123
  assert value('tokenizer.ggml.model') == 'gpt2' and value('tokenizer.ggml.pre') == 'gpt-2'
  assert len(value('tokenizer.ggml.tokens')) == 320
  assert value('tokenizer.ggml.bos_token_id') == 0 and value('tokenizer.ggml.add_bos_token')
  assert value('tokenizer.ggml.eos_token_id') == 1 and value('tokenizer.ggml.eot_token_id') == 7
  assert value('tokenizer.chat_template') == '{{ messages }}'
  assert value('bitnet-b1.58.hidden_activation') == 'relu2'
  assert 'exists already' in mistake(capsys, 'export', '--workdir', str(workdir), str(path),
                                     '--format', kind)


def test_a_full_disk_leaves_nothing_behind(workdir: Path, tmp_path, capsys):
  for num_bytes in (1000, 100_000):  # within the metadata, and within a tensor
    with no_file_above(num_bytes):
      assert 'cannot be written' in mistake(
          capsys, 'export', '--workdir', str(workdir), str(tmp_path / 'm.gguf'), '--format', 'gguf')
  assert list(tmp_path.iterdir()) == []


def test_without_the_package_and_after_an_interruption_nothing_is_left(workdir: Path, tmp_path,
                                                                       capsys, monkeypatch):
  flags = ('export', '--workdir', str(workdir), str(tmp_path / 'm.gguf'), '--format', 'gguf')

  def interrupt(*arguments):
    raise KeyboardInterrupt

  monkeypatch.setattr(gguf_file, '_stored', interrupt)
  assert main(flags) == 130
  monkeypatch.setitem(sys.modules, 'gguf', None)
  assert "pip install 'jaxrl_pt[gguf]'" in mistake(capsys, *flags)
  assert list(tmp_path.iterdir()) == []
