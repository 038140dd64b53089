"""Hugging Face folders: the packed layout, what a scale means, round trips, a real file."""

import dataclasses
import functools
import json
import os
from pathlib import Path
import subprocess
import sys
import textwrap
import time
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.errors import UserError
from jaxrl_pt.interop import huggingface as hf
from jaxrl_pt.interop import tensor_file
from jaxrl_pt.interop.huggingface_config import to_config, to_settings
from jaxrl_pt.models import transformer
from jaxrl_pt.nn.quant import pack, ternary
from tests import xla_flags

safetensors = pytest.importorskip('safetensors.numpy')

REAL = Path(__file__).parents[3] / 'shared' / 'data' / 'weights-verl-arith' / 'model'
LLAMA = cfg.Model(num_layers=2, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, head_dim=4,
                  vocab_size=11, tied_head=False, norm_epsilon=1e-6)
BITNET = dataclasses.replace(LLAMA, activation='relu2', sub_norm=True, tied_head=True, d_ff=22,
                             rope_theta=500_000.0, quant=cfg.Quant('ternary', 'int8'))
QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, head_dim=6, tied_head=True)
# Wide enough for one scale of 128 weights.
WIDE = dataclasses.replace(QWEN3, d_model=128, head_dim=32, d_ff=256)
LLAMA3 = dataclasses.replace(LLAMA, rope=cfg.Llama3Rope(32.0, 1.0, 4.0, 64), rope_theta=5e5)


@functools.cache
def draw(config):
  specs = transformer.build(config).specs
  params = jax.jit(lambda key: P.init(specs, key))(jax.random.key(0))
  # Gains of 1 would hide one that is read from the wrong place.
  noise = lambda x: 0.1 * np.random.default_rng(x.size).random(x.shape, np.float32)
  return jax.tree.map(lambda x: (x + noise(x)).astype(x.dtype), params)


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_known_answer_of_the_packed_layout():
  packed = np.array([[161, 24], [144, 10]], np.uint8)
  rows = [(0, -1), (-1, 1), (-1, 1), (-1, 1), (1, 0), (0, -1), (1, -1), (1, -1)]
  np.testing.assert_array_equal(hf.unpack(packed, 8), rows)
  np.testing.assert_array_equal(hf.pack(np.array(rows, np.int8)), packed)


