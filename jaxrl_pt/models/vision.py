"""A vision tower: a transformer encoder of patches, and the projector that makes tokens of them.

    x   = W_in · patches(2 · image − 1) (+ E_position)
    h   = x + W_o · sub_norm(Attention(norm(x)))
    out = h + W_down · sub_norm(GELU(W_up · norm(h)))                   for each block
    y   = W_2 GELU(W_1 · pool(norm(out)))

All patches of an image see each other. `norm` is an RMSNorm, as in the language model; `sub_norm`
is the identity without SubLN. With `Quant.weights = 'ternary'` the six projections of a block are
BitLinear, exactly as in the language model; the embedding of patches, the resampler and the
projector stay as they are. `pool` leaves all patches, joins 2 × 2 of them side by side, takes their
mean, or lets learned queries attend to them:

    pool(x) = W_o · Attention(Q W_q, rotate(x W_k), x W_v)

With Rope2D the keys of the resampler are rotated to their places, and its queries stand at (0, 0):
the blocks have seen differences alone, and a token that stands for the whole image must know where
a patch is.

Source: ViT (2010.11929), Qwen2-VL (2409.12191) for rotary positions and merging, Qwen-VL
(2308.12966) for the resampler, LLaVA-1.5 (2310.03744) for the projector. Departs from them: no
biases, RMSNorm in place of LayerNorm, no class token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Constrain
from jaxrl_pt.models.transformer import check_rotations
from jaxrl_pt.nn import embed, image_positions, images
from jaxrl_pt.nn.attention import attention
from jaxrl_pt.nn.linear import linear, matmul, normed_linear
from jaxrl_pt.nn.norm import EPSILON, rms_norm
from jaxrl_pt.nn.ops import Axes, Ops
from jaxrl_pt.params import Init, ParamSpec, Role, normal, ones
from jaxrl_pt.types import Array, Params

_CHANNELS = 3
_MERGED = 2  # patches of the side of a square that becomes one token
# The projections of a block: logical names of their inputs and outputs.
PROJECTIONS: dict[str, Axes] = {
    'wq': ('embed', 'heads'), 'wk': ('embed', 'heads'), 'wv': ('embed', 'heads'),
    'wo': ('heads', 'embed'), 'w_up': ('embed', 'ff'), 'w_down': ('ff', 'embed')}
_RESAMPLER = 'wq', 'wk', 'wv', 'wo'

# Cosines and sines for the places of patches, or None in a tower that rotates nothing.
Angles = tuple[Array, Array] | None


class Tower(NamedTuple):
  """A vision tower, as pure functions over its parameters.

  apply(params, images) → f[B, N, D_out], the tokens of each image, row by row. Images are
    u8[B, H, W, 3], or f32[B, H, W, 3] from 0 to 1.
  grid(H, W) → the times, rows and columns of an image's tokens, 1 × rows × columns = N, as
    `image_positions.token_positions` reads them. Tokens of a resampler have no place: they count
    as one row.
  """

  config: cfg.VisionTower
  specs: Any
  apply: Callable[[Params, Array], Array]
  grid: Callable[[int, int], tuple[int, int, int]]


def build(config: cfg.VisionTower, compute: cfg.Compute = cfg.Compute(),
          constrain: Constrain = lambda x, axes: x, ops: Ops = Ops()) -> Tower:
  """Builds the tower of `config`.

  Args:
    config: sizes, positions, pooling and quantisation.
    compute: dtype, rematerialisation and unrolling.
    constrain: applied to patches, heads, feed-forward and residual with their logical axes.
    ops: the operations that have kernels.

  Raises:
    UserError: `Quant.hadamard` is set, and a width has no Hadamard matrix here. `apply` and `grid`
      raise it for images that the tower does not take.
  """
  check_rotations(config)
  dtype = jnp.dtype(compute.dtype)
  block = _make_block(config, constrain, ops)
  remat = jax.checkpoint if compute.remat == 'block' else lambda f: f
  unroll = compute.unroll or config.num_layers

  def grid(height: int, width: int) -> tuple[int, int, int]:
    return _grid(config, *_patches(config, height, width))

  def apply(params: Params, images_BHWC: Array) -> Array:
    rows, columns = _patches(config, *images_BHWC.shape[1:3])
    _grid(config, rows, columns)
    pixels = images.patchify(_scaled(images_BHWC).astype(dtype), config.patch)
    x_BND = matmul(pixels, params['patches']) + _added(config, params, rows, columns, dtype)
    x_BND = constrain(x_BND, ('batch', None, None))
    angles = _angles(config, rows, columns)
    layer = lambda x_BND, p: (block(p, x_BND, angles), None)
    x_BND, _ = jax.lax.scan(remat(layer), x_BND, params['layers'], unroll=unroll)
    x_BND = rms_norm(x_BND, params['final_norm'])
    return _project(params['projector'], _pool(config, params, x_BND, (rows, columns), angles))

  return Tower(config, specs(config), apply, grid)


# --- Images ---------------------------------------------------------------------------


def _scaled(images_BHWC: Array) -> Array:
  """f32 from −1 to 1."""
  is_bytes = images_BHWC.dtype == jnp.uint8
  return 2 * (images_BHWC.astype(jnp.float32) / (255 if is_bytes else 1)) - 1


def _patches(config: cfg.VisionTower, height: int, width: int) -> tuple[int, int]:
  """The rows and columns of patches of an image.

  Raises:
    UserError: it does not consist of whole patches, or has more than there are positions for.
  """
  if height % config.patch or width % config.patch:
    raise UserError(f'VisionTower.patch = {config.patch} does not divide an image of {height} × '
                    f'{width} pixels: choose a side that does, or scale the images.')
  rows, columns = height // config.patch, width // config.patch
  match config.positions:
    case cfg.LearnedPositions(max_patches=most) if rows * columns > most:
      raise UserError(f'LearnedPositions.max_patches = {most} is fewer than the {rows * columns} '
                      f'patches of an image of {height} × {width} pixels: set it to at least '
                      f'{rows * columns}.')
  return rows, columns


def _grid(config: cfg.VisionTower, rows: int, columns: int) -> tuple[int, int, int]:
  """The times, rows and columns of the tokens of so many patches.

  Raises:
    UserError: the patches do not make whole squares.
  """
  match config.pooling:
    case cfg.AllPatches():
      return 1, rows, columns
    case cfg.MergePatches():
      if rows % _MERGED or columns % _MERGED:
        raise UserError(f'VisionTower.pooling = @cfg.MergePatches() joins 2 × 2 patches, and '
                        f'patches of {config.patch} pixels make {rows} × {columns} of an image: '
                        f'scale the images to sides that {_MERGED * config.patch} divides, or '
                        'choose @cfg.AllPatches().')
      return 1, rows // _MERGED, columns // _MERGED
    case cfg.Resampler(num_tokens=number):
      return 1, 1, number
    case cfg.MeanPatches():
      return 1, 1, 1


def _added(config: cfg.VisionTower, params: Params, rows: int, columns: int,
           dtype: Any) -> Array | float:
  """The positions that are added to the patches, f[N, D], or 0."""
  match config.positions:
    case cfg.LearnedPositions():
      return params['positions'][:rows * columns].astype(dtype)
    case cfg.SinCosPositions():
      return jnp.asarray(images.positions_2d(rows, columns, config.d_model), dtype)
    case _:
      return 0.0


def _angles(config: cfg.VisionTower, rows: int, columns: int) -> Angles:
  if not isinstance(config.positions, cfg.Rope2D):
    return None
  return image_positions.rope_2d(*image_positions.places(rows, columns), config.head_dim)


# --- Blocks ---------------------------------------------------------------------------


def _rotated(x_BNHE: Array, angles: Angles) -> Array:
  return x_BNHE if angles is None else embed.rotate(x_BNHE, *angles)


def _everywhere(num: int, queries: int, keys: int) -> Array:
  """The mask of patches that all see each other."""
  return jnp.ones((num, queries, keys), bool)


def _make_block(config: cfg.VisionTower, constrain: Constrain, ops: Ops
                ) -> Callable[[Params, Array, Angles], Array]:
  quant = config.quant

  def project(p: Params, x: Array, name: str) -> Array:
    return linear(x, p[name], quant, ops, PROJECTIONS[name])

  def project_back(p: Params, x: Array, name: str, gain: str) -> Array:
    return normed_linear(x, p[gain] if config.sub_norm else None, EPSILON, p[name], quant, ops,
                         PROJECTIONS[name])

  def block(p: Params, x_BND: Array, angles: Angles) -> Array:
    num, length, _ = x_BND.shape

    def heads(y_BND: Array, name: str) -> Array:
      x = project(p, y_BND, name).reshape(num, length, config.num_heads, config.head_dim)
      return constrain(x, ('batch', None, 'heads', None))

    y_BND = rms_norm(x_BND, p['attn_norm'])
    q, k, v = (heads(y_BND, name) for name in ('wq', 'wk', 'wv'))
    out = attention(_rotated(q, angles), _rotated(k, angles), v, _everywhere(num, length, length))
    x_BND = x_BND + project_back(p, out.reshape(num, length, -1), 'wo', 'attn_sub_norm')

    y_BND = rms_norm(x_BND, p['ffn_norm'])
    h_BNF = constrain(jax.nn.gelu(project(p, y_BND, 'w_up')), ('batch', None, 'ff'))
    x_BND = x_BND + project_back(p, h_BNF, 'w_down', 'ffn_sub_norm')
    return constrain(x_BND, ('batch', None, None))

  return block


# --- From patches to tokens -------------------------------------------------------------


def _pool(config: cfg.VisionTower, params: Params, x_BND: Array, shape: tuple[int, int],
          angles: Angles) -> Array:
  """f[B, N', D']: what becomes the tokens of the images, of N = rows · columns patches."""
  match config.pooling:
    case cfg.AllPatches():
      return x_BND
    case cfg.MergePatches():
      return images.patchify(x_BND.reshape(x_BND.shape[0], *shape, -1), _MERGED)
    case cfg.Resampler():
      return _resample(config, params['resampler'], x_BND, angles)
    case cfg.MeanPatches():
      return x_BND.astype(jnp.float32).mean(1, keepdims=True).astype(x_BND.dtype)


def _resample(config: cfg.VisionTower, p: Params, x_BND: Array, angles: Angles) -> Array:
  num = x_BND.shape[0]
  queries_MD = p['queries'].astype(x_BND.dtype)
  heads = lambda y: y.reshape(*y.shape[:-1], config.num_heads, config.head_dim)
  q_MHE = heads(matmul(queries_MD, p['wq']))
  k, v = (heads(matmul(x_BND, p[name])) for name in ('wk', 'wv'))
  out = attention(jnp.broadcast_to(q_MHE, (num, *q_MHE.shape)), _rotated(k, angles), v,
                  _everywhere(num, len(queries_MD), x_BND.shape[1]))
  return matmul(out.reshape(num, len(queries_MD), -1), p['wo'])


def _project(p: Params, x: Array) -> Array:
  return matmul(jax.nn.gelu(matmul(x, p['first'])), p['second'])


# --- Parameters -------------------------------------------------------------------


def specs(config: cfg.VisionTower) -> dict[str, Any]:
  """The tree of ParamSpec; matrices start from N(0, 1/fan_in)."""
  width, pixels = config.d_model, config.patch**2 * _CHANNELS
  merged = _MERGED**2 if isinstance(config.pooling, cfg.MergePatches) else 1

  def matrix(rows: int, columns: int, axes: Axes) -> ParamSpec:
    return _spec((rows, columns), axes, normal(rows**-0.5), 'dense')

  found: dict[str, Any] = {
      'patches': matrix(pixels, width, ('whole', 'embed')),
      'layers': _block_specs(config),
      'final_norm': _spec((width,), ('norm',), ones, 'gain'),
      'projector': {'first': matrix(merged * width, config.d_out, ('embed', 'whole')),
                    'second': matrix(config.d_out, config.d_out, ('whole', 'embed'))}}
  match config.positions:
    case cfg.LearnedPositions(max_patches=number):
      found['positions'] = _spec((number, width), ('whole', 'embed'), normal(0.02), 'table')
  match config.pooling:
    case cfg.Resampler(num_tokens=number):
      queries = _spec((number, width), ('whole', 'embed'), normal(1.0), 'table')
      found['resampler'] = {'queries': queries, **{
          name: matrix(width, width, PROJECTIONS[name]) for name in _RESAMPLER}}
  return found


def _spec(shape: tuple[int, ...], axes: tuple[str, ...], init: Init, role: Role) -> ParamSpec:
  return ParamSpec(shape, jnp.dtype('float32'), axes, init, role)


def _block_specs(config: cfg.VisionTower) -> dict[str, ParamSpec]:
  """The parameters of all blocks, stacked over layers.

  Projections that write into the residual stream are scaled by 1/√(2L), as in the language model.
  """
  depth, width, ff = config.num_layers, config.d_model, config.d_ff
  sizes = {'embed': width, 'heads': width, 'ff': ff}

  def stacked(shape: tuple[int, ...], axes: tuple[str, ...], init: Init, role: Role) -> ParamSpec:
    return _spec((depth, *shape), ('layers', *axes), init, role)

  found = {}
  for name, (rows, columns) in PROJECTIONS.items():
    stddev = sizes[rows] ** -0.5 * ((2 * depth) ** -0.5 if columns == 'embed' else 1.0)
    found[name] = stacked((sizes[rows], sizes[columns]), (rows, columns), normal(stddev),
                          'projection')
  gains = {'attn_norm': width, 'ffn_norm': width}
  if config.sub_norm:
    gains |= {'attn_sub_norm': width, 'ffn_sub_norm': ff}
  return found | {name: stacked((size,), ('norm',), ones, 'gain') for name, size in gains.items()}
