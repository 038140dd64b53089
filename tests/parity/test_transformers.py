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
from jaxrl_pt.errors import UserError  # noqa: E402
from jaxrl_pt.interop import huggingface as hf  # noqa: E402
from jaxrl_pt.interop import huggingface_config, verify  # noqa: E402
from jaxrl_pt.models import transformer  # noqa: E402
from jaxrl_pt.nn import embed, quant  # noqa: E402
from jaxrl_pt.nn.ops import Ops  # noqa: E402

pytestmark = pytest.mark.parity

LLAMA = cfg.Model(num_layers=3, d_model=32, d_ff=56, num_heads=4, num_kv_heads=2, head_dim=8,
                  vocab_size=60, tied_head=False, norm_epsilon=1e-6)
BITNET = dataclasses.replace(LLAMA, activation='relu2', sub_norm=True, tied_head=True,
                             rope_theta=500_000.0, norm_epsilon=1e-5)


QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, head_dim=12, tied_head=True)
LLAMA3 = dataclasses.replace(LLAMA, rope=cfg.Llama3Rope(8.0, 1.0, 4.0, 32), rope_theta=5e5)


def draw(config):
  specs = transformer.build(config).specs
  params = jax.jit(lambda key: P.init(specs, key))(jax.random.key(0))
  for i, name in enumerate(sorted(params['layers'])):
    if name in ('bq', 'bk', 'bv', 'q_norm', 'k_norm'):  # A model begins with zeros and ones there.
      x = params['layers'][name]
      params['layers'][name] = x + 0.3 * jax.random.normal(jax.random.key(i), x.shape)
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
    LLAMA, dataclasses.replace(LLAMA, tied_head=True, num_kv_heads=1, rope_theta=1e4), LLAMA3,
    QWEN2, QWEN3, BITNET],
    ids=['llama', 'llama_tied', 'llama3', 'qwen2', 'qwen3', 'bitnet'])
def test_unquantised_logits(tmp_path, config):
  params = draw(config)
  hf.save_model(tmp_path, config, params)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  tokens = draw_tokens()
  ours, reference = our_logits(config, params, tokens), their_logits(theirs, tokens)
  assert reference.std() > 0.5
  np.testing.assert_allclose(ours, reference, atol=1e-4)


@pytest.mark.parametrize('tokens', [{}, {'bos_id': 5, 'eos_id': 9}, {'eos_id': 0}])
def test_their_reader_finds_our_tokens(tmp_path, tokens):
  hf.save_model(tmp_path, LLAMA, draw(LLAMA), **tokens)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  for found in (theirs.config, theirs.generation_config):
    assert found.eos_token_id == tokens.get('eos_id')
    assert found.bos_token_id == tokens.get('bos_id')


@pytest.mark.parametrize('kind', ['llama', 'bitnet', 'mistral', 'qwen2', 'qwen3'])
def test_every_key_that_they_write_is_known(kind):
  """Of their default configurations, with all keys, as files of other writers have them."""
  made = {'llama': transformers.LlamaConfig, 'bitnet': transformers.BitNetConfig,
          'mistral': lambda: transformers.MistralConfig(sliding_window=None),
          'qwen2': transformers.Qwen2Config, 'qwen3': transformers.Qwen3Config}[kind]()
  huggingface_config.to_config(json.loads(json.dumps(made.to_dict())), kind)


SCALED = {'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': 8.0, 'low_freq_factor': 1.0,
          'high_freq_factor': 4.0, 'original_max_position_embeddings': 32}
THEIRS = {
    'llama': lambda **sizes: transformers.LlamaConfig(**sizes),
    'llama3': lambda **sizes: transformers.LlamaConfig(
        **{**sizes, 'tie_word_embeddings': True}, rope_parameters=SCALED,
        max_position_embeddings=256),
    'mistral': lambda **sizes: transformers.MistralConfig(**sizes, sliding_window=None),
    'qwen2': lambda **sizes: transformers.Qwen2Config(**sizes),
    'qwen3': lambda **sizes: transformers.Qwen3Config(**sizes, head_dim=12),
    'bitnet': lambda **sizes: transformers.BitNetConfig(**sizes)}


def draw_theirs(kind):
  """A model of theirs whose gains and biases are random, too."""
  torch.manual_seed(0)
  config = THEIRS[kind](
      vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
      num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, initializer_range=0.3,
      tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None)
  theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
  with torch.no_grad():
    for name, x in theirs.named_parameters():
      if 'norm' in name or name.endswith('bias'):
        x.add_(0.2 * torch.randn_like(x))
  return theirs


@pytest.mark.parametrize('kind', THEIRS)
def test_their_checkpoint_computes_and_decodes_the_same(tmp_path, kind):
  theirs = draw_theirs(kind)
  theirs.save_pretrained(tmp_path)
  config, params = hf.load_model(tmp_path)
  tokens = draw_tokens()
  reference = their_logits(theirs, tokens)
  assert reference.std() > 0.5
  np.testing.assert_allclose(our_logits(config, params, tokens), reference, rtol=1e-5, atol=1e-4)
  # If each token that we draw is their likeliest after those before, they draw the same ones.
  drawn = our_greedy(config, params, tokens[:, :8], 64)
  whole = np.concatenate([tokens[:, :8], drawn], 1)
  np.testing.assert_array_equal(their_logits(theirs, whole)[:, 7:-1].argmax(-1), drawn)


