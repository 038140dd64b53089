"""A policy of a game: a small convolutional network from the last frames to an action.

    h = SiLU(W · flat(SiLU(conv … SiLU(conv frames))) + b),   π = softmax(h W_out)

Each 3 × 3 convolution halves the side of the frame. W_out begins at zero, so that a new policy
draws every action with the same probability. The same h is what a value head is linear in.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.models.told import Shape
from jaxrl_pt.nn.images import convolve
from jaxrl_pt.nn.linear import add_bias, matmul
from jaxrl_pt.params import Init, ParamSpec, Role, normal, zeros
from jaxrl_pt.types import Array, Params

_CHANNELS = 3  # of a frame


class Policy(NamedTuple):
  """A policy, as pure functions over its parameters.

  hidden: (params, the last K frames f32[R, K, H, W, 3] from 0 to 1) → f32[R, D].
  head: params → f32[D, A], so that logits = hidden @ head.
  multiply_adds: of one forward pass over the frames of one action.
  """

  config: cfg.GamePolicy
  specs: Any
  hidden: Callable[[Params, Array], Array]
  head: Callable[[Params], Array]
  multiply_adds: int


def build(config: cfg.GamePolicy, shape: Shape) -> Policy:
  """The policy of a game with frames and actions as `shape` says."""
  specs: dict[str, ParamSpec] = {}

  def add(name: str, size: tuple[int, ...], init: Init, role: Role) -> None:
    specs[name] = ParamSpec(size, jnp.dtype('float32'), ('whole',) * len(size), init, role)

  (height, width), channels = shape.frame, config.num_frames * _CHANNELS
  total = 0
  for number, outputs in enumerate(config.channels):
    fan_in = 9 * channels
    add(f'conv_{number}', (3, 3, channels, outputs), normal(math.sqrt(2 / fan_in)), 'dense')
    add(f'conv_{number}_bias', (outputs,), zeros, 'bias')
    height, width, channels = -(-height // 2), -(-width // 2), outputs
    total += fan_in * outputs * height * width
  inputs = height * width * channels
  add('dense', (inputs, config.hidden), normal(math.sqrt(2 / inputs)), 'dense')
  add('dense_bias', (config.hidden,), zeros, 'bias')
  add('out', (config.hidden, shape.num_actions), zeros, 'dense')
  total += inputs * config.hidden + config.hidden * shape.num_actions

  def hidden(p: Params, frames_RKHWC: Array) -> Array:
    num, past, rows, columns, colours = frames_RKHWC.shape
    as_channels = frames_RKHWC.transpose(0, 2, 3, 1, 4).reshape(num, rows, columns, past * colours)
    h = 2 * as_channels.astype(jnp.float32) - 1
    for number in range(len(config.channels)):
      h = jax.nn.silu(add_bias(convolve(h, p[f'conv_{number}'], stride=2),
                               p[f'conv_{number}_bias']))
    return jax.nn.silu(add_bias(matmul(h.reshape(num, -1), p['dense']), p['dense_bias']))

  return Policy(config, specs, hidden, lambda p: p['out'], total)


def windows(frames_BTHWC: Array, num_past: int) -> Array:
  """f[B, T, K, H, W, 3]: the last K frames up to each of T; before the first stands that one."""
  time = jnp.arange(frames_BTHWC.shape[1])
  past = jnp.maximum(time[:, None] + jnp.arange(1 - num_past, 1), 0)
  return frames_BTHWC[:, past]
