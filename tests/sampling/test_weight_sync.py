"""What arrives at the sampler is what left the trainer, in another layout."""

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
from jaxrl_pt.nn import packed as packed_weights
from jaxrl_pt.nn import quant
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.sampling import branch, engine, groups, weight_sync

CONFIG = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8,
                   vocab_size=19, quant=cfg.Quant('ternary', 'int8'))
MODEL = transformer.build(CONFIG)
PARAMS = P.init(MODEL.specs, jax.random.key(0))
MESH = make_mesh(cfg.Mesh(fsdp=1))


@pytest.mark.parametrize('packed', [False, True])
def test_the_copy_outlives_the_trainers_parameters(packed):
  params = jax.tree.map(jnp.copy, PARAMS)
  policy = weight_sync.make_weight_sync(MODEL, MESH, packed)(params, 3)
  assert policy.version == 3 and len(policy.checksum) == len(jax.tree.leaves(policy.params))
  jax.tree.map(lambda x: x.delete(), params)  # As a step that donates its state would.
  expected = PARAMS['layers']['wq']
  got = policy.params['layers']['wq']
  if packed:
    assert got.codes.dtype == jnp.int2
    assert weight_sync.abstract(MODEL, MESH, True)['layers']['wq'].codes.shape == expected.shape
  else:
    np.testing.assert_array_equal(got, expected)


def test_one_scale_for_128_weights_arrives_as_such():
  config = dataclasses.replace(CONFIG, d_model=128, d_ff=256, head_dim=64,
                               quant=cfg.Quant('ternary_128'))
  model = transformer.build(config)
  params = P.init(model.specs, jax.random.key(0))
  got = weight_sync.make_weight_sync(model, MESH, True)(params, 0).params['layers']['w_down']
  latent = np.asarray(params['layers']['w_down']).reshape(2, 2, 128, 128)
  np.testing.assert_array_equal(got.scale, np.abs(latent).max(2))
  assert got.codes.dtype == jnp.int2


def test_what_changes_on_the_way_is_named(monkeypatch):
  moved = weight_sync._moved
  monkeypatch.setattr(weight_sync, '_moved', lambda sharding, dtype, x: moved(
      sharding, dtype, x + (x.ndim == 2)))  # The embedding and two gains of layers arrive changed.
  with pytest.raises(RuntimeError, match='parameters changed on their way to the sampler: .*embed'):
    weight_sync.make_weight_sync(MODEL, MESH, packed=False)(PARAMS, 0)


def drawer(model):
  """draw(params) → the rollouts of two prompts of one document."""
  prompts = branch.documents(jnp.array([[1, 2, 3]]), jnp.array([[3, 2]]), jnp.array([[0, 1]]))
  draw = jax.jit(functools.partial(
      groups.generate, model, sampler=cfg.Sampler(), num_samples=2, num_tokens=6))
  return lambda params: draw(params, prompts, jax.random.key(1))


@pytest.mark.slow  # Below, `generate` draws from packed weights with quantised tables and adapters.
def test_packed_and_latent_policies_draw_the_same_in_the_engine():
  sizes = cfg.Engine(slots=2, queue=8, prompt_len=8, response_len=8, page_size=4,
                     prefill_chunk=8)
  drawn = []
  for packed in (False, True):
    policy = weight_sync.make_weight_sync(MODEL, MESH, packed)(PARAMS, 0)
    one = engine.Engine(MODEL, policy.params, sizes, seed=1, token_bytes=[b'a'] * 19,
                        mesh=MESH)
    drawn.append([r.tokens.tolist() for r in one.run([engine.Request((1, 2), 0, 8, 4)])[0]])
  assert drawn[0] == drawn[1]


