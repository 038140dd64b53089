"""Adapters beside those of the library PEFT: logits both ways, and the gradient of a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.interop import huggingface as hf
from jaxrl_pt.interop import peft as ours
from jaxrl_pt.models import adapters, transformer
from jaxrl_pt.parallel.mesh import make_mesh

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
theirs = pytest.importorskip('peft', reason='peft is not installed: `make parity`')
pytestmark = pytest.mark.parity

MODEL = cfg.Model(num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=8,
                  vocab_size=97, tied_head=False, norm_epsilon=1e-6, qkv_bias=True)
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 12)).astype(np.int32)


def draw(config):
  specs = transformer.build(config).specs
  return jax.jit(lambda key: P.init(specs, key))(jax.random.key(0))


def logits(model, params):
  positions = jnp.broadcast_to(jnp.arange(12), TOKENS.shape)
  return model.apply(params, TOKENS, positions, jnp.ones_like(TOKENS)) @ model.head(params)


def their_base(folder):
  hf.save_model(folder, MODEL, draw(MODEL))
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize('stabilized', [False, True])
def test_peft_loads_our_folder(tmp_path, stabilized):
  """Its logits and the gradient of every matrix on the same batch are ours."""
  adapter = cfg.LoRA(4, 10.0, rank_stabilized=stabilized)
  model = transformer.build(dataclasses.replace(MODEL, adapter=adapter))
  params = adapters.adapt(model.specs, draw(MODEL), jax.random.key(1))
  params = jax.tree.map(lambda s, x: x + 0.1 * jnp.sin(jnp.arange(x.size).reshape(x.shape))
                        if s.role == 'adapter' else x, model.specs, params, is_leaf=P.is_spec)
  (tmp_path / 'adapter').mkdir()
  ours.save(tmp_path / 'adapter', adapter, model.specs, params)
  loaded = theirs.PeftModel.from_pretrained(their_base(tmp_path / 'base'), tmp_path / 'adapter',
                                            is_trainable=True)
  got = loaded(torch.from_numpy(TOKENS.astype(np.int64))).logits
  np.testing.assert_allclose(got.detach().numpy(), logits(model, params), atol=1e-4)

  torch.nn.functional.cross_entropy(
      got[:, :-1].reshape(-1, 97), torch.from_numpy(TOKENS[:, 1:].reshape(-1).astype(np.int64))
  ).backward()

  def loss(own):
    logp = jax.nn.log_softmax(logits(model, P.joined(params, own))[:, :-1])
    return -jnp.take_along_axis(logp, TOKENS[:, 1:, None], -1).mean()

  grads = jax.grad(loss)(P.trained(model.specs, params))['layers']
  found = {name: p.grad for name, p in loaded.named_parameters() if p.requires_grad}
  assert len(found) == 2 * 2 * 7
  for name, spec in model.specs['layers'].items():
    for part in 'ab' if name in transformer.PROJECTIONS else '':
      for i in range(2):
        their_name = f'base_model.model.{hf.tensor_name(getattr(spec, part), i)}'
        want = found[their_name.replace('.weight', '.default.weight')].numpy().T
        np.testing.assert_allclose(getattr(grads[name], part)[i], want,
                                   atol=1e-4 * np.abs(want).max())


def test_we_load_pefts_folder(tmp_path):
  settings = theirs.LoraConfig(r=3, lora_alpha=7, target_modules=['v_proj', 'gate_proj'],
                               task_type='CAUSAL_LM', init_lora_weights=False)
  torch.manual_seed(0)
  wrapped = theirs.get_peft_model(their_base(tmp_path / 'base'), settings)
  wrapped.save_pretrained(tmp_path / 'adapter')
  adapter = ours.read_settings(tmp_path / 'adapter')
  assert adapter == cfg.LoRA(3, 7, ('v_proj', 'gate_proj'))
  model = transformer.build(dataclasses.replace(MODEL, adapter=adapter))
  params = P.joined(adapters.adapt(model.specs, draw(MODEL), jax.random.key(1)),
                    ours.load(tmp_path / 'adapter', model.specs, make_mesh(cfg.Mesh())))
  with torch.no_grad():
    want = wrapped.eval()(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()
    merged_want = wrapped.merge_and_unload()(torch.from_numpy(TOKENS.astype(np.int64))).logits
  np.testing.assert_allclose(logits(model, params), want, atol=1e-4)
  plain_model = transformer.build(MODEL)
  np.testing.assert_allclose(logits(plain_model, adapters.merged(params)), merged_want.numpy(),
                             atol=1e-4)
  assert np.abs(want - logits(plain_model, draw(MODEL))).max() > 1e-2
