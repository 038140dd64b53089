"""LogicNet: which event an action leads to (Model as a Game, 2503.21172).

    π = MLP(mean(h) ⊕ flat(h) ⊕ E_action[a]),   h = three 3 × 3 convolutions of stride 2 of the past

The arithmetic of an event is done outside (`game.base.ledger`); the network only says that it
happens. No gradient flows from it into what it looks at, so that it learns beside the transformer
and not at its expense.
"""

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.nn.images import convolve
from jaxrl_pt.nn.linear import add_bias, matmul
from jaxrl_pt.params import Init, ParamSpec, Role, normal, zeros
from jaxrl_pt.types import Array, Params

_CONVOLUTIONS = 'first', 'second', 'third'


def specs(config: cfg.LogicNet, in_shape: tuple[int, int, int], num_actions: int, num_events: int
          ) -> dict[str, ParamSpec]:
  """The parameters.

  Args:
    config: the widths.
    in_shape: height, width and channels of the past that it looks at.
    num_actions: the actions of the game.
    num_events: E + 1, of which the first says that nothing happens.
  """
  height, width, channels = in_shape
  found: dict[str, ParamSpec] = {}

  def add(name: str, shape: tuple[int, ...], init: Init, role: Role) -> None:
    found[name] = ParamSpec(shape, jnp.dtype('float32'), ('whole',) * len(shape), init, role)

  for name in _CONVOLUTIONS:
    fan_in = 9 * channels
    add(name, (3, 3, channels, config.channels), normal((2 / fan_in) ** 0.5), 'dense')
    add(f'{name}_bias', (config.channels,), zeros, 'bias')
    height, width, channels = -(-height // 2), -(-width // 2), config.channels
  inputs = channels * (height * width + 2)
  add('action', (num_actions, channels), normal(1.0), 'table')
  add('hidden', (inputs, config.hidden), normal((2 / inputs) ** 0.5), 'dense')
  add('hidden_bias', (config.hidden,), zeros, 'bias')
  add('out', (config.hidden, num_events), zeros, 'dense')
  add('out_bias', (num_events,), zeros, 'bias')
  return found


def logits(p: Params, past_BHWC: Array, action_B: Array) -> Array:
  """f32[B, E + 1]: logits of the events.

  Args:
    p: the parameters.
    past_BHWC: f[B, H, W, C], to which no gradient flows.
    action_B: i32[B].
  """
  h = jax.lax.stop_gradient(past_BHWC)
  for name in _CONVOLUTIONS:
    h = jax.nn.silu(add_bias(convolve(h, p[name], stride=2), p[f'{name}_bias']))
  flat = h.reshape(h.shape[0], -1)
  seen = jnp.concatenate([h.mean((1, 2)), flat, p['action'][action_B].astype(h.dtype)], -1)
  hidden = jax.nn.silu(add_bias(matmul(seen, p['hidden']), p['hidden_bias']))
  return add_bias(matmul(hidden, p['out'], jnp.float32), p['out_bias'])