@pytest.mark.parametrize('weights', ['none', 'ternary'])
def test_a_policy_rounded_on_the_way_draws_the_same(weights):
  """To bfloat16, which the sampler computes in; a BitLinear's latent weights stay float32."""
  model = transformer.build(dataclasses.replace(CONFIG, quant=cfg.Quant(
      weights, 'int8' if weights == 'ternary' else 'none')), cfg.Compute(dtype='bfloat16'))
  whole, rounded = (weight_sync.make_weight_sync(model, MESH, False, dtype)(PARAMS, 0)
                    for dtype in ('float32', 'bfloat16'))
  layer = rounded.params['layers']
  assert layer['wq'].dtype == ('bfloat16' if weights == 'none' else 'float32')
  assert (rounded.params['embed'].dtype, layer['attn_norm'].dtype) == ('bfloat16', 'float32')
  if weights == 'ternary':  # What is drawn differs from the other case in what was not rounded.
    return
  one, other = map(drawer(model), (whole.params, rounded.params))
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_change_on_the_way_is_named():
  sums = weight_sync.make_weight_sync(MODEL, MESH, False)(PARAMS, 0).checksum
  other = {**sums, 'layers/wq': sums['layers/wq'] ^ 1}
  with pytest.raises(RuntimeError, match='1 of .* parameters changed .*layers/wq'):
    weight_sync.check(sums, other)


def test_only_ternary_weights_are_packed():
  plain = transformer.build(cfg.Model(num_layers=1, d_model=16, d_ff=32, num_heads=2,
                                      num_kv_heads=1, head_dim=8, vocab_size=19))
  with pytest.raises(ValueError, match='ternary'):
    weight_sync.make_weight_sync(plain, MESH, True)


@pytest.mark.parametrize('weights', ['none', 'ternary'])
def test_frozen_parameters_move_once_and_adapters_in_every_sync(weights):
  model = transformer.build(dataclasses.replace(
      CONFIG, adapter=cfg.LoRA(2, projections=('q_proj', 'down_proj')),
      quant=cfg.Quant(weights, 'int8' if weights == 'ternary' else 'none')))
  params = jax.jit(lambda params: adapters.adapt(model.specs, params, jax.random.key(1)))(PARAMS)
  sync = weight_sync.make_weight_sync(model, MESH, weights == 'ternary')
  first = sync(params, 0)
  assert first.num_bytes == P.num_bytes(model.specs)
  assert len(first.checksum) == len(jax.tree.leaves(params))
  moved = P.joined(params, jax.tree.map(lambda x: x + 1, P.trained(model.specs, params)))
  # A sync that read the frozen parameters again would fail, or take over what is in their place.
  second = sync(P.joined(jax.tree.map(jnp.zeros_like, params), P.trained(model.specs, moved)), 1)
  num_adapters = 2 * 2 * (16 + 16 + 32 + 16)
  assert second.num_bytes == 4 * num_adapters and len(second.checksum) == 4
  assert (first.version, second.version) == (0, 1)
  jax.tree.map(np.testing.assert_array_equal, (first.params, second.params), (params, moved))


# --- What one device holds, and quantised tables ------------------------------------------


@pytest.mark.parametrize('dtype, tied', [
    ('float32', True), ('bfloat16', False), pytest.param('float32', False, marks=pytest.mark.slow),
    pytest.param('bfloat16', True, marks=pytest.mark.slow)])
def test_one_device_draws_the_same_from_packed_weights(tied, dtype):
  config = dataclasses.replace(CONFIG, tied_head=tied)
  model = transformer.build(config, cfg.Compute(dtype=dtype))
  params = P.init(model.specs, jax.random.key(0))
  held = jax.jit(weight_sync.for_one_device(model, jax.devices()[0], dtype, packed=True))(params)
  wq = held['layers']['wq']
  assert isinstance(wq, packed_weights.TernaryBytes)
  assert wq.bytes.nbytes * 16 == params['layers']['wq'].nbytes
  one, other = map(drawer(model), (params, held))
  np.testing.assert_array_equal(one.tokens, other.tokens)
  np.testing.assert_allclose(one.logp, other.logp, atol=1e-5 if dtype == 'float32' else 0.05)


