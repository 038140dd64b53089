"""The vision tower against plain loops, what its positions do, and that all of it learns."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import vision
from jaxrl_pt.nn import images

# Patches of 2 × 2 pixels; images of 4 × 6 patches unless a test says otherwise.
CONFIG = cfg.VisionTower(patch=2, num_layers=2, d_model=16, d_ff=24, num_heads=2, d_out=12,
                         positions=cfg.NoPositions())
ROWS, COLUMNS, B = 4, 6, 2
MERGED = dataclasses.replace(CONFIG, positions=cfg.Rope2D(), pooling=cfg.MergePatches())
SAMPLED = dataclasses.replace(CONFIG, positions=cfg.Rope2D(), pooling=cfg.Resampler(5))
TERNARY = dataclasses.replace(CONFIG, positions=cfg.LearnedPositions(30),
                              quant=cfg.Quant('ternary', 'int8'), sub_norm=True)
MEAN = dataclasses.replace(CONFIG, positions=cfg.SinCosPositions(), pooling=cfg.MeanPatches())
ALL = {'merged': MERGED, 'sampled': SAMPLED, 'ternary': TERNARY, 'mean': MEAN, 'none': CONFIG}


def params_of(config: cfg.VisionTower, seed: int = 0):
  """Parameters with gains and positions away from their beginning."""
  rng = np.random.default_rng(seed)

  def draw(spec: P.ParamSpec) -> jax.Array:
    noise = rng.normal(size=spec.shape)
    if spec.role == 'gain':
      return jnp.asarray(1 + 0.3 * noise, jnp.float32)
    fan_in = spec.shape[-2] if spec.role in ('projection', 'dense') else 1
    return jnp.asarray(1.5 * noise / math.sqrt(fan_in), jnp.float32)

  return P.map_specs(draw, vision.build(config).specs)


def draw_images(rows: int = ROWS, columns: int = COLUMNS, num: int = B) -> np.ndarray:
  return np.random.default_rng(3).integers(0, 256, (num, 2 * rows, 2 * columns, 3), np.uint8)


@functools.cache
def compiled(config: cfg.VisionTower, compute: cfg.Compute = cfg.Compute()):
  return jax.jit(vision.build(config, compute).apply)


def tokens_of(config, params, pictures) -> np.ndarray:
  return np.asarray(compiled(config)(params, pictures))


# --- The definition, by loops ----------------------------------------------------------


def norm(x, gain=1.0):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def bit_linear(config, x, w):
  """One token's product with a matrix, with codes of −1, 0, 1 and of 8 bits."""
  if config.quant.weights == 'none':
    return x @ w
  alpha = np.abs(w).mean()
  codes = np.clip(np.round(w / alpha), -1, 1)
  step = np.abs(x).max() / 127
  return (np.clip(np.round(x / step), -128, 127) @ codes) * step * alpha