def unpacked_one_by_one(packed, num_out):
  """The layout of 2B4T's files said by index: row r of R = ⌈out / 4⌉ lies in byte r mod R."""
  rows = np.arange(num_out)
  return (packed[rows % len(packed)].astype(int) >> 2 * (rows // len(packed))[:, None] & 3) - 1


def test_ten_thousand_round_trips_of_packing():
  random = np.random.default_rng(0)
  shapes = random.integers(1, (22, 10), (10_000, 2))
  assert {num_out % 4 for num_out, _ in shapes} == {0, 1, 2, 3}
  for num_out, num_in in shapes:
    codes = random.integers(-1, 2, (num_out, num_in)).astype(np.int8)
    packed = hf.pack(codes)
    assert packed.shape == (-(-num_out // 4), num_in) and packed.dtype == np.uint8
    assert np.array_equal(hf.unpack(packed, num_out), codes)
    assert np.array_equal(unpacked_one_by_one(packed, num_out), codes)


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
    LLAMA, dataclasses.replace(LLAMA, tied_head=True), BITNET, QWEN2, QWEN3, LLAMA3,
    dataclasses.replace(BITNET, quant=cfg.Quant()),
    dataclasses.replace(QWEN2, param_dtype='bfloat16')])
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


@pytest.mark.parametrize('linear_class', ['autobitlinear', 'bitlinear'])
def test_scales_are_exported_to_the_last_bit(tmp_path, linear_class):
  source, random = tmp_path / 'a', np.random.default_rng(0)
  hf.save_model(source, BITNET, draw(BITNET), packed=True)
  stored = safetensors.load_file(source / 'model.safetensors')
  for name in stored:
    if name.endswith('_scale'):
      stored[name][:] = random.uniform(0.01, 3)
  safetensors.save_file(stored, source / 'model.safetensors')
  settings_json = json.loads((source / 'config.json').read_text())
  settings_json['quantization_config']['linear_class'] = linear_class
  (source / 'config.json').write_text(json.dumps(settings_json))
  config, params = hf.load_model(source)
  hf.save_model(tmp_path / 'b', config, params, packed=True, scales=hf.stored_scales(source))
  again = safetensors.load_file(tmp_path / 'b' / 'model.safetensors')
  assert stored.keys() == again.keys()
  for name, value in stored.items():
    if name.endswith('_scale') and linear_class == 'bitlinear':
      value = 1 / value
    np.testing.assert_array_equal(again[name], value, name)
  # A model that has been trained since has scales of its own.
  params['layers']['wq'] = 1.01 * params['layers']['wq']
  hf.save_model(tmp_path / 'c', config, params, packed=True, scales=hf.stored_scales(source))
  trained = safetensors.load_file(tmp_path / 'c' / 'model.safetensors')
  name = 'model.layers.0.self_attn.q_proj.weight_scale'
  assert trained[name] == pytest.approx(1.01 * again[name], rel=1e-5)


def with_grouped_scales(folder):
  """A folder of float16 weights with one scale for 128 inputs, {name: (codes, scales)}."""
  hf.save_model(folder, WIDE, draw(WIDE))
  stored, drawn = safetensors.load_file(folder / 'model.safetensors'), {}
  random = np.random.default_rng(0)
  for name, value in stored.items():
    if name.endswith('_proj.weight'):
      num_out, num_in = value.shape
      codes = random.integers(-1, 2, value.shape).astype(np.float16)
      scale = random.uniform(0.1, 0.2, (num_out, num_in // 128)).astype(np.float16)
      drawn[name] = codes, scale
      value = codes * np.repeat(scale, 128, 1)
    stored[name] = value.astype(np.float16)
  safetensors.save_file(stored, folder / 'model.safetensors')
  return stored, drawn


def test_one_scale_for_128_weights_there_and_back(tmp_path):
  stored, drawn = with_grouped_scales(tmp_path)
  config, params = hf.load_model(tmp_path)
  assert config == dataclasses.replace(WIDE, quant=cfg.Quant('ternary_128'))
  packed = pack(params, lambda path: path[-1].key.startswith('w'), kind='ternary_128')
  for ours, theirs in (('wq', 'self_attn.q_proj'), ('w_down', 'mlp.down_proj')):
    codes, scale = drawn[f'model.layers.1.{theirs}.weight']
    np.testing.assert_array_equal(packed['layers'][ours].codes[1].astype(jnp.int8), codes.T)
    np.testing.assert_array_equal(packed['layers'][ours].scale[1], scale.T)
  hf.save_model(tmp_path / 'again', config, params)
  again = safetensors.load_file(tmp_path / 'again' / 'model.safetensors')
  assert all(np.array_equal(again[name], value) for name, value in stored.items())
  # Weights that are trained on are exported as they are computed.
  params['layers']['wq'] = params['layers']['wq'].at[1, 0, 0].add(1e-3)
  hf.save_model(tmp_path / 'trained', config, params)
  assert hf.load_model(tmp_path / 'trained')[0] == config


def test_one_odd_weight_is_no_group(tmp_path):
  stored, _ = with_grouped_scales(tmp_path)
  stored['model.layers.1.mlp.down_proj.weight'][3, 200] = 0.05
  safetensors.save_file(stored, tmp_path / 'model.safetensors')
  assert hf.load_model(tmp_path)[0] == WIDE


def test_real_file():
  if not REAL.exists():
    pytest.skip('weights-verl-arith is not in ../shared/data: nothing to import')
  config, params = hf.load_model(REAL)
  assert (config.num_layers, config.d_ff, config.norm_epsilon) == (4, 344, 1e-6)
  assert not config.tied_head
  assert sum(x.size for x in jax.tree.leaves(params)) == 795_776
  assert config.param_dtype == 'bfloat16'  # as in the file
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
  specs = P.abstract(transformer.build(config).specs)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, specs)


def rewritten(folder, change, config=LLAMA, **options):
  """A saved model whose config.json has other values; None takes a key out."""
  hf.save_model(folder, config, draw(config), **options)
  path = folder / 'config.json'
  found = json.loads(path.read_text()) | change
  path.write_text(json.dumps({k: v for k, v in found.items() if v is not OUT}))
  return folder


OUT = object()
PACKED = {'config': BITNET, 'packed': True}
LINEAR = {'rope_type': 'linear', 'factor': 4.0}
SCALED = {'rope_type': 'llama3', 'factor': 32.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 64}
DEFAULT = {'rope_type': 'default', 'rope_theta': 10_000.0}


@pytest.mark.parametrize('change, words', [
    ({'model_type': 'gemma3'}, "model_type 'gemma3' is not covered"),
    ({'model_type': ['llama']}, r"model_type \['llama'\] is not covered"),
    ({'architectures': ['BitnetForCausalLM']}, 'architectures'),
    ({'architectures': 'LlamaForCausalLM'}, 'must be a list'),
    ({'attention_bias': True}, 'attention_bias = True is not covered'),
    ({'mlp_bias': True}, 'mlp_bias = True is not covered'),
    ({'hidden_act': 'gelu'}, "hidden_act 'gelu'"),
    # Scaled RoPE under any of its names, beside one that says the default or alone.
    ({'rope_scaling': {'rope_type': 'llama3'}}, 'rope_scaling.factor is None'),
    ({'rope_scaling': {**SCALED, 'original_max_position_embeddings': float('inf')}},
     'original_max_position_embeddings is inf'),
    ({'rope_theta': float('nan')}, 'rope_theta is nan'),
    ({'rope_scaling': {**SCALED, 'low_freq_factor': 4.0}}, 'high_freq_factor = 4.0 is not above'),
    ({'rope_scaling': {**SCALED, 'attention_factor': 2.0}}, 'attention_factor = 2.0 is not'),
    ({'rope_scaling': SCALED, 'rope_parameters': DEFAULT}, 'scales RoPE in one way'),
    ({'rope_scaling': {**SCALED, 'type': 'default'}}, "of type 'llama3' and 'default'"),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}}, "rope_scaling of type 'yarn'"),
    ({'rope_scaling': LINEAR, 'rope_parameters': DEFAULT},
     "rope_scaling of type 'linear' is not covered"),
    ({'rope_scaling': {'type': 'linear', 'factor': 4.0}, 'rope_parameters': DEFAULT},
     "rope_scaling of type 'linear'"),
    ({'rope_scaling': DEFAULT, 'rope_parameters': LINEAR}, "rope_parameters of type 'linear'"),
    ({'rope_scaling': {'rope_type': 'default', 'type': 'yarn'}}, "of type 'default' and 'yarn'"),
    ({'rope_scaling': {'factor': 4.0}}, 'rope_scaling.factor = 4.0 is not covered'),
    ({'rope_scaling': {'mscale': 0.7}}, 'sets rope_scaling.mscale'),
    ({'rope_scaling': 'linear'}, 'must be an object'),
    ({'rope_parameters': {'full_attention': LINEAR}}, 'sets rope_parameters.full_attention'),
    ({'rope_parameters': {**DEFAULT, 'partial_rotary_factor': 0.5}}, 'partial_rotary_factor'),
    ({'rope_parameters': {**DEFAULT, 'rope_theta': 5e5}}, 'rope_theta as 500000.0 and as 10000.0'),
    ({'rope_theta': '1e4'}, 'must be a number'),
    ({'rope_theta': 0}, 'config.json says what cannot be: Model.rope_theta = 0.0'),
    ({'rms_norm_eps': None}, 'config.json says what cannot be: Model.norm_epsilon = None'),
    ({'rope_scaling': {**SCALED, 'factor': 0.5}}, 'config.json says what cannot be: Llama3Rope'),
    ({'rope_scaling': {**SCALED, 'original_max_position_embeddings': 64.5}}, 'must be a whole'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5 is not covered'),
    # Keys of relatives, and one that nobody knows.
    ({'sliding_window': 4096}, 'sliding_window = 4096 is not covered'),
    ({'use_sliding_window': True}, 'use_sliding_window = True is not covered'),
    ({'num_local_experts': 8}, 'num_local_experts = 8 is not covered'),
    ({'num_experts': 64}, 'num_experts = 64 is not covered'),
    ({'model_type': 'mistral', 'architectures': ['MistralForCausalLM']},
     'does not say sliding_window'),
    ({'model_type': 'mistral', 'architectures': None, 'sliding_window': 4096},
     'sliding_window = 4096 is not covered'),
    ({'model_type': 'qwen2', 'architectures': None, 'use_sliding_window': True},
     'use_sliding_window = True is not covered'),
    ({'model_type': 'qwen2', 'architectures': None}, 'has no tensor .*k_proj.bias'),
    ({'model_type': 'qwen3', 'architectures': None}, 'has no tensor .*k_norm.weight'),
    ({'model_type': 'mistral', 'architectures': None, 'sliding_window': None,
      'quantization_config': {'quant_method': 'bitnet'}}, 'with model_type'),
    ({'model_type': 'qwen2', 'architectures': None, 'quantization_config': {
        'quant_method': 'bitnet', 'linear_class': 'autobitlinear'}}, 'multiplies biases'),
    ({'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types'),
    ({'attn_logit_softcapping': 30.0}, 'attn_logit_softcapping'),
    ({'embedding_multiplier': 12.0}, 'embedding_multiplier = 12.0 is not covered'),
    ({'weight_bits': 1, 'input_bits': 8}, 'weight_bits'),
    ({'something': 'new'}, 'take it out of the file'),
    ({'pruned_heads': {'0': [1]}}, 'pruned_heads'),
    ({'quantization_config': {'quant_method': 'gptq'}}, "quantisation 'gptq'"),
    ({'quantization_config': ['bitnet']}, 'must be an object'),
    ({'intermediate_size': 23}, 'has shape'),
    ({'intermediate_size': '24'}, 'must be a whole number'),
    ({'num_attention_heads': 0}, 'must be a whole number above 0'),
    ({'hidden_size': OUT}, "does not say 'hidden_size'"),
    ({'tie_word_embeddings': 'false'}, 'must be true or false'),
    ({'num_hidden_layers': 3}, 'has no tensor model.layers.2'),
    ({'num_hidden_layers': 1}, '9 tensors that a model of its config.json does not have'),
])
def test_variants_that_are_not_covered(tmp_path, change, words):
  with pytest.raises(UserError, match=words):
    hf.load_model(rewritten(tmp_path, change))


# As transformers 4 and 5 write them; what is new in a file must not change its model.
@pytest.mark.parametrize('change', [
    {'rope_theta': OUT, 'rope_parameters': DEFAULT},
    {'rope_scaling': {'type': 'default'}, 'rope_parameters': None},
    {'rope_parameters': DEFAULT, 'rope_scaling': DEFAULT, 'rope_theta': 10_000},
    {'num_local_experts': 0, 'a_new_key': False, 'another': [], 'a_third': ''},
    {'model_type': 'mistral', 'architectures': ['MistralForCausalLM'], 'sliding_window': None},
    {'head_dim': None, 'num_key_value_heads': 2, 'sliding_window': None,
     'partial_rotary_factor': 1.0, 'layer_types': ['full_attention'] * 2},
    {'bos_token_id': 1, 'eos_token_id': [2, 3], 'pretraining_tp': 1, 'use_cache': True,
     'transformers_version': '4.38.2', '_name_or_path': 'x', 'attention_dropout': 0.0,
     'mlp_bias': False, 'dtype': 'bfloat16', 'is_encoder_decoder': False, 'pruned_heads': {},
     'id2label': {'0': 'LABEL_0'}, 'temperature': 0.6, 'auto_map': {'AutoConfig': 'x.y'}},
])
def test_keys_that_change_nothing(tmp_path, change):
  config, params = hf.load_model(rewritten(tmp_path, change))
  assert config == LLAMA
  assert_same(params, draw(LLAMA))


@pytest.mark.parametrize('skipped, words', [
    (['lm_head', 'down_proj'], "'down_proj' in modules_to_not_convert leaves "
                               'model.layers.0.mlp.down_proj unquantised'),
    (['lm_head', 'model.layers.0'], 'leaves model.layers.0'),
    (['lm_head', 'layers.1'], 'leaves model.layers.1.self_attn.q_proj'),
    (['lm_head', 'mlp'], 'leaves'), (['lm_head', 'model'], 'leaves'),
    (['lm_head', r'.*\.v_proj'], 'is a pattern'), (['(lm_head)'], 'is a pattern'),
    (['lm_head', ''], 'leaves'),
    ([], "does not name 'lm_head'"), (['embed_tokens'], "does not name 'lm_head'"),
    ('lm_head', 'must be a list'), ([1], 'must be a list')])
@pytest.mark.parametrize('tied', [True, False])
def test_modules_that_stay_unquantised(tmp_path, skipped, words, tied):
  with pytest.raises(UserError, match=words):
    hf.load_model(rewritten(tmp_path, {'quantization_config': {
        'quant_method': 'bitnet', 'linear_class': 'autobitlinear', 'quantization_mode': 'online',
        'modules_to_not_convert': skipped}}, dataclasses.replace(BITNET, tied_head=tied)))


@pytest.mark.parametrize('skipped', [None, ['lm_head'], ['head'], ['lm_head', 'embed_tokens']])
def test_only_the_head_stays_unquantised(tmp_path, skipped):
  change = {'quantization_config': {
      'quant_method': 'bitnet', 'linear_class': 'autobitlinear', 'quantization_mode': 'online',
      'modules_to_not_convert': skipped}}
  assert hf.load_model(rewritten(tmp_path, change, BITNET))[0] == BITNET


@pytest.mark.parametrize('change, words', [
    ({'use_rms_norm': True}, 'use_rms_norm = True is not covered'),
    ({'linear_class': 'other'}, "linear_class 'other'"),
    ({'quantization_mode': 'other'}, "quantization_mode 'other'"),
    ({'group_size': 64}, 'sets quantization_config.group_size'),
    # Packed weights are offline ones: online, the reader quantises what it finds.
    ({'quantization_mode': 'online'}, 'has shape')])
def test_quantisation_that_is_not_covered(tmp_path, change, words):
  settings_json = {'quant_method': 'bitnet', 'linear_class': 'autobitlinear',
                   'quantization_mode': 'offline'} | change
  with pytest.raises(UserError, match=words):
    hf.load_model(rewritten(tmp_path, {'quantization_config': settings_json}, **PACKED))


@pytest.mark.parametrize('name', [
    'model_type', 'architectures', 'hidden_act', 'layer_types', 'hidden_size', 'head_dim',
    'tie_word_embeddings', 'rope_scaling', 'rope_theta', 'rms_norm_eps', 'quantization_config',
    'num_experts', 'y' * 9999])
@pytest.mark.parametrize('value', ['x' * 9999, ['x' * 9999], {'type': 'x' * 9999}])
def test_a_long_value_is_not_quoted_whole(name, value):
  settings = to_settings(LLAMA, False, None, None, 99) | {name: value}
  with pytest.raises(UserError) as told:
    to_config(settings, 'config.json')
  assert len(str(told.value)) < 600


def with_tensors(folder, change, **options):
  rewritten(folder, {}, **options)
  path = folder / 'model.safetensors'
  stored = safetensors.load_file(path)
  stored = {k: v for k, v in {**stored, **change(stored)}.items() if v is not OUT}
  safetensors.save_file(stored, path)
  return folder


Q = 'model.layers.1.self_attn.q_proj'
HEAD, EMBED = 'lm_head.weight', 'model.embed_tokens.weight'


@pytest.mark.parametrize('options, change, words', [
    ({'config': BITNET}, lambda stored: {HEAD: 2 * stored[EMBED]}, 'lm_head.weight differs'),
    ({'config': BITNET}, lambda stored: {HEAD: stored[EMBED][:-1]}, 'has shape'),
    ({}, lambda stored: {f'{Q}.bias': np.zeros(16, np.float32)}, 'holds 1 tensors'),
    ({}, lambda stored: {f'{Q}.weight_scale': np.ones(1, np.float32)}, f'holds 1 .*{Q}'),
    ({}, lambda stored: {f'{Q}.weight': np.ones((16, 16), np.uint8)}, 'no packed weight'),
    ({'config': BITNET}, lambda stored: {f'{Q}.weight_scale': np.ones(1, np.float32)},
     'holds 1 tensors'),
    (PACKED, lambda stored: {f'{Q}.weight_scale': OUT}, 'has no tensor'),
    (PACKED, lambda stored: {f'{Q}.weight_scale': np.ones(1, np.int32)}, f'{Q}.weight_scale.*int'),
    (PACKED, lambda stored: {f'{Q}.weight_scale': np.ones(1, bool)}, f'{Q}.weight_scale.*bool'),
    (PACKED, lambda stored: {f'{Q}.weight': np.full((16, 16), 0.3, np.float32)},
     'more than −1, 0 and 1'),
    (PACKED, lambda stored: {f'{Q}.weight': np.full((4, 16), 255, np.uint8)},
     'more than −1, 0 and 1'),
    (PACKED, lambda stored: {f'{Q}.weight_scale': np.full(1, 5e-6, np.float32)}, 'scale of 5e-06'),
    (PACKED, lambda stored: {f'{Q}.weight_scale': np.full(1, np.nan, np.float32)}, 'scale of nan'),
])
def test_tensors_that_config_json_does_not_speak_of(tmp_path, options, change, words):
  with pytest.raises(UserError, match=words):
    hf.load_model(with_tensors(tmp_path, change, **options))


def test_tensors_that_change_nothing(tmp_path):
  same = lambda stored: {HEAD: stored[EMBED].copy(), 'model.layers.0.self_attn.rotary_emb.inv_freq':
                         np.ones(2, np.float32)}
  assert_same(hf.load_model(with_tensors(tmp_path, same, config=BITNET))[1], draw(BITNET))


def test_export_says_which_tokens_begin_and_end_a_text(tmp_path):
  def tokens(**options):
    hf.save_model(tmp_path, LLAMA, draw(LLAMA), **options)
    found = json.loads((tmp_path / 'config.json').read_text())
    return found['bos_token_id'], found['eos_token_id'], found['pad_token_id']

  assert tokens(bos_id=7, eos_id=9) == (7, 9, None)
  # Left out, they would be the class's own: 1 and 2.
  assert tokens(eos_id=0) == (None, 0, None) and tokens() == (None, None, None)


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
    (dataclasses.replace(QWEN2, quant=cfg.Quant('ternary', 'int8')), True),
    (dataclasses.replace(WIDE, quant=cfg.Quant('ternary_128')), True),
    (dataclasses.replace(BITNET, quant=cfg.Quant('ternary', 'int4')), False)])
