"""A variational autoencoder of frames, in whose latents a model of a game can draw (2412.00887).

    encoder  conv, then for each multiplier `num_blocks` ResBlocks and a halving, two ResBlocks,
             norm, SiLU, conv → mean and log-variance of the latents
    decoder  the same in reverse, with a ResBlock more at each size and doubling by repetition

    ResBlock(x) = skip(x) + conv SiLU norm conv SiLU norm x

There is no attention, as in the base model.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.nn.images import convolve
from jaxrl_pt.nn.linear import add_bias
from jaxrl_pt.nn.norm import group_norm
from jaxrl_pt.params import ParamSpec, is_spec, normal, ones, zeros
from jaxrl_pt.types import Array, Params

_MOST_GROUPS = 32
_LOWEST, _HIGHEST = -30.0, 20.0  # of a log-variance


class Coder(NamedTuple):
  """An autoencoder, as pure functions over its parameters.

  encode(params, pixels f32[B, H, W, 3] from −1 to 1) → mean and log-variance f32[B, h, w, C].
  decode(params, latents f32[B, h, w, C]) → pixels f32[B, H, W, 3].
  """

  config: cfg.VAE
  specs: Any
  encode: Callable[[Params, Array], tuple[Array, Array]]
  decode: Callable[[Params, Array], Array]


def build(config: cfg.VAE) -> Coder:
  """Builds the autoencoder of `config`."""
  widths = [config.base * m for m in config.multipliers]

  def encode(params: Params, pixels: Array) -> tuple[Array, Array]:
    p = params['encoder']
    h = _conv(p['first'], pixels)
    for level in range(len(widths)):
      h = _blocks(p[f'level_{level}'], h)
      if level < len(widths) - 1:
        h = _conv(p[f'half_{level}'], h, stride=2)
    h = _blocks(p['middle'], h)
    mean, log_variance = jnp.split(_conv(p['last'], _normed(p['norm'], h)), 2, -1)
    return mean, jnp.clip(log_variance, _LOWEST, _HIGHEST)

  def decode(params: Params, latents: Array) -> Array:
    p = params['decoder']
    h = _conv(p['first'], latents)
    h = _blocks(p['middle'], h)
    for level in reversed(range(len(widths))):
      h = _blocks(p[f'level_{level}'], h)
      if level:
        h = _conv(p[f'double_{level}'], h.repeat(2, 1).repeat(2, 2))
    return _conv(p['last'], _normed(p['norm'], h))

  specs = {'encoder': _encoder_specs(config, widths), 'decoder': _decoder_specs(config, widths)}
  return Coder(config, specs, encode, decode)


def kl(mean: Array, log_variance: Array) -> Array:
  """f32[B]: KL(N(mean, variance) ‖ N(0, 1)), summed over the latents of a frame, in nats."""
  each = (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance) / 2
  return each.sum((1, 2, 3))


def check_divides(config: cfg.VAE, frame: tuple[int, int]) -> None:
  """Refuses latents whose side does not divide a frame's."""
  if any(size % config.factor for size in frame):
    height, width = frame
    raise UserError(f'VAE.multipliers make latents of 1/{config.factor} of a frame of {height} × '
                    f'{width} pixels: choose as many that the side of a latent divides both.')


def multiply_adds(config: cfg.VAE, frame: tuple[int, int]) -> int:
  """Multiply-adds of the convolutions that encode and decode one frame of so many pixels."""
  top, total = len(config.multipliers) - 1, 0
  for half, parts in build(config).specs.items():
    for name, specs in parts.items():
      kind, _, level = name.partition('_')
      # At which size it works: 0 is that of the frame, and each next one has half the side.
      place = {'level': int(level or 0), 'half': int(level or 0) + 1, 'double': int(level or 0) - 1,
               'middle': top, 'norm': 0, 'first': 0 if half == 'encoder' else top,
               'last': top if half == 'encoder' else 0}[kind]
      kernels = [s for s in jax.tree.leaves(specs, is_leaf=is_spec) if len(s.shape) == 4]
      total += sum(math.prod(s.shape) for s in kernels) * math.prod(frame) // 4**place
  return total


# --- Parts ------------------------------------------------------------------------


def _conv(p: Params, x: Array, stride: int = 1) -> Array:
  return add_bias(convolve(x, p['kernel'], stride), p['bias'])


def _normed(p: Params, x: Array) -> Array:
  groups = math.gcd(_MOST_GROUPS, x.shape[-1])
  return jax.nn.silu(group_norm(x, p['gain'], p['bias'], groups))


def _res_block(p: Params, x: Array) -> Array:
  h = _conv(p['first'], _normed(p['first_norm'], x))
  h = _conv(p['second'], _normed(p['second_norm'], h))
  return (convolve(x, p['skip']) if 'skip' in p else x) + h


def _blocks(p: Params, x: Array) -> Array:
  for number in range(len(p)):
    x = _res_block(p[f'block_{number}'], x)
  return x


def _spec(size: tuple[int, ...], init: Any, role: Any) -> ParamSpec:
  return ParamSpec(size, jnp.dtype('float32'), ('whole',) * len(size), init, role)


def _conv_specs(inputs: int, outputs: int, init: Any = None) -> dict[str, ParamSpec]:
  return {'kernel': _spec((3, 3, inputs, outputs), init or normal((9 * inputs) ** -0.5), 'dense'),
          'bias': _spec((outputs,), zeros, 'bias')}


def _norm_specs(size: int) -> dict[str, ParamSpec]:
  return {'gain': _spec((size,), ones, 'gain'), 'bias': _spec((size,), zeros, 'bias')}


def _block_specs(inputs: int, outputs: int) -> dict[str, Any]:
  found: dict[str, Any] = {
      'first_norm': _norm_specs(inputs), 'first': _conv_specs(inputs, outputs),
      'second_norm': _norm_specs(outputs), 'second': _conv_specs(outputs, outputs, zeros)}
  if inputs != outputs:
    found['skip'] = _spec((1, 1, inputs, outputs), normal(inputs**-0.5), 'dense')
  return found


def _blocks_specs(inputs: int, outputs: int, number: int) -> dict[str, Any]:
  return {f'block_{i}': _block_specs(outputs if i else inputs, outputs) for i in range(number)}


def _encoder_specs(config: cfg.VAE, widths: list[int]) -> dict[str, Any]:
  found: dict[str, Any] = {'first': _conv_specs(3, widths[0])}
  before = widths[0]
  for level, width in enumerate(widths):
    found[f'level_{level}'] = _blocks_specs(before, width, config.num_blocks)
    if level < len(widths) - 1:
      found[f'half_{level}'] = _conv_specs(width, width)
    before = width
  found['middle'] = _blocks_specs(before, before, 2)
  found['norm'] = _norm_specs(before)
  found['last'] = _conv_specs(before, 2 * config.latent_channels)
  return found


def _decoder_specs(config: cfg.VAE, widths: list[int]) -> dict[str, Any]:
  before = widths[-1]
  found: dict[str, Any] = {'first': _conv_specs(config.latent_channels, before),
                           'middle': _blocks_specs(before, before, 2)}
  for level in reversed(range(len(widths))):
    found[f'level_{level}'] = _blocks_specs(before, widths[level], config.num_blocks + 1)
    before = widths[level]
    if level:
      found[f'double_{level}'] = _conv_specs(before, before)
  found['norm'] = _norm_specs(before)
  found['last'] = _conv_specs(before, 3)
  return found
