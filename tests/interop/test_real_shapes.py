"""The shapes and parameter counts of real models, from their config.json alone."""

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.interop.huggingface_config import to_config
from jaxrl_pt.models import transformer

QWEN2 = {'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2', 'hidden_act': 'silu',
         'attention_dropout': 0.0, 'bos_token_id': 151643, 'eos_token_id': 151643,
         'max_position_embeddings': 32768, 'max_window_layers': 28, 'rms_norm_eps': 1e-6,
         'rope_theta': 1e6, 'sliding_window': 32768, 'tie_word_embeddings': False,
         'torch_dtype': 'bfloat16', 'use_cache': True, 'use_mrope': False,
         'use_sliding_window': False, 'vocab_size': 152064}
QWEN3 = {'architectures': ['Qwen3ForCausalLM'], 'model_type': 'qwen3', 'hidden_act': 'silu',
         'attention_bias': False, 'attention_dropout': 0.0, 'head_dim': 128,
         'max_position_embeddings': 40960, 'max_window_layers': 28, 'num_key_value_heads': 8,
         'rms_norm_eps': 1e-6, 'rope_scaling': None, 'rope_theta': 1000000, 'sliding_window': None,
         'tie_word_embeddings': True, 'use_sliding_window': False, 'vocab_size': 151936}
LLAMA3 = {'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'hidden_act': 'silu',
          'attention_bias': False, 'attention_dropout': 0.0, 'initializer_range': 0.02,
          'max_position_embeddings': 131072, 'mlp_bias': False, 'num_key_value_heads': 8,
          'pretraining_tp': 1, 'rms_norm_eps': 1e-5, 'rope_theta': 500000.0,
          'tie_word_embeddings': False, 'vocab_size': 128256}
MISTRAL = {'architectures': ['MistralForCausalLM'], 'model_type': 'mistral', 'hidden_act': 'silu',
           'max_position_embeddings': 32768, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-5,
           'rope_theta': 1000000.0, 'sliding_window': None, 'tie_word_embeddings': False}
BITNET = {'architectures': ['BitNetForCausalLM'], 'model_type': 'bitnet', 'hidden_act': 'relu2',
          'max_position_embeddings': 4096, 'num_key_value_heads': 5, 'rms_norm_eps': 1e-5,
          'rope_theta': 500000.0, 'tie_word_embeddings': True, 'vocab_size': 128256,
          'auto_map': {'AutoConfig': 'configuration_bitnet.BitNetConfig'},
          'quantization_config': {'quant_method': 'bitnet', 'linear_class': 'autobitlinear',
                                  'quantization_mode': 'offline'}}


def sizes(d_model, d_ff, num_layers, num_heads, **others):
  return {'hidden_size': d_model, 'intermediate_size': d_ff, 'num_hidden_layers': num_layers,
          'num_attention_heads': num_heads, **others}


def kv(num_heads, **others):
  return {'num_key_value_heads': num_heads, **others}


def llama_rope(factor):
  return {'rope_scaling': {'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': 1.0,
                           'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}}


TIED = {'tie_word_embeddings': True, 'vocab_size': 151936}
# The number of parameters is that of each model's safetensors files.
MODELS = {
    'Qwen2.5-0.5B': (QWEN2 | sizes(896, 4864, 24, 14) | kv(2) | TIED, 494_032_768),
    'Qwen2.5-1.5B': (QWEN2 | sizes(1536, 8960, 28, 12) | kv(2) | TIED, 1_543_714_304),
    'Qwen2.5-3B': (QWEN2 | sizes(2048, 11008, 36, 16) | kv(2) | TIED, 3_085_938_688),
    'Qwen2.5-7B': (QWEN2 | sizes(3584, 18944, 28, 28) | kv(4), 7_615_616_512),
    'Qwen2.5-14B': (QWEN2 | sizes(5120, 13824, 48, 40) | kv(8, rms_norm_eps=1e-5), 14_770_033_664),
    'Qwen2.5-32B': (QWEN2 | sizes(5120, 27648, 64, 40) | kv(8, rms_norm_eps=1e-5), 32_763_876_352),
    'R1-Distill-Qwen-1.5B': (
        QWEN2 | sizes(1536, 8960, 28, 12) | kv(2, rope_theta=10000, vocab_size=151936),
        1_777_088_000),
    'R1-Distill-Qwen-7B': (
        QWEN2 | sizes(3584, 18944, 28, 28) | kv(4, rope_theta=10000), 7_615_616_512),
    'R1-Distill-Llama-8B': (
        LLAMA3 | sizes(4096, 14336, 32, 32) | llama_rope(8.0), 8_030_261_248),
    'Llama-3.1-70B': (LLAMA3 | sizes(8192, 28672, 80, 64) | llama_rope(8.0), 70_553_706_496),
    'Llama-3.2-1B': (
        LLAMA3 | sizes(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True)
        | llama_rope(32.0), 1_235_814_400),
    'Llama-3.2-3B': (
        LLAMA3 | sizes(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True)
        | llama_rope(32.0), 3_212_749_824),
    'Qwen3-0.6B': (QWEN3 | sizes(1024, 3072, 28, 16), 596_049_920),
    'Qwen3-1.7B': (QWEN3 | sizes(2048, 6144, 28, 16), 1_720_574_976),
    'Qwen3-4B': (QWEN3 | sizes(2560, 9728, 36, 32), 4_022_468_096),
    'Qwen3-8B': (QWEN3 | sizes(4096, 12288, 36, 32, tie_word_embeddings=False), 8_190_735_360),
    'Mistral-7B-v0.3': (MISTRAL | sizes(4096, 14336, 32, 32, vocab_size=32768), 7_248_023_552),
    'BitNet-b1.58-2B-4T': (BITNET | sizes(2560, 6912, 30, 20), 2_412_820_480)}


@pytest.mark.parametrize('name', MODELS)
def test_real_models_have_their_numbers_of_parameters(name):
  settings, count = MODELS[name]
  config = to_config(settings, name)
  assert P.count(transformer.build(config).specs) == count
  assert config.rope_theta == settings['rope_theta']
  assert config.norm_epsilon == settings['rms_norm_eps']
  assert config.qkv_bias == name.startswith(('Qwen2.5', 'R1-Distill-Qwen'))
  assert config.qk_norm == name.startswith('Qwen3')
  assert isinstance(config.rope, cfg.Llama3Rope) == ('rope_scaling' in settings
                                                     and settings['rope_scaling'] is not None)