def test_what_no_class_computes_is_not_exported(tmp_path, config, packed):
  with pytest.raises(UserError, match='export'):
    hf.save_model(tmp_path, config, {}, packed=packed)


def test_a_parameter_without_a_name_there_is_not_left_out(tmp_path, monkeypatch):
  """As gains of queries and keys would be: a model without them is another one."""
  build = transformer.build

  def with_one_more(config):
    model = build(config)
    gains = P.ParamSpec((config.num_layers, config.head_dim), jnp.float32, ('layers', 'norm'),
                        P.ones, 'gain')
    return model._replace(specs={**model.specs,
                                 'layers': {**model.specs['layers'], 'q_norm': gains}})

  monkeypatch.setattr(transformer, 'build', with_one_more)
  with pytest.raises(UserError, match='layers/q_norm has no place in a Hugging Face model'):
    hf.save_model(tmp_path / 'model', LLAMA, draw(LLAMA))
  assert not (tmp_path / 'model').exists()


@pytest.mark.parametrize('config', [QWEN2, BITNET], ids=['qwen2', 'bitnet'])
def test_shards_are_read_as_one_file_is(tmp_path, config):
  hf.save_model(tmp_path, config, draw(config))
  stored = safetensors.load_file(tmp_path / 'model.safetensors')
  names = sorted(stored)
  placed = {name: f'part-{i % 3}.safetensors' for i, name in enumerate(names)}
  for file in set(placed.values()):
    safetensors.save_file({n: stored[n] for n in names if placed[n] == file}, tmp_path / file)
  (tmp_path / 'model.safetensors').unlink()
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': placed}))
  loaded_config, loaded = hf.load_model(tmp_path)
  assert loaded_config == config
  assert_same(loaded, draw(config))


