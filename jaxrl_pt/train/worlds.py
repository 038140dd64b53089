"""The loss of a model of a game: that of its process, and the cross-entropy of the event.

    L = Σ_pixels w_pixel (said − target)² / Σ w_pixel · w(t)  +  λ · w_event · CE(π, event)

of each frame that is to be drawn. w_pixel is `Diffusion.display_weight` on the display and 1
elsewhere, since digits are a small part of a frame. w(t) is 1 for flows, and the weight of the
noise level for v-prediction (`diffusion.weights`). The past is what truly happened, with noise of a
level that the model is told (2408.14837), so that it does not trust it blindly when the past is its
own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt.diffusion import processes, weights
from jaxrl_pt.diffusion.sampling import as_pixels
from jaxrl_pt.models.told import Told
from jaxrl_pt.models.world import World
from jaxrl_pt.train.step import MeasuredLoss, Metrics
from jaxrl_pt.types import Array, Clips, Params, Weighted


def row_weights(height: int, display_rows: float, display_weight: float) -> np.ndarray:
  """f32[H, 1, 1]: the weight of each row of pixels or latents; their mean is 1."""
  weight_H = np.where(np.arange(height) < display_rows, display_weight, 1.0)
  return (weight_H / weight_H.mean()).astype(np.float32)[:, None, None]


def num_frames(clips: Clips) -> Array:
  """f32[]: the frames that a batch is to draw, by which the step divides."""
  return jnp.asarray(clips.event.size, jnp.float32)


def frame_loss(world: World, config: cfg.Diffusion) -> MeasuredLoss:
  """loss(params, clips) → (the sum over the clips, metrics).

  Its metrics are means over frames: the loss, its two parts, and LogicNet's accuracy, of all frames
  and of those in which something happened.

  Args:
    world: the model.
    config: process, noise and weights.
  """
  height = world.frame_shape[0]
  display_rows = world.shape.display_rows * height / world.shape.frame[0]
  pixels = jnp.asarray(row_weights(height, display_rows, config.display_weight))
  recurrent = isinstance(world.config.past, cfg.Recurrent)
  errors = _sequence_errors if recurrent else _clip_errors

  def loss(params: Params, clips: Clips) -> tuple[Array, Metrics]:
    error_R, logits = errors(world, config, params, clips, pixels)
    event_R = clips.event.reshape(-1)
    cross_R = optax.softmax_cross_entropy_with_integer_labels(logits, event_R)
    balanced_R = cross_R * clips.event_weight.reshape(-1)
    each_R = error_R + config.event_weight * balanced_R
    is_right_R, everywhere = logits.argmax(-1) == event_R, jnp.ones_like(each_R)
    mean = lambda x: Weighted.of(jax.lax.stop_gradient(x), everywhere)
    return each_R.sum(), {
        'loss': mean(each_R), 'frame_loss': mean(error_R), 'event_loss': mean(balanced_R),
        'event_accuracy': mean(is_right_R.astype(jnp.float32)),
        'event_recall': Weighted.of(is_right_R.astype(jnp.float32), event_R > 0)}

  return loss


def _encoded(world: World, params: Params, frames: Array) -> Array:
  """f32[..., H, W, C]: what the model draws for frames u8[..., ·, ·, 3]."""
  flat = world.encode(params, as_pixels(frames.reshape(-1, *frames.shape[-3:])))
  return flat.reshape(*frames.shape[:-3], *world.frame_shape)


def _mean_square(said: Array, wanted: Array, pixels: Array) -> Array:
  return (pixels * jnp.square(said - wanted)).mean((-3, -2, -1))


# --- A history of frames ------------------------------------------------------------


class _Rows(NamedTuple):
  """Clips of all episodes, one after the other, with what was drawn for them: R rows."""

  past: Array  # f32[R, H, W, K C] with noise
  bucket: Array  # i32[R]
  told: Told
  frame: Array  # f32[R, H, W, C]
  noise: Array  # f32[R, H, W, C]
  key: Array  # key[R]


def _clip_errors(world: World, config: cfg.Diffusion, params: Params, clips: Clips, pixels: Array
                 ) -> tuple[Array, Array]:
  """f32[R] the error of each clip, and f32[R, E + 1] the logits of its event."""
  num_clips, num = clips.event.shape[1], clips.event.size
  flat = jax.tree.map(lambda x: x.reshape(num, *x.shape[2:]), clips)
  frames = _encoded(world, params, flat.frames)
  clean = jnp.concatenate([frames[:, k] for k in range(frames.shape[1] - 1)], -1)
  rows = _with_noise(world.config, config, flat, clean, frames[:, -1])
  logits = world.events(params, clean, flat.action)
  process = config.process
  if isinstance(process, cfg.Shortcut):
    return _shortcut_errors(world, process, params, rows, pixels, num_clips), logits
  time_R = jax.vmap(lambda key: processes.draw_times(process, key))(rows.key)
  x_t = processes.noised(process, rows.frame, rows.noise, time_R)
  said, _ = world.denoise(params, rows.past, x_t, time_R, rows.told, rows.bucket,
                          jnp.zeros_like(rows.bucket))
  wanted = processes.target(process, rows.frame, rows.noise, time_R)
  error_R = _mean_square(said, wanted, pixels)
  if isinstance(process, cfg.VDiffusion):
    snr_R = processes.signal_to_noise(process, time_R)
    # The frames of a clip are known, so that each frame to draw is the first of its sequence.
    error_R *= weights.forcing(snr_R[:, None], process.snr_clip, process.decay)[:, 0]
  return error_R, logits


def _with_noise(model: cfg.DiT, config: cfg.Diffusion, flat: Clips, clean: Array, frame: Array
                ) -> _Rows:
  """Draws the noise of the past and that of the frame, of each row from its own key."""
  assert isinstance(model.past, cfg.FrameHistory)
  buckets = model.past.noise_buckets

  def draw(key: Array, past: Array, frame: Array) -> tuple[Array, ...]:
    keys = jax.random.split(key, 4)
    level = jax.random.uniform(keys[0])
    strength = config.context_noise * level
    noise = jax.random.normal(keys[1], past.shape)
    bucket = (level * buckets).astype(jnp.int32) if config.context_noise else 0
    return ((1 - strength) * past + strength * noise, jnp.asarray(bucket),
            jax.random.normal(keys[2], frame.shape), keys[3])

  past, bucket, noise, key = jax.vmap(draw)(flat.keys, clean, frame)
  return _Rows(past, bucket, Told(flat.action, flat.counters, flat.crop), frame, noise, key)


# --- A hidden state -----------------------------------------------------------------


def _sequence_errors(world: World, config: cfg.Diffusion, params: Params, clips: Clips,
                     pixels: Array) -> tuple[Array, Array]:
  """f32[R] the error of each frame of whole episodes, and f32[R, E + 1] the logits of its event.

  Each frame has a noise level of its own (2407.01392), and the state that follows it is made of the
  noisy frame. Only one frame's pass is kept for the backward pass; the others are computed again.
  """
  process = config.process
  num, length = clips.event.shape
  frames_BT = _encoded(world, params, clips.frames[:, :, -1])

  def draw(key: Array) -> tuple[Array, Array]:
    keys = jax.random.split(key)
    return processes.draw_times(process, keys[0]), jax.random.normal(keys[1], world.frame_shape)

  time_BT, noise_BT = jax.vmap(jax.vmap(draw))(clips.keys)
  flat = lambda x: x.reshape(num * length, *x.shape[2:])
  x_t = processes.noised(process, flat(frames_BT), flat(noise_BT), flat(time_BT))
  wanted = processes.target(process, flat(frames_BT), flat(noise_BT), flat(time_BT))
  told = Told(clips.action, clips.counters, clips.crop)
  none = jnp.zeros(num, jnp.int32)

  def frame(hidden: Array, given: tuple[Array, Array, Told]) -> tuple[Array, tuple[Array, Array]]:
    noisy, time_B, told = given
    logits = world.events(params, hidden, told.action)
    said, hidden = world.denoise(params, hidden, noisy, time_B, told, none, none)
    return hidden, (said, logits)

  by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0),
                         (x_t.reshape(frames_BT.shape), time_BT, told))
  _, (said, logits) = jax.lax.scan(jax.checkpoint(frame), world.start(params, num), by_time)
  by_row = lambda x: flat(jnp.moveaxis(x, 0, 1))
  error_R = _mean_square(by_row(said), wanted, pixels)
  if isinstance(process, cfg.VDiffusion):
    snr_BT = processes.signal_to_noise(process, time_BT)
    error_R *= flat(weights.forcing(snr_BT, process.snr_clip, process.decay))
  return error_R, by_row(logits)


# --- Shortcut models ----------------------------------------------------------------


def shortcut_target(world: World, params: Params, rows: _Rows, x_t: Array, time_R: Array,
                    index_R: Array) -> Array:
  """The velocity of one step of size d that equals two steps of size d / 2 (2410.12557).

    b₁ = s(x_t, t, d / 2),  b₂ = s(x_t − d / 2 · b₁, t − d / 2, d / 2),  target (b₁ + b₂) / 2

  It is a constant of the gradient. Departs from the paper: the parameters are the current ones, not
  their running average.

  Args:
    world, params: the model.
    rows: what it is told.
    x_t: f32[R, H, W, 3].
    time_R: f32[R], at least d.
    index_R: i32[R], of which d = 2^−index is the size.
  """
  half_R = 0.5 ** (index_R + 1).astype(jnp.float32)

  def said(x: Array, time: Array) -> Array:
    return world.denoise(params, rows.past, x, time, rows.told, rows.bucket, index_R + 1)[0]

  first = said(x_t, time_R)
  second = said(x_t - half_R[:, None, None, None] * first, time_R - half_R)
  return jax.lax.stop_gradient((first + second) / 2)


def _shortcut_errors(world: World, process: cfg.Shortcut, params: Params, rows: _Rows,
                     pixels: Array, num_clips: int) -> Array:
  """The errors of a shortcut model: the first clip of each episode learns a large step.

  Taking a clip of every episode keeps the rows of each device at work.
  """
  num_episodes = rows.frame.shape[0] // num_clips

  def clips_from(low: int, high: int) -> _Rows:
    def some(x: Array) -> Array:
      by_clip = x.reshape(num_episodes, num_clips, *x.shape[1:])[:, low:high]
      return by_clip.reshape(num_episodes * (high - low), *x.shape[1:])
    return jax.tree.map(some, rows)

  large, small = clips_from(0, 1), clips_from(1, num_clips)
  finest = world.config.step_sizes - 1

  def draw(key: Array) -> tuple[Array, Array]:
    keys = jax.random.split(key)
    index = jax.random.randint(keys[0], (), 0, max(finest, 1))
    place = jax.random.randint(keys[1], (), 0, 2**index)
    return index, (1 + place) / 2**index

  index, time = jax.vmap(draw)(large.key)
  x_t = processes.noised(process, large.frame, large.noise, time)
  wanted = shortcut_target(world, params, large, x_t, time, index)
  said, _ = world.denoise(params, large.past, x_t, time, large.told, large.bucket, index)
  of_large = _mean_square(said, wanted, pixels)

  time = jax.vmap(lambda key: processes.draw_times(process, key))(small.key)
  x_t = processes.noised(process, small.frame, small.noise, time)
  said, _ = world.denoise(params, small.past, x_t, time, small.told, small.bucket,
                          jnp.full_like(small.bucket, finest))
  of_small = _mean_square(said, processes.target(process, small.frame, small.noise, time), pixels)
  both = jnp.concatenate([of_large.reshape(-1, 1), of_small.reshape(-1, num_clips - 1)], 1)
  return both.reshape(-1)
