"""GGUF files through transformers, which reads them with tables and formulas of its own."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip('gguf')
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from jaxrl_pt import config as cfg  # noqa: E402
from jaxrl_pt.interop import gguf_file  # noqa: E402
from jaxrl_pt.nn.quant import ternary  # noqa: E402
from tests.parity.test_transformers import (  # noqa: E402
  LLAMA,
  QWEN2,
  QWEN3,
  draw,
  draw_tokens,
  our_logits,
  their_logits,
)

pytestmark = pytest.mark.parity

# Their reader takes no width of a head from the file, and the class's is 128.
WIDE_HEADS = dataclasses.replace(QWEN3, head_dim=128)
TERNARY = dataclasses.replace(WIDE_HEADS, d_model=256, d_ff=512,
                              quant=cfg.Quant('ternary', 'none'))


def dequantised(config, params):
  """The same model with plain weights: codes times scales as a file holds them."""
  layers = {}
  for name, w in params['layers'].items():
    codes, scale = ternary(w) if w.ndim == 3 else (w, 1.0)
    layers[name] = codes * np.float32(np.float16(scale))
  return dataclasses.replace(config, quant=cfg.Quant()), {**params, 'layers': layers}


@pytest.mark.parametrize('config', [LLAMA, QWEN2, WIDE_HEADS, TERNARY],
                         ids=['llama', 'qwen2', 'qwen3', 'ternary'])
def test_logits_of_transformers_from_the_file(tmp_path, config):
  params = draw(config)
  keys = gguf_file.metadata(config, 'TQ2_0', 'tiny', 64) | {
      'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.tokens': [chr(97 + i) for i in range(60)]}
  gguf_file.save_model(tmp_path / 'm.gguf', config, params, keys, 'TQ2_0')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path, gguf_file='m.gguf', dtype=torch.float32)
  if config.quant.weights == 'ternary':
    config, params = dequantised(config, params)
  tokens = draw_tokens()
  reference = their_logits(theirs, tokens)
  assert reference.std() > 0.5
  np.testing.assert_allclose(our_logits(config, params, tokens), reference, rtol=1e-4, atol=1e-4)