def rotated(config, x, row, column):
  """One head of one token, rotated pair by pair."""
  if not isinstance(config.positions, cfg.Rope2D):
    return x
  half, out = len(x) // 2, x.copy()
  for j in range(half):
    place, i = (row, j) if j < half // 2 else (column, j - half // 2)
    angle = place * 10_000.0 ** (-4 * i / len(x))
    out[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
    out[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
  return out


def attended(config, queries, keys, values):
  """Lists of tokens → the heads of each query side by side; all are rotated already."""
  width, out = config.head_dim, []
  for q in queries:
    parts = []
    for h in range(config.num_heads):
      mine = slice(h * width, (h + 1) * width)
      scores = np.array([q[mine] @ k[mine] for k in keys]) / math.sqrt(width)
      weights = np.exp(scores - scores.max())
      parts.append(sum(w * v[mine] for w, v in zip(weights / weights.sum(), values, strict=True)))
    out.append(np.concatenate(parts))
  return out


def turned(config, x, row, column):
  width = config.head_dim
  return np.concatenate([rotated(config, x[i:i + width], row, column)
                         for i in range(0, len(x), width)])


def block(config, p, tokens, places):
  """One layer."""
  into = lambda name: [bit_linear(config, norm(x, p['attn_norm']), p[name]) for x in tokens]
  turn = lambda xs: [turned(config, x, *place) for x, place in zip(xs, places, strict=True)]
  found = attended(config, turn(into('wq')), turn(into('wk')), into('wv'))
  sub_norm = (lambda x, name: norm(x, p[name])) if config.sub_norm else (lambda x, name: x)
  tokens = [x + bit_linear(config, sub_norm(y, 'attn_sub_norm'), p['wo'])
            for x, y in zip(tokens, found, strict=True)]
  inner = [gelu(bit_linear(config, norm(x, p['ffn_norm']), p['w_up'])) for x in tokens]
  return [x + bit_linear(config, sub_norm(h, 'ffn_sub_norm'), p['w_down'])
          for x, h in zip(tokens, inner, strict=True)]


def pooled(config, params, tokens, places):
  match config.pooling:
    case cfg.AllPatches():
      return tokens
    case cfg.MeanPatches():
      return [sum(tokens) / len(tokens)]
    case cfg.MergePatches():
      at = dict(zip(places, tokens, strict=True))
      return [np.concatenate([at[r, c], at[r, c + 1], at[r + 1, c], at[r + 1, c + 1]])
              for r in range(0, ROWS, 2) for c in range(0, COLUMNS, 2)]
    case cfg.Resampler():
      p = params['resampler']
      keys = [turned(config, x @ p['wk'], *place) for x, place in zip(tokens, places, strict=True)]
      out = attended(config, p['queries'] @ p['wq'], keys, [x @ p['wv'] for x in tokens])
      return [x @ p['wo'] for x in out]


def looped(config, params, picture):
  """The tokens of one image u8[H, W, 3], in float64."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  tokens, places = [], [(r, c) for r in range(ROWS) for c in range(COLUMNS)]
  for n, (r, c) in enumerate(places):
    patch = picture[2 * r:2 * r + 2, 2 * c:2 * c + 2].reshape(-1) / 127.5 - 1
    tokens.append(patch @ params['patches'])
    if isinstance(config.positions, cfg.LearnedPositions):
      tokens[-1] += params['positions'][n]
    if isinstance(config.positions, cfg.SinCosPositions):
      tokens[-1] += [wave(place / 10_000 ** (i / 4)) for place in (r, c)
                     for wave in (math.sin, math.cos) for i in range(4)]
  for layer in range(config.num_layers):
    tokens = block(config, {k: v[layer] for k, v in params['layers'].items()}, tokens, places)
  tokens = pooled(config, params, [norm(x, params['final_norm']) for x in tokens], places)
  p = params['projector']
  return np.array([gelu(x @ p['first']) @ p['second'] for x in tokens])


@pytest.mark.parametrize('name', ALL)
def test_tokens_are_those_of_a_loop(name):
  config, pictures = ALL[name], draw_images()
  params = params_of(config)
  found = tokens_of(config, params, pictures)
  expected = np.stack([looped(config, params, picture) for picture in pictures])
  assert found.shape == expected.shape and expected.std() > 0.3
  assert found.shape[1] == math.prod(vision.build(config).grid(2 * ROWS, 2 * COLUMNS))
  # A value of the ternary tower within float32's rounding of a boundary may take another code.
  np.testing.assert_allclose(found, expected, atol=2e-5 if name != 'ternary' else 1e-4)


# --- Positions -------------------------------------------------------------------------


def permuted(pictures: np.ndarray, order: np.ndarray) -> np.ndarray:
  patches = images.patchify(pictures, 2)[:, order]
  return np.asarray(images.unpatchify(patches, 2, pictures.shape[1:3]))


@pytest.mark.parametrize('name, moves', [('none', True), ('ternary', False), ('sampled', False)])
def test_a_tower_without_positions_sees_a_set_and_one_with_them_does_not(name, moves):
  config, pictures = ALL[name], draw_images()
  order = np.random.default_rng(4).permutation(ROWS * COLUMNS)
  params = params_of(config)
  one = tokens_of(config, params, pictures)
  other = tokens_of(config, params, permuted(pictures, order))
  expected = one if isinstance(config.pooling, cfg.Resampler) else one[:, order]
  if moves:
    np.testing.assert_allclose(other, expected, atol=1e-5)
  else:
    assert np.abs(other - expected).max() > 0.05


def test_transposing_an_image_swaps_what_rows_and_columns_do():
  """A tower whose heads have swapped rows and columns says of a transposed image what the other
  one says of the image, transposed."""
  params, pictures = params_of(MERGED), draw_images()
  quarter = MERGED.head_dim // 4
  pairs = np.arange(MERGED.head_dim).reshape(2, 2, quarter)[:, ::-1].reshape(-1)
  heads = np.concatenate([h * MERGED.head_dim + pairs for h in range(MERGED.num_heads)])
  layers = params['layers'] | {name: params['layers'][name][..., heads] for name in ('wq', 'wk')}
  turn = lambda w, side: w.reshape(side, side, -1, w.shape[-1]).swapaxes(0, 1).reshape(w.shape)
  swapped = params | {
      'layers': layers, 'patches': turn(params['patches'], 2),
      'projector': params['projector'] | {'first': turn(params['projector']['first'], 2)}}
  transposed = pictures.swapaxes(1, 2)
  square = lambda tokens, rows: tokens.reshape(B, rows, -1, MERGED.d_out)
  one = square(tokens_of(MERGED, params, pictures), ROWS // 2)
  other = square(tokens_of(MERGED, swapped, transposed), COLUMNS // 2)
  np.testing.assert_allclose(other, one.swapaxes(1, 2), atol=2e-5)
  unswapped = swapped | {'layers': params['layers']}
  without = square(tokens_of(MERGED, unswapped, transposed), COLUMNS // 2)
  assert np.abs(without - one.swapaxes(1, 2)).max() > 0.05


# --- Arithmetic -------------------------------------------------------------------------


def test_pixels_are_bytes_or_numbers_from_0_to_1():
  pictures = draw_images()
  ours = vision._scaled(jnp.asarray(pictures))
  np.testing.assert_allclose(ours, pictures / 127.5 - 1, atol=1e-6)
  np.testing.assert_array_equal(vision._scaled(jnp.asarray(pictures, jnp.float32) / 255), ours)


def test_bfloat16_is_near_float32():
  params, pictures = params_of(MERGED), draw_images()
  low = compiled(MERGED, cfg.Compute('bfloat16'))(params, pictures)
  full = tokens_of(MERGED, params, pictures)
  assert low.dtype == jnp.bfloat16
  gap = np.asarray(low, np.float32) - full
  # About 20 roundings of 2⁻⁸ / √3 in a row, by the root of the mean square.
  assert 0 < np.sqrt((gap**2).mean()) / full.std() < 20**0.5 * 2**-8 * 2


@pytest.mark.parametrize('config', [
    dataclasses.replace(TERNARY, pooling=cfg.Resampler(5)), MERGED], ids=['sampled', 'merged'])
def test_every_parameter_learns_and_rematerialising_changes_nothing(config):
  params, pictures = params_of(config), draw_images()
  weights = np.random.default_rng(5).normal(size=(B, 1, config.d_out))
  grads = {}
  for remat in ('none', 'block'):
    compute = cfg.Compute(remat=remat, unroll=1 if remat == 'block' else 0)
    apply = vision.build(config, compute).apply
    grads[remat] = jax.jit(jax.grad(lambda p, apply=apply: (
        apply(p, pictures) * weights).sum()))(params)
  for path, grad in jax.tree.leaves_with_path(grads['none']):
    rows = np.asarray(grad)
    if path[0].key == 'positions':
      assert np.abs(rows[ROWS * COLUMNS:]).max() == 0  # of larger images
      rows = rows[:ROWS * COLUMNS]
    assert np.isfinite(rows).all() and (np.abs(rows).max(-1) > 1e-6).all(), path
  for one, other in zip(*map(jax.tree.leaves, grads.values()), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())


# --- Refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize('config, shape, expected', [
    (CONFIG, (8, 7), 'VisionTower.patch = 2 does not divide an image of 8 × 7 pixels'),
    (MERGED, (8, 6), 'make 4 × 3 of an image: scale the images to sides that 4 divides'),
    (TERNARY, (16, 8), 'max_patches = 30 is fewer than the 32 patches of an image of 16 × 8 pixels:'
     ' set it to at least 32')])
def test_images_that_a_tower_does_not_take(config, shape, expected):
  tower = vision.build(config)
  params = P.abstract(tower.specs)
  for call in (lambda: tower.grid(*shape), lambda: jax.eval_shape(
      tower.apply, params, jax.ShapeDtypeStruct((1, *shape, 3), jnp.uint8))):
    with pytest.raises(UserError) as caught:
      call()
    assert expected in str(caught.value)


def test_a_rotation_without_a_matrix_is_refused():
  quant = cfg.Quant('ternary', 'int8', hadamard=True)
  with pytest.raises(UserError, match='Quant.hadamard rotates VisionTower.d_ff = 23'):
    vision.build(dataclasses.replace(CONFIG, d_ff=23, quant=quant))


def test_parameters_say_what_they_are():
  specs = vision.build(dataclasses.replace(TERNARY, pooling=cfg.Resampler(5))).specs
  roles = {path[-1].key: spec.role for path, spec in jax.tree.leaves_with_path(
      specs, is_leaf=P.is_spec) if path[0].key == 'layers'}
  assert {name for name, role in roles.items() if role == 'projection'} == set(vision.PROJECTIONS)
  assert {role for name, role in roles.items() if name not in vision.PROJECTIONS} == {'gain'}
  first = jax.jit(lambda key: P.init(specs, key))(jax.random.key(0))
  for path, x in jax.tree.leaves_with_path(first):
    assert x.dtype == jnp.float32 and (np.asarray(x) == 1).all() == ('norm' in path[-1].key), path
