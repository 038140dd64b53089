"""The model of a game: a DiT that draws the next frame from the past and from what it is told.

    tokens = W_in · patches(noisy frame ⊕ past frames ⊕ map) + positions,   one token a patch
           ⊕ E_digit[d] + E_slot[i] + E_counter[m],                         one token a digit
    c      = (time ⊕ E_action[a]) + E_bucket[noise of the past] (+ E_step[step size])
    out    = unpatch(W_out · modulated LayerNorm(blocks(tokens, c)))

What is told enters where it costs nothing: the action by adaLN, the numbers as tokens, the map as
channels that lie where its cells are in the frame. A model that is not told something
(`cfg.Conditions`) gets the entry of each table that stands for nothing, and a map of which no cell
is known, so that it has the same parameters and does the same work.

The event that an action leads to is LogicNet's (`logic_net`). In this form the hidden state that it
looks at is the past itself, the clean frames side by side: when an event is to be decided, the
transformer has not yet run for the new frame, and a pass of its own for the old ones would double
the work of a frame, while in these games the last frames hold all that decides an event.

Source: Model as a Game (2503.21172) and the code of its base model (2412.00887), where actions
enter by adaLN and time and action share the width of c evenly. Which of several readings was taken
is in docs/methods/maag.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import dit, logic_net
from jaxrl_pt.models.base import Constrain
from jaxrl_pt.models.transformer import check_rotations
from jaxrl_pt.nn import images
from jaxrl_pt.nn.linear import add_bias, matmul
from jaxrl_pt.nn.norm import layer_norm
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.params import Init, ParamSpec, Role, normal, zeros
from jaxrl_pt.types import Array, Params

CHANNELS = 3
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


@struct.dataclass
class Told:
  """What the model is told of the frames of B games that it draws."""

  action: Array  # i32[B]
  counters: Array  # i32[B, M], −1 where the model is not told
  crop: Array  # i32[B, h, w] what the map says of the cells in view, −1 where it says nothing


class World(NamedTuple):
  """A model of a game, as pure functions over its parameters.

  The past f32[B, H, W, 3 K] are the last K frames side by side, the oldest first, from −1 to 1.

  begin(params, frame, told) → the past after the first frame f32[B, H, W, 3]: K times that frame.
  denoise(params, past, noisy f32[B, H, W, 3], time f32[B], told, bucket i32[B], step i32[B]) →
    what the network says of the frame, f32[B, H, W, 3]. `time` is the noise level from 0 to 1,
    `bucket` that of the past, `step` the index of the step size, which only a shortcut model reads.
  events(params, past, action i32[B]) → f32[B, E + 1], logits.
  remember(params, past, frame, told) → the past that ends with this frame.
  """

  config: cfg.DiT
  shape: Shape
  specs: Any
  begin: Callable[[Params, Array, Told], Array]
  denoise: Callable[[Params, Array, Array, Array, Told, Array, Array], Array]
  events: Callable[[Params, Array, Array], Array]
  remember: Callable[[Params, Array, Array, Told], Array]


def build(config: cfg.DiT, shape: Shape, compute: cfg.Compute = cfg.Compute(),
          constrain: Constrain = lambda x, axes: x, ops: Ops = Ops()) -> World:
  """Builds the model of a game.

  Args:
    config: the transformer, and what it is told.
    shape: of the game (`game.worlds.shape_of`).
    compute: dtype, rematerialisation and unrolling.
    constrain, ops: as in `transformer.build`.

  Raises:
    UserError: the patches do not divide the frame, or `Quant.hadamard` is set and a width has no
      Hadamard matrix here.
  """
  check_patches(config, shape)
  check_rotations(config)
  dtype = jnp.dtype(compute.dtype)
  blocks = dit.build(config, compute, constrain, ops)
  rows, columns = (size // config.patch for size in shape.frame)
  positions = images.positions_2d(rows, columns, config.d_model)
  conditions = config.conditions

  def denoise(params: Params, past: Array, noisy: Array, time_B: Array, told: Told,
              bucket_B: Array, step_B: Array) -> Array:
    crop = told.crop if conditions.map else jnp.full_like(told.crop, -1)
    pixels = jnp.concatenate([noisy, past, map_channels(shape, crop)], -1).astype(dtype)
    patches = matmul(images.patchify(pixels, config.patch), params['patches'])
    patches = patches + positions.astype(dtype)
    told_values = _value_tokens(params, shape, told.counters, conditions.values).astype(dtype)
    tokens = constrain(jnp.concatenate([patches, told_values], 1), ('batch', None, None))
    c = _condition(params, config, time_B, told.action if conditions.action else None)
    c = c + params['bucket'][bucket_B]
    if config.step_sizes:
      c = c + params['step'][step_B]
    c = c.astype(dtype)
    tokens = blocks(params['layers'], tokens, c)[:, :rows * columns]
    shift, scale = dit.modulation(params['final'], c, 2)
    out = matmul(dit.modulate(layer_norm(tokens), shift, scale), params['final']['out'],
                 jnp.float32)
    return images.unpatchify(out, config.patch, shape.frame)

  def events(params: Params, past: Array, action_B: Array) -> Array:
    return logic_net.logits(params['logic'], past.astype(dtype), action_B)

  def begin(params: Params, frame: Array, told: Told) -> Array:
    del params, told
    return jnp.tile(frame, (1, 1, 1, config.past.num_frames))

  def remember(params: Params, past: Array, frame: Array, told: Told) -> Array:
    del params, told
    return jnp.concatenate([past[..., CHANNELS:], frame], -1)

  return World(config, shape, _specs(config, shape), begin, denoise, events, remember)


def check_patches(config: cfg.DiT, shape: Shape) -> None:
  """Refuses patches that do not divide a frame."""
  if any(size % config.patch for size in shape.frame):
    height, width = shape.frame
    raise UserError(f'DiT.patch = {config.patch} does not divide a frame of {height} × {width} '
                    'pixels: choose a side that does, such as 4 or 8.')


# --- What the model is told ---------------------------------------------------------


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
  """i32[B, S]: the digits of all counters, the highest first, S = Σ shape.digits."""
  parts = [counters_BM[:, m, None] // 10 ** jnp.arange(number - 1, -1, -1) % _BASE
           for m, number in enumerate(shape.digits)]
  return jnp.concatenate(parts, 1)


def _value_tokens(params: Params, shape: Shape, counters_BM: Array, are_told: bool) -> Array:
  """f32[B, S, D]: E_digit[d] + E_slot[i] + E_counter[m] of each digit."""
  digits_BS = digits_of(shape, counters_BM)
  slots = [i for number in shape.digits for i in range(number)]
  counters = [m for m, number in enumerate(shape.digits) for _ in range(number)]
  is_told_BS = are_told & (counters_BM[:, jnp.array(counters)] >= 0)
  digits_BS = jnp.where(is_told_BS, digits_BS, _NO_DIGIT)
  return (params['digit'][digits_BS] + params['slot'][jnp.array(slots)]
          + params['counter'][jnp.array(counters)])


def _condition(params: Params, config: cfg.DiT, time_B: Array, action_B: Array | None) -> Array:
  """f32[B, D]: the embedding of the noise level, beside that of the action."""
  p = params['time']
  hidden = jax.nn.silu(add_bias(matmul(images.sinusoid(time_B, config.d_model), p['first']),
                                p['first_bias']))
  time = add_bias(matmul(hidden, p['second']), p['second_bias'])
  if action_B is None:  # The last entry stands for an action that the model is not told.
    action_B = jnp.full(time_B.shape, params['action'].shape[0] - 1)
  return jnp.concatenate([time, params['action'][action_B]], -1)


def _specs(config: cfg.DiT, shape: Shape) -> dict[str, Any]:
  width, half = config.d_model, config.d_model // 2
  pixels = config.patch**2
  past_channels = CHANNELS * config.past.num_frames
  of_map = shape.num_contents + 1 if shape.num_contents else 0

  def spec(size: tuple[int, ...], axes: tuple[str, ...], init: Init, role: Role) -> ParamSpec:
    return ParamSpec(size, jnp.dtype('float32'), axes, init, role)

  def table(number: int, size: int = width) -> ParamSpec:
    return spec((number, size), ('whole', 'whole'), normal(width**-0.5), 'table')

  def matrix(inputs: int, outputs: int) -> ParamSpec:
    return spec((inputs, outputs), ('whole', 'whole'), normal(inputs**-0.5), 'dense')

  def bias(size: int) -> ParamSpec:
    return spec((size,), ('whole',), zeros, 'bias')

  inputs = pixels * (CHANNELS + past_channels + of_map)
  found: dict[str, Any] = {
      'patches': spec((inputs, width), ('whole', 'embed'), normal(inputs**-0.5), 'dense'),
      'time': {'first': matrix(width, width), 'first_bias': bias(width),
               'second': matrix(width, half), 'second_bias': bias(half)},
      'action': table(shape.num_actions + 1, half),
      'bucket': table(config.past.noise_buckets),
      'digit': table(_BASE + 1), 'slot': table(max(shape.digits)),
      'counter': table(len(shape.digits)),
      'layers': dit.specs(config),
      'final': {'modulation': spec((width, 2 * width), ('embed', 'whole'), zeros, 'dense'),
                'modulation_bias': bias(2 * width),
                'out': spec((width, pixels * CHANNELS), ('embed', 'whole'), zeros, 'dense')},
      'logic': logic_net.specs(config.logic, (*shape.frame, past_channels), shape.num_actions,
                               shape.num_events)}
  if config.step_sizes:
    found['step'] = table(config.step_sizes)
  return found