def test_the_host_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
  config = dataclasses.replace(LLAMA, num_layers=4, d_model=256, d_ff=512, vocab_size=900)
  hf.save_model(tmp_path, config, draw(config))
  hf.load_model(tmp_path)  # compiles
  read = tensor_file.read
  # JAX's threads let go of a tensor a moment after its last use.
  monkeypatch.setattr(tensor_file, 'read', lambda entry: time.sleep(0.03) or read(entry))
  tracemalloc.start()
  try:
    _, params = hf.load_model(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert sum(x.nbytes for x in jax.tree.leaves(params)) > 8e6
  assert peak < 1.3 * 4 * 900 * 256  # NumPy's memory is traced, that of JAX's arrays is not


def test_each_device_of_a_mesh_gets_its_part(tmp_path):
  config = dataclasses.replace(QWEN2, vocab_size=12)
  hf.save_model(tmp_path, config, draw(config))
  environment = {**os.environ, 'XLA_FLAGS': xla_flags.with_devices(4), 'JAX_PLATFORMS': 'cpu'}
  code = textwrap.dedent('''
      import sys, zlib
      import jax, numpy as np
      from jaxrl_pt import config as cfg
      from jaxrl_pt.interop import huggingface as hf
      from jaxrl_pt.models import transformer
      from jaxrl_pt.parallel import mesh, rules
      devices = mesh.make_mesh(cfg.Mesh(fsdp=2, tensor=2))
      config, params = hf.load_model(sys.argv[1], devices)
      wanted = rules.param_shardings(transformer.build(config).specs, devices)
      same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, wanted)
      assert all(jax.tree.leaves(same)), same
      print([zlib.crc32(np.ascontiguousarray(x)) for x in jax.tree.leaves(params)])''')
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], env=environment, text=True,
                        capture_output=True, check=False)
  assert done.returncode == 0, done.stderr
  whole = [zlib.crc32(np.ascontiguousarray(x)) for x in jax.tree.leaves(draw(config))]
  assert done.stdout.strip() == str(whole)


@pytest.mark.parametrize('config, name', [
    (LLAMA, 'model.layers.1.mlp.up_proj.weight'), (QWEN2, 'model.layers.0.self_attn.k_proj.bias'),
    (LLAMA, 'model.norm.weight'), (LLAMA, 'lm_head.weight')])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_numbers_with_which_nothing_computes(tmp_path, config, name, value):
  def spoil(stored):
    stored[name].flat[-1] = value
    return {}

  with pytest.raises(UserError, match=f'Tensor {name} holds NaN or infinite'):
    hf.load_model(with_tensors(tmp_path, spoil, config=config))