def our_greedy(config, params, prompt, num_tokens):
  """i32[B, num_tokens]: the likeliest tokens, one after the other against a cache."""
  model = transformer.build(config)
  rows, length = prompt.shape

  @jax.jit
  def decode(params):
    def logits(hidden):
      return hidden[:, -1] @ model.head(params)

    positions = jnp.broadcast_to(jnp.arange(length), prompt.shape)
    cache = model.init_cache(rows, length + num_tokens)
    hidden, cache = model.extend(params, jnp.asarray(prompt), positions, cache)

    def step(carry, position):
      token, cache = carry
      where = jnp.full((rows, 1), position)
      hidden, cache = model.extend(params, token[:, None], where, cache)
      return (jnp.argmax(logits(hidden), -1), cache), token

    first = jnp.argmax(logits(hidden), -1), cache
    return jax.lax.scan(step, first, jnp.arange(length, length + num_tokens))[1].T

  return np.asarray(decode(params))


def test_scaled_frequencies_are_theirs():
  theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
      transformers.LlamaConfig(head_dim=64, max_position_embeddings=1024, rope_parameters={
          **SCALED, 'factor': 32.0, 'original_max_position_embeddings': 128}))
  cos, sin = embed.rope(jnp.arange(1, 2)[None], 64, 5e5, cfg.Llama3Rope(32.0, 1.0, 4.0, 128))
  angle = np.arctan2(np.asarray(sin, np.float64), cos).ravel()
  np.testing.assert_allclose(angle, theirs.inv_freq.numpy(), rtol=2e-6)


@pytest.mark.parametrize('config', [QWEN2, LLAMA3], ids=['qwen2', 'llama3'])
def test_verify_accepts_an_export_and_refuses_another_model(tmp_path, config):
  params = draw(config)
  hf.save_model(tmp_path, config, params)
  assert verify.check(tmp_path, config, params) < 1e-4
  other = dataclasses.replace(config, rope_theta=100.0)
  with pytest.raises(UserError, match='computes other logits of the export'):
    verify.check(tmp_path, other, params)
  (tmp_path / 'model.safetensors').unlink()
  with pytest.raises(UserError, match='cannot load the export'):
    verify.check(tmp_path, config, params)


@pytest.mark.parametrize('config, packed', [(BITNET, True), (QWEN2, False),
                                            pytest.param(QWEN3, True, marks=pytest.mark.slow)],
                         ids=['bitnet packed', 'qwen2', 'qwen3 packed'])
def test_quantised_exports_are_verified_in_their_arithmetic(tmp_path, config, packed):
  config = dataclasses.replace(config, quant=cfg.Quant('ternary', 'int8'))
  params = draw(config)
  hf.save_model(tmp_path, config, params, packed=packed)
  verify.check(tmp_path, config, params)
  # One scale of seven, and one output of one matrix. (Behind SubLN the scale of W_v is none.)
  for change in (lambda w: w * 1.5, lambda w: w.at[:, :, 0].multiply(-1)):
    other = {**params, 'layers': {**params['layers'], 'wo': change(params['layers']['wo'])}}
    with pytest.raises(UserError, match='computes other logits of the export'):
      verify.check(tmp_path, config, other)


def test_one_scale_for_128_weights_in_both(tmp_path):
  """As latent weights and packed, against the plain weights that the file holds."""
  config = dataclasses.replace(QWEN3, d_model=128, head_dim=32, d_ff=256)
  params = draw(config)
  params['layers'] = {name: quant.as_computed(w, 'ternary_128') if w.ndim == 3 else w
                      for name, w in params['layers'].items()}
  hf.save_model(tmp_path, config, params)
  loaded, latent = hf.load_model(tmp_path)
  assert loaded.quant == cfg.Quant('ternary_128')
  packed = quant.pack(latent, lambda path: path[-1].key.startswith('w'), kind='ternary_128')
  assert packed['layers']['w_down'].scale.shape == (3, 2, 128)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  tokens = draw_tokens()
  reference = their_logits(theirs, tokens)
  for tree in (latent, packed):
    np.testing.assert_allclose(our_logits(loaded, tree, tokens), reference, rtol=1e-5, atol=1e-4)
  assert verify.check(tmp_path, loaded, latent) < 1e-4


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
  random = np.random.default_rng(0)
  with torch.compiler.set_stance('force_eager'):  # They compile it anew for every shape.
    for num_out, num_in in random.integers(1, (22, 10), (2000, 2)):
      codes = random.integers(-1, 2, (num_out, num_in)).astype(np.int8)
      packed = hf.pack(codes)
      theirs = bitnet.unpack_weights(torch.from_numpy(packed), torch.float32).numpy()
      assert np.array_equal(theirs[:num_out], codes)
      if num_out % 4 == 0:  # Their packing leaves out rows of some other heights.
        own = bitnet.pack_weights(torch.from_numpy(codes.copy()).float()).numpy()
        assert np.array_equal(own, packed)


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
