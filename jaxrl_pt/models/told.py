"""What a model of a game is told of a frame, and how it enters the transformer."""

from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.nn import images
from jaxrl_pt.nn.linear import add_bias, matmul
from jaxrl_pt.params import Init, ParamSpec, Role, normal, zeros
from jaxrl_pt.types import Array, Params

_BASE = 10  # digits
_NO_DIGIT = _BASE  # the digit that stands for a number that the model is not told


class Shape(NamedTuple):
  """What a model must know of the game whose frames it draws.

  frame: height and width in pixels.
  display_rows: pixel rows at the top that hold the numbers.
  num_actions: the actions; `stay` is the one that does nothing.
  num_events: E + 1, of which event 0 is that there is none.
  digits: the number of digits of each counter.
  num_contents: what a cell of the map may hold; 0 for a game without a map.
  view: rows and columns of the cells in view.
  grid: the pixel (top, left) of the first cell and the (height, width) of a cell.
  """

  frame: tuple[int, int]
  display_rows: int
  num_actions: int
  stay: int
  num_events: int
  digits: tuple[int, ...]
  num_contents: int
  view: tuple[int, int]
  grid: tuple[int, int, int, int]

  @property
  def map_channels(self) -> int:
    """The channels of `map_channels`."""
    return self.num_contents + 1 if self.num_contents else 0


@struct.dataclass
class Told:
  """What the model is told of the frames of B games that it draws."""

  action: Array  # i32[B]
  counters: Array  # i32[B, M], −1 where the model is not told
  crop: Array  # i32[B, h, w] what the map says of the cells in view, −1 where it says nothing


def heard(told: Told, conditions: cfg.Conditions, shape: Shape) -> Told:
  """What a model hears of what it is told: nothing of what `conditions` leave out."""
  return Told(
      told.action if conditions.action else jnp.full_like(told.action, shape.num_actions),
      told.counters if conditions.values else jnp.full_like(told.counters, -1),
      told.crop if conditions.map else jnp.full_like(told.crop, -1))


def map_channels(shape: Shape, crop_Bhw: Array) -> Array:
  """f32[B, H, W, num_contents + 1]: the map's cells, painted where they are in the frame.

  The first channels say what a known cell holds, one channel a content; the last is 1 on known
  cells. All are 0 on cells that are not known and outside of the cells.
  """
  if not shape.num_contents:
    return jnp.zeros((crop_Bhw.shape[0], *shape.frame, 0))
  cells = jax.nn.one_hot(crop_Bhw, shape.num_contents)  # All zeros for −1.
  cells = jnp.concatenate([cells, (crop_Bhw >= 0)[..., None].astype(jnp.float32)], -1)
  top, left, height, width = shape.grid
  cells = cells.repeat(height, 1).repeat(width, 2)
  below = shape.frame[0] - top - cells.shape[1], shape.frame[1] - left - cells.shape[2]
  return jnp.pad(cells, ((0, 0), (top, below[0]), (left, below[1]), (0, 0)))


def digits_of(shape: Shape, counters_BM: Array) -> Array:
  """i32[B, S]: the digits of all counters, the highest first, S = Σ shape.digits.

  A counter of −1, which the model is not told, has digits that stand for none.
  """
  parts = []
  for m, number in enumerate(shape.digits):
    value = counters_BM[:, m, None]
    digits = value // 10 ** jnp.arange(number - 1, -1, -1) % _BASE
    parts.append(jnp.where(value < 0, _NO_DIGIT, digits))
  return jnp.concatenate(parts, 1)


def value_tokens(params: Params, shape: Shape, counters_BM: Array) -> Array:
  """f32[B, S, D]: E_digit[d] + E_slot[i] + E_counter[m] of each digit."""
  slots = [i for number in shape.digits for i in range(number)]
  counters = [m for m, number in enumerate(shape.digits) for _ in range(number)]
  return (params['digit'][digits_of(shape, counters_BM)] + params['slot'][jnp.array(slots)]
          + params['counter'][jnp.array(counters)])


def condition(params: Params, width: int, time_B: Array, action_B: Array) -> Array:
  """f32[B, D]: the embedding of the noise level from 0 to 1, beside that of the action."""
  p = params['time']
  hidden = add_bias(matmul(images.sinusoid(time_B, width), p['first']), p['first_bias'])
  time = add_bias(matmul(jax.nn.silu(hidden), p['second']), p['second_bias'])
  return jnp.concatenate([time, params['action'][action_B]], -1)


# --- Parameters -------------------------------------------------------------------


def spec(size: tuple[int, ...], init: Init, role: Role) -> ParamSpec:
  """A parameter outside of the blocks, which is never split."""
  return ParamSpec(size, jnp.dtype('float32'), ('whole',) * len(size), init, role)


def table(number: int, size: int, stddev: float) -> ParamSpec:
  """An embedding of so many things."""
  return spec((number, size), normal(stddev), 'table')


def specs(config: cfg.DiT, shape: Shape) -> dict[str, Any]:
  """The tables of actions, digits, slots and counters, and the embedding of the noise level."""
  width, half, stddev = config.d_model, config.d_model // 2, config.d_model**-0.5
  return {
      'time': {'first': spec((width, width), normal(stddev), 'dense'),
               'first_bias': spec((width,), zeros, 'bias'),
               'second': spec((width, half), normal(stddev), 'dense'),
               'second_bias': spec((half,), zeros, 'bias')},
      'action': table(shape.num_actions + 1, half, stddev),
      'digit': table(_BASE + 1, width, stddev),
      'slot': table(max(shape.digits), width, stddev),
      'counter': table(len(shape.digits), width, stddev)}
