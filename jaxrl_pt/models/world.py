"""The model of a game: a DiT that draws the next frame from the past and from what it is told.

    tokens = W_in · patches(noisy frame ⊕ past ⊕ map) + positions,           one token a patch
           ⊕ E_digit[d] + E_slot[i] + E_counter[m],                         one token a digit
    c      = (time ⊕ E_action[a]) (+ E_bucket[noise of the past]) (+ E_step[step size])
    u      = unpatch(W_out · modulated LayerNorm(blocks(tokens, c)))

What is told enters where it costs nothing: the action by adaLN, the numbers as tokens, the map as
channels that lie where its cells are in the frame. A model that is not told something
(`cfg.Conditions`) gets the entry of each table that stands for nothing, and a map of which no cell
is known, so that it has the same parameters and does the same work.

The past comes in two forms. As a history of frames, u is what the network says of the new one. As a
hidden state z, each pass also makes the next state, from which what it says is read (2412.00887):

    z' = C₂ tanh(C₁ u),   said = C₄ ResBlock(z'),   C a convolution of 1 × 1

The event that an action leads to is LogicNet's (`logic_net`), which looks at the past. Of a history
that is the clean frames side by side: when an event is to be decided, the transformer has not yet
run for the new frame, and a pass of its own for the old ones would double the work of a frame,
while in these games the last frames hold all that decides an event.

A frame is its pixels, or its latents under a variational autoencoder, whose parameters are part of
the tree and are not trained.

Source: Model as a Game (2503.21172) and the code of its base model (2412.00887), where actions
enter by adaLN and time and action share the width of c evenly. Which of several readings was taken
is in docs/methods/maag.md. Departs from the base model: its ResBlock has no norms here, since z'
begins at zero, where a norm has no derivative.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import dit, logic_net, vae
from jaxrl_pt.models import told as tellings
from jaxrl_pt.models.base import Constrain
from jaxrl_pt.models.told import Shape, Told, spec, table
from jaxrl_pt.models.transformer import check_rotations
from jaxrl_pt.nn import images
from jaxrl_pt.nn.linear import matmul
from jaxrl_pt.nn.norm import layer_norm
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.params import ParamSpec, map_specs, normal, zeros
from jaxrl_pt.types import Array, Params

__all__ = ['Shape', 'Told', 'World', 'build']
# said, past' = denoise(params, past, noisy, time, told, bucket, step)
Denoise = Callable[[Params, Array, Array, Array, Told, Array, Array], tuple[Array, Array]]


class World(NamedTuple):
  """A model of a game, as pure functions over its parameters.

  Frames are f32[B, H, W, C], pixels from −1 to 1 or latents. The past is f32[B, H, W, K C], the
  last K frames side by side with the oldest first, or the hidden state z.

  frame_shape: (H, W, C).
  begin(params, frame, told) → the past after the first frame of an episode.
  denoise(params, past, noisy frame, time f32[B], told, bucket i32[B], step i32[B]) → what the
    network says of the frame, f32[B, H, W, C], and the past that follows if the frame is that,
    which a history leaves as it is. `time` is the noise level from 0 to 1; `bucket`, that of a
    history, and `step`, the index of a step size, are read by models that know of them.
  drawn(past that follows, frame) → the past after a frame that was drawn in these passes.
  remember(params, past, frame, told) → the past after a frame that came from elsewhere.
  start(params, number) → the past of so many games before their first frame.
  events(params, past, action i32[B]) → f32[B, E + 1], logits.
  encode(params, pixels f32[B, ·, ·, 3]) → frames; decode(params, frames) → pixels.
  """

  config: cfg.DiT
  shape: Shape
  specs: Any
  frame_shape: tuple[int, int, int]
  begin: Callable[[Params, Array, Told], Array]
  denoise: Denoise
  drawn: Callable[[Array, Array], Array]
  remember: Callable[[Params, Array, Array, Told], Array]
  start: Callable[[Params, int], Array]
  events: Callable[[Params, Array, Array], Array]
  encode: Callable[[Params, Array], Array]
  decode: Callable[[Params, Array], Array]


def build(config: cfg.DiT, shape: Shape, compute: cfg.Compute = cfg.Compute(),
          constrain: Constrain = lambda x, axes: x, ops: Ops = Ops()) -> World:
  """Builds the model of a game.

  Args:
    config: the transformer, its past, and what it is told.
    shape: of the game (`game.worlds.shape_of`).
    compute: dtype, rematerialisation and unrolling.
    constrain, ops: as in `transformer.build`.

  Raises:
    UserError: patches or latents do not divide the frame, or `Quant.hadamard` is set and a width
      has no Hadamard matrix here.
  """
  frame_shape = _frame_shape(config, shape)
  check_rotations(config)
  dtype = jnp.dtype(compute.dtype)
  passing = _make_pass(config, shape, frame_shape, compute, constrain, ops)

  def events(params: Params, past: Array, action_B: Array) -> Array:
    return logic_net.logits(params['logic'], past.astype(dtype), action_B)

  make = _recurrent if isinstance(config.past, cfg.Recurrent) else _history
  encode, decode = _coder(config)
  return World(config, shape, _specs(config, shape, frame_shape), frame_shape,
               events=events, encode=encode, decode=decode,
               **make(config, shape, frame_shape, passing))


def _frame_shape(config: cfg.DiT, shape: Shape) -> tuple[int, int, int]:
  """(H, W, C) of what the model draws."""
  height, width = shape.frame
  channels, scale = 3, 1
  if isinstance(config.space, cfg.VAE):
    channels, scale = config.space.latent_channels, config.space.factor
    vae.check_divides(config.space, shape.frame)
  rows, columns = height // scale, width // scale
  if rows % config.patch or columns % config.patch:
    what = 'pixels' if scale == 1 else 'latents'
    raise UserError(f'DiT.patch = {config.patch} does not divide a frame of {rows} × {columns} '
                    f'{what}: choose a side that does, such as 2 or 4.')
  return rows, columns, channels


def _coder(config: cfg.DiT) -> tuple[Callable[[Params, Array], Array], ...]:
  """`World.encode` and `World.decode`."""
  if isinstance(config.space, cfg.Pixels):
    return lambda params, pixels: pixels, lambda params, frames: frames
  space = config.space
  coder = vae.build(space)

  def encode(params: Params, pixels: Array) -> Array:
    mean, _ = coder.encode(params['vae'], pixels)
    return jax.lax.stop_gradient((mean - space.offset) * space.scale)

  def decode(params: Params, frames: Array) -> Array:
    return coder.decode(params['vae'], frames / space.scale + space.offset)

  return encode, decode


# --- One pass of the transformer ----------------------------------------------------


def _make_pass(config: cfg.DiT, shape: Shape, frame_shape: tuple[int, int, int],
               compute: cfg.Compute, constrain: Constrain, ops: Ops) -> Callable[..., Array]:
  """pass(params, maps f[B, H, W, ·], time, told, more f32[B, D]) → u f32[B, H, W, ·].

  `maps` are what is patched beside the map; `more` is added to the condition c.
  """
  dtype = jnp.dtype(compute.dtype)
  blocks = dit.build(config, compute, constrain, ops)
  rows, columns = (size // config.patch for size in frame_shape[:2])
  positions = images.positions_2d(rows, columns, config.d_model)
  pooling = shape.frame[0] // frame_shape[0]

  def run(params: Params, maps: Array, time_B: Array, told: Told, more: Array) -> Array:
    told = tellings.heard(told, config.conditions, shape)
    of_map = images.pooled(tellings.map_channels(shape, told.crop), pooling)
    seen = jnp.concatenate([maps, of_map], -1).astype(dtype)
    patches = matmul(images.patchify(seen, config.patch), params['patches'])
    patches = patches + positions.astype(dtype)
    values = tellings.value_tokens(params, shape, told.counters).astype(dtype)
    tokens = constrain(jnp.concatenate([patches, values], 1), ('batch', None, None))
    c = (tellings.condition(params, config.d_model, time_B, told.action) + more).astype(dtype)
    tokens = blocks(params['layers'], tokens, c)[:, :rows * columns]
    shift, scale = dit.modulation(params['final'], c, 2)
    out = matmul(dit.modulate(layer_norm(tokens), shift, scale), params['final']['out'],
                 jnp.float32)
    return images.unpatchify(out, config.patch, frame_shape[:2])

  return run


def _step_embedding(params: Params, config: cfg.DiT, step_B: Array) -> Array | float:
  return params['step'][step_B] if config.step_sizes else 0.0


# --- The past as frames -------------------------------------------------------------


def _history(config: cfg.DiT, shape: Shape, frame_shape: tuple[int, int, int],
             passing: Callable[..., Array]) -> dict[str, Any]:
  """The functions of `World` that a history of frames has of its own."""
  assert isinstance(config.past, cfg.FrameHistory)
  num_frames, channels = config.past.num_frames, frame_shape[-1]

  def begin(params: Params, frame: Array, told: Told) -> Array:
    del params, told
    return jnp.tile(frame, (1, 1, 1, num_frames))

  def denoise(params: Params, past: Array, noisy: Array, time_B: Array, told: Told,
              bucket_B: Array, step_B: Array) -> tuple[Array, Array]:
    more = params['bucket'][bucket_B] + _step_embedding(params, config, step_B)
    return passing(params, jnp.concatenate([noisy, past], -1), time_B, told, more), past

  def drawn(past: Array, frame: Array) -> Array:
    return jnp.concatenate([past[..., channels:], frame], -1)

  def remember(params: Params, past: Array, frame: Array, told: Told) -> Array:
    del params, told
    return drawn(past, frame)

  def start(params: Params, number: int) -> Array:
    del params
    return jnp.zeros((number, *frame_shape[:2], num_frames * channels))

  return {'begin': begin, 'denoise': denoise, 'drawn': drawn, 'remember': remember, 'start': start}


# --- The past as a hidden state -----------------------------------------------------


def _recurrent(config: cfg.DiT, shape: Shape, frame_shape: tuple[int, int, int],
               passing: Callable[..., Array]) -> dict[str, Any]:
  """The functions of `World` that a hidden state has of its own."""
  del shape

  def start(params: Params, number: int) -> Array:
    return jnp.tile(params['hidden']['first'], (number, 1, 1, 1))

  def denoise(params: Params, past: Array, noisy: Array, time_B: Array, told: Told,
              bucket_B: Array, step_B: Array) -> tuple[Array, Array]:
    del bucket_B
    p, more = params['hidden'], _step_embedding(params, config, step_B)
    u = passing(params, jnp.concatenate([noisy, past], -1), time_B, told, more)
    hidden = images.convolve(jnp.tanh(images.convolve(u, p['inner'])), p['outer'])
    inside = images.convolve(jax.nn.silu(hidden), p['block_first'])
    block = (images.convolve(hidden, p['block_skip'])
             + images.convolve(jax.nn.silu(inside), p['block_second']))
    return images.convolve(block, p['readout']), hidden

  def remember(params: Params, past: Array, frame: Array, told: Told) -> Array:
    """A pass at noise level 0, of which only the state is kept."""
    none = jnp.zeros(frame.shape[0], jnp.int32)
    return denoise(params, past, frame, jnp.zeros(frame.shape[0]), told, none, none)[1]

  def begin(params: Params, frame: Array, told: Told) -> Array:
    return remember(params, start(params, frame.shape[0]), frame, told)

  return {'begin': begin, 'denoise': denoise, 'drawn': lambda past, frame: past,
          'remember': remember, 'start': start}


# --- Parameters -------------------------------------------------------------------


def _specs(config: cfg.DiT, shape: Shape, frame_shape: tuple[int, int, int]) -> dict[str, Any]:
  width, pixels, channels = config.d_model, config.patch**2, frame_shape[-1]
  found: dict[str, Any] = {**tellings.specs(config, shape), 'layers': dit.specs(config)}
  match config.past:
    case cfg.FrameHistory(num_frames=number, noise_buckets=buckets):
      past, out = number * channels, channels
      found['bucket'] = table(buckets, width, width**-0.5)
    case cfg.Recurrent(channels=hidden):
      past = out = hidden
      found['hidden'] = _hidden_specs(frame_shape, hidden)
  inputs = pixels * (channels + past + shape.map_channels)
  by_width = lambda size, axes, init: ParamSpec(size, jnp.dtype('float32'), axes, init, 'dense')
  found['patches'] = by_width((inputs, width), ('whole', 'embed'), normal(inputs**-0.5))
  found['final'] = {
      'modulation': by_width((width, 2 * width), ('embed', 'whole'), zeros),
      'modulation_bias': spec((2 * width,), zeros, 'bias'),
      'out': by_width((width, pixels * out), ('embed', 'whole'), zeros)}
  found['logic'] = logic_net.specs(config.logic, (*frame_shape[:2], past), shape.num_actions,
                                   shape.num_events)
  if config.step_sizes:
    found['step'] = table(config.step_sizes, width, width**-0.5)
  if isinstance(config.space, cfg.VAE):
    found['vae'] = map_specs(lambda s: s._replace(is_trained=False), vae.build(config.space).specs)
  return found


def _hidden_specs(frame_shape: tuple[int, int, int], hidden: int) -> dict[str, ParamSpec]:
  """The first state, the convolutions that make the next one, and the readout."""
  height, width, channels = frame_shape

  def kernel(side: int, inputs: int, outputs: int) -> ParamSpec:
    return spec((side, side, inputs, outputs), normal((side * side * inputs) ** -0.5), 'dense')

  return {'first': spec((height, width, hidden), normal(0.02), 'table'),
          'inner': kernel(1, hidden, hidden), 'outer': kernel(1, hidden, hidden),
          'block_first': kernel(3, hidden, channels), 'block_second': kernel(3, channels, channels),
          'block_skip': kernel(1, hidden, channels), 'readout': kernel(1, channels, channels)}