@pytest.mark.parametrize('head', [pytest.param('model', marks=pytest.mark.slow), 'int8'])
def test_the_base_of_an_adapted_ternary_model_is_packed_once_head_and_all(head):
  model = transformer.build(dataclasses.replace(
      CONFIG, adapter=cfg.LoRA(2, projections=('q_proj', 'down_proj')),
      quant=cfg.Quant('ternary', 'int8')))
  params = jax.jit(lambda params: adapters.adapt(model.specs, params, jax.random.key(1)))(PARAMS)
  params = P.joined(params, jax.tree.map(lambda x: x + 0.1, P.trained(model.specs, params)))
  device = jax.devices()[0]
  on_mesh = weight_sync.make_weight_sync(model, MESH, True, 'float32', head)
  on_one = weight_sync.make_sync_on_one_device(model, device, 'float32', head, True)
  in_step = jax.jit(weight_sync.for_one_device(model, device, 'float32', head, True))
  moved = P.joined(params, jax.tree.map(lambda x: x + 1, P.trained(model.specs, params)))
  forgotten = P.joined(jax.tree.map(jnp.zeros_like, params), P.trained(model.specs, moved))
  first = on_mesh(params, 0).params, on_one(params)
  second = on_mesh(forgotten, 1).params, on_one(forgotten)
  assert isinstance(second[0]['layers']['wq'].base, quant.TernaryWeight)
  assert isinstance(second[1]['layers']['wq'].base, packed_weights.TernaryBytes)
  assert isinstance(second[1]['embed'], packed_weights.QuantizedTable) == (head == 'int8')
  jax.tree.map(np.testing.assert_array_equal, (first[1], second[1]), (in_step(params),
                                                                      in_step(moved)))
  draw = drawer(model)
  for whole, read in ((params, first), (moved, second)):
    if head == 'int8':  # Embedding and head are those that the table stands for.
      whole = {**whole, 'embed': packed_weights.dequantised(read[1]['embed'], jnp.float32)}
    expected, *drawn = map(draw, (whole, *read))
    for one in drawn:
      np.testing.assert_array_equal(one.tokens, expected.tokens)
      np.testing.assert_allclose(one.logp, expected.logp, atol=1e-4)


def test_a_sampler_reads_the_trainers_own_weights_if_nothing_else_is_said():
  device = jax.devices()[0]
  for make in (weight_sync.for_one_device, weight_sync.make_sync_on_one_device):
    assert make(MODEL, device, 'float32')(PARAMS) is PARAMS
    assert make(MODEL, device, 'float32', 'int8')(PARAMS)['layers']['wq'] is not PARAMS


@pytest.mark.parametrize('weights', ['none', 'ternary_128'])
def test_weights_that_a_cpu_cannot_hold_packed_are_refused(weights):
  model = transformer.build(dataclasses.replace(CONFIG, d_model=128, d_ff=128,
                                                num_heads=16, quant=cfg.Quant(weights)))
  with pytest.raises(UserError, match=f"Quant.weights is '{weights}': leave Slots.packed or"):
    weight_sync.for_one_device(model, jax.devices()[0], 'float32', packed=True)


@pytest.mark.parametrize('head, error, share', [
    ('int8', 0.01, 4), pytest.param('int4', 0.2, 8, marks=pytest.mark.slow)])
@pytest.mark.parametrize('tied', [True, False])
def test_quantised_tables_arrive_and_draw_near(head, error, share, tied):
  """What is drawn has the log-probabilities of the dequantised tables."""
  model = transformer.build(dataclasses.replace(CONFIG, tied_head=tied))
  params = P.init(model.specs, jax.random.key(0))
  policy = weight_sync.make_weight_sync(model, MESH, True, 'float32', head)(params, 0)
  names = ['embed'] if tied else ['embed', 'head']
  for name in names:
    table = policy.params[name]
    assert table.codes.nbytes * share == params[name].nbytes and table.scale.shape == (19,)
    whole = packed_weights.dequantised(table, jnp.float32)
    np.testing.assert_allclose(whole if name == 'embed' else whole.T, params[name],
                               atol=error * float(jnp.abs(params[name]).max()))
  spelt = {**params, **{name: packed_weights.dequantised(policy.params[name], jnp.float32)
                        for name in names}}
  if not tied:
    spelt['head'] = spelt['head'].T
  one, other = map(drawer(model), (policy.params, spelt))
  np.testing.assert_array_equal(one.tokens, other.tokens)
  np.testing.assert_allclose(one.logp, other.logp, atol=1e-4)
  laid_out = weight_sync.abstract(model, MESH, True, 'float32', head)
  kinds = lambda tree: jax.tree.map(lambda x: f'{x.dtype}{x.shape}', tree)
  assert kinds(laid_out) == kinds(policy.params)
