"""Hugging Face folders: the packed layout, what a scale means, round trips, a real file."""

import dataclasses
import json
from pathlib import Path
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.errors import UserError
from jaxrl_pt.interop import huggingface as hf
from jaxrl_pt.models import transformer
from jaxrl_pt.nn.quant import ternary

safetensors = pytest.importorskip('safetensors.numpy')

REAL = Path(__file__).parents[3] / 'shared' / 'data' / 'weights-verl-arith' / 'model'
LLAMA = cfg.Model(num_layers=2, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, head_dim=4,
                  vocab_size=11, tied_head=False, norm_epsilon=1e-6)
BITNET = dataclasses.replace(LLAMA, activation='relu2', sub_norm=True, tied_head=True, d_ff=22,
                             rope_theta=500_000.0, quant=cfg.Quant('ternary', 'int8'))


def draw(config):
  specs = transformer.build(config).specs
  params = jax.jit(lambda key: P.init(specs, key))(jax.random.key(0))
  # Gains of 1 would hide one that is read from the wrong place.
  return jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(x.size).random(x.shape,
                                                                               np.float32), params)


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_known_answer_of_the_packed_layout():
  packed = np.array([[161, 24], [144, 10]], np.uint8)
  rows = [(0, -1), (-1, 1), (-1, 1), (-1, 1), (1, 0), (0, -1), (1, -1), (1, -1)]
  np.testing.assert_array_equal(hf.unpack(packed, 8), rows)
  np.testing.assert_array_equal(hf.pack(np.array(rows, np.int8)), packed)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 21), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_pack_and_unpack_round_trip(num_out, num_in, seed):
  codes = np.random.default_rng(seed).integers(-1, 2, (num_out, num_in)).astype(np.int8)
  packed = hf.pack(codes)
  assert packed.shape == (-(-num_out // 4), num_in) and packed.dtype == np.uint8
  np.testing.assert_array_equal(hf.unpack(packed, num_out), codes)


@pytest.mark.parametrize('zeros', [0.0, 0.4, 0.99, 1.0])
def test_latent_weights_quantise_to_the_stored_codes_and_scale(zeros):
  random = np.random.default_rng(0)
  codes = (random.choice([-1, 1], (64, 48)) * (random.random((64, 48)) >= zeros)).astype(np.int8)
  again, scale = ternary(jnp.asarray(hf.latent(codes, 1.7)))
  np.testing.assert_array_equal(again, codes)
  if zeros < 1:
    # The mean of 3,072 equal values, summed in float32 in whatever order.
    assert float(scale[0, 0]) == pytest.approx(1.7, rel=1e-5)


@pytest.mark.parametrize('config', [
    LLAMA, dataclasses.replace(LLAMA, tied_head=True), BITNET,
    dataclasses.replace(BITNET, quant=cfg.Quant())])
def test_float_round_trip_is_exact(tmp_path, config):
  params = draw(config)
  hf.save_model(tmp_path, config, params)
  loaded_config, loaded = hf.load_model(tmp_path)
  assert loaded_config == config
  assert_same(loaded, params)


def test_packed_round_trip_keeps_codes_and_scales(tmp_path):
  params = draw(BITNET)
  hf.save_model(tmp_path, BITNET, params, packed=True)
  config, loaded = hf.load_model(tmp_path)
  assert config == BITNET
  for name in ('wq', 'wk', 'wv', 'wo', 'w_gate', 'w_up', 'w_down'):
    codes, scale = ternary(params['layers'][name])
    loaded_codes, loaded_scale = ternary(loaded['layers'][name])
    np.testing.assert_array_equal(loaded_codes, codes)
    np.testing.assert_allclose(loaded_scale, scale, rtol=1e-5)
  assert_same(loaded['layers']['ffn_sub_norm'], params['layers']['ffn_sub_norm'])
  stored = safetensors.load_file(tmp_path / 'model.safetensors')
  assert stored['model.layers.0.mlp.gate_proj.weight'].shape == (6, 16)  # 22 rows in 4 planes


@pytest.mark.parametrize('linear_class, exponent', [('autobitlinear', 1), ('bitlinear', -1),
                                                    (None, -1)])
def test_scale_multiplies_or_divides_by_class(tmp_path, linear_class, exponent):
  hf.save_model(tmp_path, BITNET, draw(BITNET), packed=True)
  stored = safetensors.load_file(tmp_path / 'model.safetensors')
  scales = {'q': 0.5, 'k': 3.0, 'v': 0.2}
  for name, scale in scales.items():
    for i in range(2):
      stored[f'model.layers.{i}.self_attn.{name}_proj.weight_scale'][:] = scale
  safetensors.save_file(stored, tmp_path / 'model.safetensors')
  settings_json = json.loads((tmp_path / 'config.json').read_text())
  if linear_class is None:  # The class that transformers assumes is `bitlinear`.
    del settings_json['quantization_config']['linear_class']
  else:
    settings_json['quantization_config']['linear_class'] = linear_class
  (tmp_path / 'config.json').write_text(json.dumps(settings_json))
  _, params = hf.load_model(tmp_path)
  for name, scale in scales.items():
    _, found = ternary(params['layers'][f'w{name}'])
    np.testing.assert_allclose(found[:, 0, 0], scale**exponent, rtol=1e-5)


def test_real_file():
  if not REAL.exists():
    pytest.skip('weights-verl-arith is not in ../shared/data: nothing to import')
  config, params = hf.load_model(REAL)
  assert (config.num_layers, config.d_ff, config.norm_epsilon) == (4, 344, 1e-6)
  assert not config.tied_head
  assert sum(x.size for x in jax.tree.leaves(params)) == 795_776
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  specs = P.abstract(transformer.build(config).specs)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, specs)


@pytest.mark.parametrize('change, words', [
    ({'model_type': 'qwen2'}, "model_type 'qwen2' is not covered"),
    ({'attention_bias': True}, 'biases'),
    ({'rope_scaling': {'rope_type': 'llama3'}}, 'scaled RoPE'),
    ({'quantization_config': {'quant_method': 'gptq'}}, "quantisation 'gptq'"),
    ({'intermediate_size': 23}, 'has shape'),
    ({'num_hidden_layers': 3}, 'has no tensor model.layers.2'),
])
def test_variants_that_are_not_covered(tmp_path, change, words):
  hf.save_model(tmp_path, LLAMA, draw(LLAMA))
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(UserError, match=words):
    hf.load_model(tmp_path)


def test_bad_files(tmp_path):
  with pytest.raises(UserError, match='config.json cannot be read'):
    hf.load_model(tmp_path)
  hf.save_model(tmp_path, LLAMA, draw(LLAMA))
  weights = tmp_path / 'model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-5])
  with pytest.raises(UserError, match='truncated'):
    hf.load_model(tmp_path)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(UserError, match='is not JSON'):
    hf.load_model(tmp_path)


@pytest.mark.parametrize('config, packed', [
    (dataclasses.replace(LLAMA, sub_norm=True), False), (LLAMA, True),
    (dataclasses.replace(BITNET, quant=cfg.Quant('ternary', 'int4')), False)])
def test_what_no_class_computes_is_not_exported(tmp_path, config, packed):
  with pytest.raises(UserError, match='export'):
    hf.save_model(tmp_path, config, {}, packed=packed)


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
  hf.save_model(tmp_path, LLAMA, draw(LLAMA))
  monkeypatch.setitem(sys.modules, 'safetensors.numpy', None)
  with pytest.raises(UserError, match='`hf` extra'):
    hf.load_model(tmp_path)
