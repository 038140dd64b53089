"""The model of a game: how it begins, what it sees, and that a condition costs no parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import dit, vae, world
from jaxrl_pt.models import told as tellings
from jaxrl_pt.models.told import Shape, Told
from jaxrl_pt.nn import images

SHAPE = Shape(frame=(8, 12), display_rows=2, num_actions=3, stay=1, num_events=2, digits=(3, 2),
              num_contents=4, view=(1, 3), grid=(2, 0, 4, 4))
CONFIG = cfg.DiT(num_layers=2, d_model=16, d_ff=32, num_heads=2, patch=4,
                 logic=cfg.LogicNet(8, 16))
B = 3


def quick(function):
  return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})


def build(**changes):
  return world.build(dataclasses.replace(CONFIG, **changes), SHAPE)


@functools.cache
def params_of(config: cfg.DiT, scale: float = 0.3):
  """Parameters away from their beginning, where most of the model says nothing."""
  rng = np.random.default_rng(0)
  draw = lambda spec: jnp.asarray(scale * rng.normal(size=spec.shape), jnp.float32)
  return P.map_specs(draw, world.build(config, SHAPE).specs)


def first_params(model):
  """Those that begin at zero are zero, as in a new model; the others are any."""
  return jax.tree.map(lambda spec, x: 0 * x if spec.init is P.zeros else x, model.specs,
                      params_of(model.config), is_leaf=P.is_spec)


def inputs():
  rng = np.random.default_rng(1)
  past, noisy = (jnp.asarray(rng.normal(size=(B, 8, 12, channels)), jnp.float32)
                 for channels in (6, 3))
  told = Told(jnp.array([0, 1, 2]), jnp.array([[7, 1], [123, 45], [999, 99]]),
              jnp.array([[[0, -1, 3]], [[1, 2, -1]], [[-1, -1, -1]]]))
  return past, noisy, jnp.array([0.2, 0.5, 1.0]), told, jnp.zeros(B, int), jnp.zeros(B, int)


@functools.cache
def compiled(config: cfg.DiT):
  return quick(world.build(config, SHAPE).denoise)


def said(model, params, *args):
  return compiled(model.config)(params, *args)[0]


def test_a_model_begins_with_nothing_to_say():
  model = build()
  params = first_params(model)
  # Yet its first step changes it: the gradient of what it says is not zero.
  grads, out = quick(jax.grad(lambda p: ((y := model.denoise(p, *inputs())[0]).sum(), y),
                              has_aux=True))(params)
  assert np.abs(out).max() == 0 and np.abs(grads['final']['out']).max() > 0.1


def test_a_block_begins_as_the_identity():
  params = first_params(build())
  tokens = jnp.asarray(np.random.default_rng(2).normal(size=(B, 7, 16)), jnp.float32)
  blocks = quick(dit.build(CONFIG, cfg.Compute(), lambda x, axes: x, world.Ops()))
  np.testing.assert_array_equal(blocks(params['layers'], tokens, jnp.ones((B, 16))), tokens)
  assert np.abs(blocks(params_of(CONFIG)['layers'], tokens, jnp.ones((B, 16))) - tokens).max() > 1


def _changed(told: Told, **changes) -> Told:
  return dataclasses.replace(told, **changes)


CHANGES = {
    'action': lambda told: _changed(told, action=told.action[::-1]),
    'values': lambda told: _changed(told, counters=told.counters.at[1, 0].set(124)),
    'map': lambda told: _changed(told, crop=told.crop.at[0, 0, 0].set(2))}


@pytest.mark.parametrize('name', [
    pytest.param('action', marks=pytest.mark.slow), pytest.param('values', marks=pytest.mark.slow),
    'map'])
def test_a_condition_matters_where_the_model_is_told_it_and_costs_no_parameters(name):
  model, args = build(), inputs()
  deaf = build(conditions=cfg.Conditions(**{name: False}))
  assert P.map_specs(lambda s: s.shape, deaf.specs) == P.map_specs(lambda s: s.shape, model.specs)
  params = params_of(CONFIG)
  other = args[:3] + (CHANGES[name](args[3]),) + args[4:]
  change = np.abs(said(model, params, *args) - said(model, params, *other)).max((1, 2, 3))
  row = {'action': [0, 2], 'values': [1], 'map': [0]}[name]
  assert (change[row] > 1e-3).all() and np.delete(change, row).max() == 0
  np.testing.assert_array_equal(said(deaf, params, *args), said(deaf, params, *other))
  assert np.abs(said(deaf, params, *args) - said(model, params, *args)).max() > 1e-3


@pytest.mark.slow
def test_the_past_its_noise_and_the_level_matter():
  model, params, args = build(), params_of(CONFIG), inputs()
  base = said(model, params, *args)
  for place, value in ((0, args[0] + 0.1), (1, args[1] + 0.1), (2, args[2] * 0.9),
                       (4, jnp.ones(B, int))):
    other = args[:place] + (value,) + args[place + 1:]
    assert np.abs(said(model, params, *other) - base).max() > 1e-3
  sized = build(step_sizes=3)
  params = params_of(sized.config)
  assert np.abs(said(sized, params, *args) - said(sized, params, *args[:5], jnp.ones(B, int))
                ).max() > 1e-3


def test_map_channels_are_painted_where_the_cells_are():
  channels = np.asarray(tellings.map_channels(SHAPE, inputs()[3].crop))
  expected = np.zeros((B, 8, 12, 5))
  for b, row in enumerate(inputs()[3].crop[:, 0].tolist()):
    for cell, content in enumerate(row):
      if content >= 0:
        expected[b, 2:6, 4 * cell:4 * cell + 4, [content, 4]] = 1
  np.testing.assert_array_equal(channels, expected)
  assert tellings.map_channels(SHAPE._replace(num_contents=0), jnp.zeros((B, 0, 0), int)).size == 0


def test_digits_of_counters():
  assert tellings.digits_of(SHAPE, inputs()[3].counters).tolist() == [
      [0, 0, 7, 0, 1], [1, 2, 3, 4, 5], [9, 9, 9, 9, 9]]


def test_patches_are_cut_row_by_row_and_put_back():
  x = jnp.arange(2 * 8 * 12 * 3.0).reshape(2, 8, 12, 3)
  patches = images.patchify(x, 4)
  np.testing.assert_array_equal(patches[1, 4], x[1, 4:, 4:8].reshape(-1))
  np.testing.assert_array_equal(images.unpatchify(patches, 4, (8, 12)), x)
  places = images.positions_2d(2, 3, 16)
  assert len({tuple(row) for row in places.tolist()}) == 6 and np.abs(places).max() <= 1
  np.testing.assert_allclose(places[4, :4], np.sin(1.0 / 10_000 ** (np.arange(4) / 4)), rtol=1e-6)


def test_the_past_is_the_last_frames_in_order():
  model, told = build(), inputs()[3]
  frames = [jnp.full((B, 8, 12, 3), float(n)) for n in range(4)]
  past = model.begin({}, frames[0], told)
  np.testing.assert_array_equal(past[0, 0, 0], [0] * 6)
  for frame in frames[1:]:
    past = model.remember({}, past, frame, told)
  np.testing.assert_array_equal(past[0, 0, 0], [2] * 3 + [3] * 3)


def test_logic_net_sees_the_past_and_the_action_and_sends_no_gradient_back():
  model, params, (past, *_) = build(), params_of(CONFIG, 0.1), inputs()
  action = jnp.array([0, 1, 2])
  events = quick(model.events)
  logits = events(params, past, action)
  assert logits.shape == (B, 2) and logits.dtype == jnp.float32
  assert np.abs(logits - events(params, past, action[::-1]))[[0, 2]].min() > 1e-6
  # One pixel in a corner: what the last convolution says is read place by place.
  assert np.abs(logits - events(params, past.at[:, 0, 0].add(9.0), action)).min() > 1e-6
  into_past = quick(jax.grad(lambda x: model.events(params, x, action).sum()))(past)
  assert np.abs(into_past).max() == 0
  assert np.abs(events(first_params(model), past, action)).max() == 0


@pytest.mark.slow
@pytest.mark.parametrize('quant, sub_norm', [
    (cfg.Quant('ternary', 'int8'), True), (cfg.Quant('ternary', 'int4', hadamard=True), True)],
    ids=['W1.58A8', 'W1.58A4, rotated'])
def test_a_ternary_model_is_computed_with_its_codes(quant, sub_norm):
  """It equals itself with ternary weights in place of its own, and gradients pass straight."""
  from jaxrl_pt.nn.quant import dequantised, ternary
  model, args = build(quant=quant, sub_norm=sub_norm), inputs()
  params = params_of(model.config)
  layers = {name: dequantised(*ternary(w)) if name in dit.PROJECTIONS else w
            for name, w in params['layers'].items()}
  base = said(model, params, *args)
  assert np.abs(base - said(build(sub_norm=sub_norm), params, *args)).max() > 1e-2
  grads = quick(jax.grad(lambda p: model.denoise(p, *args)[0].sum()))(params)
  assert all(np.abs(grads['layers'][name]).max() > 0 for name in dit.PROJECTIONS)
  # Ternary weights have another absmean than the weights that they are made of; their codes, and so
  # what is computed but for a factor of each matrix, stay.
  codes = {name: np.asarray(ternary(w)[0]) for name, w in layers.items() if name in dit.PROJECTIONS}
  for name, mine in codes.items():
    np.testing.assert_array_equal(mine, ternary(params['layers'][name])[0])


def test_patches_that_do_not_divide_a_frame_are_refused():
  with pytest.raises(UserError, match='DiT.patch = 5 does not divide a frame of 8 × 12'):
    build(patch=5)
  with pytest.raises(UserError, match='rotates DiT.d_ff = 22'):
    build(d_ff=22, quant=cfg.Quant('ternary', 'int4', hadamard=True))


def test_counts():
  """Blocks of 12 D² with F = 4 D, modulation of 6 D² + 6 D, as in DiT-S (2212.09748)."""
  blocks = dit.specs(cfg.DiT(12, 384, 1536, 6, 2))
  assert P.count(blocks) == 12 * (12 * 384**2 + 6 * 384**2 + 6 * 384) == 31_878_144
  decayed = {name for name, spec in blocks.items() if spec.is_decayed}
  assert decayed == {*dit.PROJECTIONS, 'modulation'}


# --- The recurrent form, and latents ------------------------------------------------

RECURRENT = dict(past=cfg.Recurrent(5), patch=2,
                 space=cfg.VAE(base=4, multipliers=(1, 2), num_blocks=1, latent_channels=3,
                               offset=0.5, scale=2.0))


def recurrent_inputs():
  rng = np.random.default_rng(1)
  past, noisy = (jnp.asarray(rng.normal(size=(B, 4, 6, channels)), jnp.float32)
                 for channels in (5, 3))
  return (past, noisy, *inputs()[2:])


@pytest.mark.slow
def test_a_hidden_state_follows_from_each_pass():
  model, (past, noisy, time, told, *none) = build(**RECURRENT), recurrent_inputs()
  assert model.frame_shape == (4, 6, 3)
  params, denoise = params_of(model.config), quick(model.denoise)
  out, following = denoise(params, past, noisy, time, told, *none)
  assert out.shape == noisy.shape and following.shape == past.shape
  for place, changed in ((0, past + 0.1), (1, noisy + 0.1), (2, time * 0.9)):
    args = [past, noisy, time]
    args[place] = changed
    other, after = denoise(params, *args, told, *none)
    assert np.abs(other - out).max() > 1e-3 and np.abs(after - following).max() > 1e-3
  # A frame that is given is a pass at noise level 0.
  _, expected = denoise(params, past, noisy, 0 * time, told, *none)
  np.testing.assert_allclose(quick(model.remember)(params, past, noisy, told), expected, atol=1e-5)
  _, expected = denoise(params, model.start(params, B), noisy, 0 * time, told, *none)
  np.testing.assert_allclose(quick(model.begin)(params, noisy, told), expected, atol=1e-5)
  assert model.drawn(following, noisy) is following
  # What is said is read from the next state alone: C4 ResBlock(z').
  p = params['hidden']
  block = (images.convolve(following, p['block_skip']) + images.convolve(jax.nn.silu(
      images.convolve(jax.nn.silu(following), p['block_first'])), p['block_second']))
  np.testing.assert_allclose(out, images.convolve(block, p['readout']), atol=1e-4)


@pytest.mark.slow
def test_a_new_recurrent_model_says_nothing_and_learns_its_first_state():
  model, (_, noisy, time, told, *none) = build(**RECURRENT), recurrent_inputs()
  params = first_params(model)
  out, following = quick(model.denoise)(params, model.start(params, B), noisy, time, told, *none)
  assert np.abs(out).max() == 0 and np.abs(following).max() == 0

  def second(p):
    after = model.begin(p, noisy, told)
    return (model.denoise(p, after, noisy, time, told, *none)[0] ** 2).sum()

  grads = quick(jax.grad(second))(params_of(model.config))
  assert np.abs(grads['hidden']['first']).max() > 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.slow
def test_latents_are_those_of_a_frozen_autoencoder():
  model, rng = build(**RECURRENT), np.random.default_rng(3)
  params = params_of(model.config)
  pixels = jnp.asarray(rng.normal(size=(B, 8, 12, 3)), jnp.float32)
  latents = quick(model.encode)(params, pixels)
  coder = vae.build(model.config.space)
  mean, _ = quick(coder.encode)(params['vae'], pixels)
  np.testing.assert_allclose(latents, 2.0 * (mean - 0.5), atol=1e-5)
  np.testing.assert_allclose(quick(model.decode)(params, latents),
                             quick(coder.decode)(params['vae'], mean), atol=1e-4)
  trained = P.trained(model.specs, model.specs)
  assert not jax.tree.leaves(trained['vae'], is_leaf=P.is_spec)
  assert len(jax.tree.leaves(trained['hidden'], is_leaf=P.is_spec)) == 7
