"""Low-rank adapters against the plain model, against merged weights and by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import adapters, transformer
from jaxrl_pt.models.base import for_a_loop
from jaxrl_pt.nn.linear import Adapted, linear, low_rank, normed_linear
from jaxrl_pt.nn.norm import rms_norm
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.nn.quant import TernaryWeight, pack, ternary

PLAIN = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8,
                  vocab_size=23, sub_norm=True, qkv_bias=True)
LORA = cfg.LoRA(3, 6.0)
TERNARY = [cfg.Quant('ternary', 'int8'), cfg.Quant('ternary', 'int4', hadamard=True)]
TOKENS = jnp.arange(10).reshape(2, 5) % 23


def of(quant=cfg.Quant(), adapter=LORA):
  return transformer.build(dataclasses.replace(PLAIN, quant=quant, adapter=adapter))


@functools.cache
def latent(quant):
  specs = of(quant, cfg.NoAdapter()).specs
  return jax.jit(lambda key: P.init(specs, key))(jax.random.key(0))


def adapted(model, seed=1):
  adapt = jax.jit(lambda params: adapters.adapt(model.specs, params, jax.random.key(seed)))
  return adapt(latent(model.config.quant))


def moved(model, params):
  """The parameters with a B that is no longer 0, as after some training."""
  keys = iter(jax.random.split(jax.random.key(5), 99))
  return jax.tree.map(
      lambda s, x: x if s.role != 'adapter' else jax.random.normal(next(keys), x.shape) / 3,
      model.specs, params, is_leaf=P.is_spec)


@functools.partial(jax.jit, static_argnums=0)
def logits(apply_and_head, params):
  apply, head = apply_and_head
  positions = jnp.broadcast_to(jnp.arange(5), TOKENS.shape)
  return apply(params, TOKENS, positions, jnp.ones_like(TOKENS)) @ head(params)


def logits_of(model, params):
  return logits((model.apply, model.head), params)


# --- What is frozen, and what is trained ------------------------------------------


@pytest.mark.parametrize('quant', [cfg.Quant(), *TERNARY])
def test_specs_describe_the_adapted_parameters(quant):
  model = of(quant)
  params = adapted(model)
  jax.tree.map(lambda s, x: (s.shape, s.dtype) == (x.shape, x.dtype) or pytest.fail(str(s)),
               P.abstract(model.specs), params)
  drawn = jax.eval_shape(lambda key: P.init(model.specs, key), jax.random.key(0))
  assert jax.tree.structure(drawn) == jax.tree.structure(params)
  mine = P.trained(model.specs, params)
  assert {s.role for s in jax.tree.leaves(P.trained(model.specs, model.specs), is_leaf=P.is_spec)
          } == {'adapter'}
  # r · (in + out) of seven projections: 2 · 16, 2 · (16 + 8), 16 + 16, 3 · (16 + 32); two layers.
  assert P.count(P.trained(model.specs, model.specs)) == 2 * 3 * (32 + 2 * 24 + 32 + 3 * 48)
  joined = P.joined(params, jax.tree.map(lambda x: x + 1, mine))
  for s, old, new in zip(jax.tree.leaves(model.specs, is_leaf=P.is_spec), jax.tree.leaves(params),
                         jax.tree.leaves(joined), strict=True):
    assert (new is old) == (s.role != 'adapter')


def test_only_the_chosen_projections_are_adapted():
  model = of(adapter=cfg.LoRA(2, projections=('q_proj', 'down_proj')))
  layers = model.specs['layers']
  assert {name for name, spec in layers.items() if isinstance(spec, Adapted)} == {'wq', 'w_down'}
  assert not any(s.is_trained for s in jax.tree.leaves(P.frozen(layers, layers), is_leaf=P.is_spec))
  assert all(s.is_trained for s in jax.tree.leaves(
      of(adapter=cfg.NoAdapter()).specs, is_leaf=P.is_spec))


def test_a_ternary_base_takes_two_bits_and_has_the_codes_of_a_bit_linear():
  model = of(TERNARY[0], cfg.LoRA(2, projections=('q_proj',)))
  params = adapted(model)
  for name in ('wq', 'w_up'):
    weight = params['layers'][name]
    weight = weight.base if name == 'wq' else weight  # All are frozen, so all are packed.
    assert isinstance(weight, TernaryWeight) and weight.codes.dtype == jnp.int2
    codes, scale = ternary(latent(TERNARY[0])['layers'][name])
    np.testing.assert_array_equal(weight.codes.astype(jnp.float32), codes)
    np.testing.assert_allclose(weight.scale, scale, rtol=1e-6)
  projections = 2 * (16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 32)
  plain = of(TERNARY[0], cfg.NoAdapter())
  assert (P.num_bytes(plain.specs) - P.num_bytes(model.specs)
          == projections * (4 - 1 / 4) - 2 * 7 * 4 - 2 * 2 * 4 * 32)


# --- What is computed -------------------------------------------------------------


def test_an_adapter_at_its_start_changes_no_bit():
  model, plain = of(), of(adapter=cfg.NoAdapter())
  np.testing.assert_array_equal(logits_of(model, adapted(model)),
                                logits_of(plain, latent(cfg.Quant())))


def test_one_scale_for_128_inputs_stays_one():
  config = cfg.Model(1, 128, 256, 2, 1, 64, 23, quant=cfg.Quant('ternary_128'), adapter=LORA)
  model = transformer.build(config)
  plain = transformer.build(dataclasses.replace(config, adapter=cfg.NoAdapter()))
  params = jax.jit(lambda key: P.init(plain.specs, key))(jax.random.key(0))
  got = adapters.adapt(model.specs, params, jax.random.key(1))
  jax.tree.map(lambda s, x: (s.shape, s.dtype) == (x.shape, x.dtype) or pytest.fail(str(s)),
               P.abstract(model.specs), got)
  assert got['layers']['w_down'].base.scale.shape == (1, 2, 128)
  np.testing.assert_allclose(logits_of(model, got), logits_of(plain, params), atol=2e-6)


@pytest.mark.parametrize('quant', TERNARY)
def test_an_adapted_ternary_model_starts_as_the_packed_one(quant):
  model, plain = of(quant), of(quant, cfg.NoAdapter())
  is_packed = lambda path: path[-1].key in transformer.PROJECTIONS
  packed = pack(latent(quant), is_packed)
  got = logits_of(model, adapted(model))
  np.testing.assert_array_equal(got, logits_of(plain, packed))
  np.testing.assert_allclose(got, logits_of(plain, latent(quant)), atol=2e-6)


@pytest.mark.parametrize('quant', [cfg.Quant(), *TERNARY])
@pytest.mark.parametrize('gain', [False, True])
def test_the_adapter_reads_its_input_before_it_is_rounded_or_rotated(quant, gain):
  keys = jax.random.split(jax.random.key(2), 5)
  x, w, a, b = (jax.random.normal(key, shape) for key, shape in zip(
      keys, ((4, 16), (16, 8), (16, 3), (3, 8)), strict=False))
  g = jax.random.uniform(keys[4], (16,)) if gain else None
  base = TernaryWeight(*ternary(w)) if quant.weights == 'ternary' else w
  got = normed_linear(x, g, 1e-5, Adapted(base, a, b, 2.0), quant, Ops(), ('embed', 'heads'))
  normed = rms_norm(x, g, 1e-5) if gain else x
  want = normed_linear(x, g, 1e-5, base, quant, Ops(), ('embed', 'heads'))
  np.testing.assert_allclose(got, want + 2.0 * (normed @ a) @ b, rtol=1e-5, atol=1e-5)
  plain = linear(x, Adapted(base, a, b, 2.0), quant, Ops(), ('embed', 'heads'))
  np.testing.assert_allclose(plain, linear(x, base, quant, Ops(), ('embed', 'heads'))
                             + low_rank(x, Adapted(base, a, b, 2.0)), rtol=1e-6)


@pytest.mark.parametrize('stabilized, scale', [(False, 6.0 / 3), (True, 6.0 / 3**0.5)])
def test_merged_weights_compute_the_same(stabilized, scale):
  model = of(adapter=cfg.LoRA(3, 6.0, rank_stabilized=stabilized))
  params = moved(model, adapted(model))
  weight = params['layers']['wo']
  assert weight.scale == pytest.approx(scale)
  merged = adapters.merged(params)
  assert jax.tree.structure(merged) == jax.tree.structure(latent(cfg.Quant()))
  np.testing.assert_allclose(merged['layers']['wo'], weight.base + scale * weight.a @ weight.b,
                             atol=1e-5)
  got, want = logits_of(of(adapter=cfg.NoAdapter()), merged), logits_of(model, params)
  assert np.abs(want - logits_of(model, adapted(model))).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_adapters_of_a_ternary_model_are_not_merged():
  with pytest.raises(UserError, match='no ternary codes: export the adapters with --format peft'):
    adapters.merged(adapted(of(TERNARY[0])))


def test_the_gradient_follows_from_that_of_the_merged_weights():
  """dA = c · dW Bᵀ and dB = c · Aᵀ dW, where dW is the gradient of W + c · A B."""
  model, plain = of(), of(adapter=cfg.NoAdapter())
  params = moved(model, adapted(model))
  weights = jax.random.normal(jax.random.key(9), (2, 5, 23))
  loss = lambda model: lambda params: (logits_of(model, params) * weights).sum()
  own = P.trained(model.specs, params)
  got = jax.grad(lambda own: loss(model)(P.joined(params, own)))(own)['layers']
  merged = jax.grad(loss(plain))(adapters.merged(params))['layers']
  for name in transformer.PROJECTIONS:
    weight, dw = params['layers'][name], np.asarray(merged[name], np.float64)
    b_t, a_t = (np.swapaxes(np.asarray(x, np.float64), 1, 2) for x in (weight.b, weight.a))
    largest = np.abs(dw).max()
    np.testing.assert_allclose(got[name].a, 2.0 * dw @ b_t, atol=1e-4 * largest)
    np.testing.assert_allclose(got[name].b, 2.0 * a_t @ dw, atol=1e-4 * largest)
    assert got[name].base is None


@pytest.mark.parametrize('quant', [cfg.Quant(), TERNARY[0]])
def test_layers_in_a_loop_compute_the_same(quant):
  """As the sampler reads a packed model, whose layers are no longer stacked."""
  model = of(quant, cfg.LoRA(3, projections=('v_proj',)))
  params = moved(model, adapted(model))
  looped = for_a_loop(params, 2)
  assert isinstance(looped['layers'], tuple) == (quant.weights == 'ternary')
  np.testing.assert_allclose(logits_of(model, looped), logits_of(model, params), atol=1e-5)


def test_adapting_twice_changes_nothing():
  model = of(TERNARY[0])
  once = moved(model, adapted(model))
  again = adapters.adapt(model.specs, once, jax.random.key(3))
  jax.tree.map(np.testing.assert_array_equal, once, again)
