"""Our forward and quantisers against transformers' and PyTorch's."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from jaxrl_pt import config as cfg  # noqa: E402
from jaxrl_pt import params as P  # noqa: E402
from jaxrl_pt.interop import huggingface as hf  # noqa: E402
from jaxrl_pt.interop import huggingface_config  # noqa: E402
from jaxrl_pt.models import transformer  # noqa: E402
from jaxrl_pt.nn import quant  # noqa: E402
from jaxrl_pt.nn.ops import Ops  # noqa: E402

pytestmark = pytest.mark.parity

LLAMA = cfg.Model(num_layers=3, d_model=32, d_ff=56, num_heads=4, num_kv_heads=2, head_dim=8,
                  vocab_size=60, tied_head=False, norm_epsilon=1e-6)
BITNET = dataclasses.replace(LLAMA, activation='relu2', sub_norm=True, tied_head=True,
                             rope_theta=500_000.0, norm_epsilon=1e-5)


def draw(config):
  specs = transformer.build(config).specs
  params = jax.jit(lambda key: P.init(specs, key))(jax.random.key(0))
  return {**params, 'embed': params['embed'] * 20}  # logits of order 1 and larger


def our_logits(config, params, tokens):
  model = transformer.build(config)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

  @jax.jit
  def run(params):
    hidden = model.apply(params, tokens, positions, jnp.ones_like(tokens))
    return hidden @ model.head(params)

  return np.asarray(run(params))


def their_logits(model, tokens):
  with torch.no_grad():
    return model.eval()(torch.from_numpy(tokens).long()).logits.float().numpy()


def draw_tokens():
  return np.random.default_rng(0).integers(0, 60, (2, 24)).astype(np.int32)


@pytest.mark.parametrize('config', [
    LLAMA, dataclasses.replace(LLAMA, tied_head=True, num_kv_heads=1, rope_theta=1e4), BITNET],
    ids=['llama', 'llama_tied', 'bitnet'])
def test_unquantised_logits(tmp_path, config):
  params = draw(config)
  hf.save_model(tmp_path, config, params)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  tokens = draw_tokens()
  ours, reference = our_logits(config, params, tokens), their_logits(theirs, tokens)
  assert reference.std() > 0.5
  np.testing.assert_allclose(ours, reference, atol=2e-4)


@pytest.mark.parametrize('tokens', [{}, {'bos_id': 5, 'eos_id': 9}, {'eos_id': 0}])
def test_their_reader_finds_our_tokens(tmp_path, tokens):
  hf.save_model(tmp_path, LLAMA, draw(LLAMA), **tokens)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  for found in (theirs.config, theirs.generation_config):
    assert found.eos_token_id == tokens.get('eos_id')
    assert found.bos_token_id == tokens.get('bos_id')


@pytest.mark.parametrize('kind', ['llama', 'bitnet'])
def test_every_key_that_they_write_is_known(kind):
  """Of their default configurations, with all keys, as files of other writers have them."""
  made = {'llama': transformers.LlamaConfig, 'bitnet': transformers.BitNetConfig}[kind]()
  huggingface_config.to_config(json.loads(json.dumps(made.to_dict())), kind)


def test_their_checkpoint_imports(tmp_path):
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
      vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
      num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, initializer_range=0.3,
      tie_word_embeddings=False)
  theirs = transformers.LlamaForCausalLM(config)
  theirs.save_pretrained(tmp_path)
  tokens = draw_tokens()
  np.testing.assert_allclose(our_logits(*hf.load_model(tmp_path), tokens),
                             their_logits(theirs, tokens), rtol=1e-4, atol=1e-3)


class TorchBitLinear(torch.nn.Module):
  """The equations of BitNet b1.58 transcribed: absmean ternary times per-token int8."""

  def __init__(self, weight):
    super().__init__()
    self.weight = weight

  def forward(self, x):
    alpha = self.weight.abs().mean().clamp(min=1e-5)
    w = (self.weight / alpha).round().clamp(-1, 1) * alpha
    gamma = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return torch.nn.functional.linear((x / gamma).round().clamp(-128, 127) * gamma, w)


def test_quantised_bitnet_logits(tmp_path):
  config = dataclasses.replace(BITNET, quant=cfg.Quant('ternary', 'int8'))
  params = draw(config)
  hf.save_model(tmp_path, BITNET, params)  # plain, so that no loader of theirs quantises
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  for layer in theirs.model.layers:
    for owner, names in ((layer.self_attn, ('q_proj', 'k_proj', 'v_proj', 'o_proj')),
                         (layer.mlp, ('gate_proj', 'up_proj', 'down_proj'))):
      for name in names:
        setattr(owner, name, TorchBitLinear(getattr(owner, name).weight))
  tokens = draw_tokens()
  ours, reference = our_logits(config, params, tokens), their_logits(theirs, tokens)
  plain = our_logits(BITNET, params, tokens)
  error = np.abs(ours - reference).max(-1)
  # A scale that differs in its last bit may flip a code; such tokens are few and near.
  assert np.median(error) < 5e-4
  assert error.mean() < 0.05 * np.abs(plain - reference).max(-1).mean()


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_quantisers_equal_their_transcription(kind):
  random = np.random.default_rng(0)
  x, w = random.standard_normal((64, 96)), random.standard_normal((96, 32))
  x, w = x.astype(np.float32), w.astype(np.float32)
  tx, tw = torch.from_numpy(x), torch.from_numpy(w)
  alpha = tw.abs().mean()
  t_codes = (tw / (alpha + 1e-8)).round().clamp(-1, 1)
  if kind == 'int8':
    step = tx.abs().amax(-1, keepdim=True) / 127
    x_codes = (tx / step).round().clamp(-128, 127)
  else:
    step = tx.abs().mean(-1, keepdim=True) / 7**0.5
    x_codes = (tx / step).round().clamp(-8, 7)
  codes, scale = quant.activations(jnp.asarray(x), kind)
  np.testing.assert_array_equal(codes, x_codes.numpy())
  np.testing.assert_allclose(scale, step.numpy(), rtol=1e-6)
  codes, scale = quant.ternary(jnp.asarray(w))
  np.testing.assert_array_equal(codes, t_codes.numpy())
  assert float(scale[0, 0]) == pytest.approx(float(alpha), rel=1e-6)


def test_packed_layout_equals_theirs():
  bitnet = pytest.importorskip('transformers.integrations.bitnet')
  codes = np.random.default_rng(0).integers(-1, 2, (24, 10)).astype(np.int8)
  theirs = bitnet.pack_weights(torch.from_numpy(codes.copy()).float()).numpy()
  np.testing.assert_array_equal(hf.pack(codes), theirs)


def test_straight_through_gradients_equal_torch():
  random = np.random.default_rng(0)
  x, w = (random.standard_normal(s).astype(np.float32) for s in ((6, 16), (16, 5)))
  tx, tw = torch.tensor(x, requires_grad=True), torch.tensor(w, requires_grad=True)
  alpha = tw.abs().mean().detach()
  step = tx.abs().amax(-1, keepdim=True).detach() / 127
  x_q = tx + ((tx / step).round() * step - tx).detach()
  w_q = tw + ((tw / alpha).round().clamp(-1, 1) * alpha - tw).detach()
  torch.sin(x_q @ w_q).sum().backward()
  def product(x, w):
    codes, scale = quant.activations(x, 'int8')
    return quant.bit_matmul(x, w, codes, scale, 'int8', Ops().product, ('embed', 'ff'))

  dx, dw = jax.grad(lambda x, w: jnp.sin(product(x, w)).sum(), (0, 1))(
      jnp.asarray(x), jnp.asarray(w))
  np.testing.assert_allclose(dx, tx.grad.numpy(), atol=1e-4)
  np.testing.assert_allclose(dw, tw.grad.numpy(), atol=1e-4)
