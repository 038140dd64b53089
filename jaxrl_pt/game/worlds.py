"""What a model of a game learns from: its sizes, and clips of its episodes with what is told."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.game import base, display
from jaxrl_pt.game.trajectories import Trajectory
from jaxrl_pt.models.told import Shape
from jaxrl_pt.types import Array, Clips, Stills


def shape_of(game: base.Game) -> Shape:
  """What a model must know of a game."""
  unit = display.scale(game.config.frame).unit
  return Shape(
      frame=game.frame_shape, display_rows=display.NUM_ROWS * unit, num_actions=len(game.actions),
      stay=game.stay, num_events=len(game.events),
      digits=tuple(counter.num_digits for counter in game.counters),
      num_contents=len(game.contents), view=game.view_shape, grid=game.grid)


def clips(game: base.Game, config: cfg.Diffusion, past: cfg.Past, episodes: Trajectory,
          keys_B: Array) -> Clips:
  """Clips of episodes: `windows` of each, every one a frame to draw and the frames before it.

  A model with a hidden state learns all frames of an episode, in order, and sees none before them.

  Which frames are taken, which cells of the map are hidden and where the map is off follows from
  the keys. Before the first frame of an episode stands that frame itself, as at the beginning of a
  game (`World.begin`).

  Args:
    game: the game.
    config: the number of windows, and the noise of the map.
    past: how many frames are before the one to draw, or that there is a hidden state.
    episodes: [B, T, ...].
    keys_B: key[B] of each episode in this step.
  """
  num_frames = episodes.actions.shape[1]
  is_whole = isinstance(past, cfg.Recurrent)
  before = 0 if isinstance(past, cfg.Recurrent) else past.num_frames

  def one(episode: Trajectory, key: Array, number: Array) -> tuple[Any, ...]:
    keys = jax.random.split(key, 3)
    last = number if is_whole else jax.random.randint(keys[0], (), 1, num_frames)
    frames = jnp.maximum(last + jnp.arange(-before, 1), 0)
    truth = jax.tree.map(lambda x: x[last], episode.truth)
    crop = noisy_crop(game, config, truth.memory, keys[1])
    return (episode.frames[frames], episode.actions[last], truth.counters, crop, truth.event,
            keys[2])

  def of_episode(episode: Trajectory, key: Array) -> tuple[Any, ...]:
    number = num_frames if is_whole else config.windows
    return jax.vmap(lambda k, n: one(episode, k, n))(jax.random.split(key, number),
                                                    jnp.arange(number))

  frames, actions, counters, crop, event, keys = jax.vmap(of_episode)(episodes, keys_B)
  return Clips(frames, actions, counters, crop, event,
               balanced(event, len(game.events)), keys)


def stills(config: cfg.Autoencoding, episodes: Trajectory, keys_B: Array) -> Stills:
  """`windows` frames of each episode, drawn with their noise from the keys."""
  num_frames = episodes.actions.shape[1]

  def one(frames: Array, key: Array) -> tuple[Array, Array]:
    keys = jax.random.split(key, 2)
    return frames[jax.random.randint(keys[0], (), 0, num_frames)], keys[1]

  each = lambda frames, key: jax.vmap(lambda k: one(frames, k))(
      jax.random.split(key, config.windows))
  return Stills(*jax.vmap(each)(episodes.frames, keys_B))


def noisy_crop(game: base.Game, config: cfg.Diffusion, crop: Array, key: Array) -> Array:
  """i32[h, w]: what the map says of the cells in view, less some cells and at times off by one.

  Only a map that is larger than the view can be off, along the axes in which it is larger.
  """
  if not game.contents:
    return crop
  keys = jax.random.split(key, 3)
  hidden = jax.random.bernoulli(keys[0], config.map_dropout, crop.shape)
  crop = jnp.where(hidden, base.UNKNOWN, crop)
  axes = [axis for axis in (0, 1) if game.world_shape[axis] > game.view_shape[axis]]
  if not axes:
    return crop
  moves = jnp.array([[sign * (axis == one) for axis in (0, 1)] for one in axes for sign in (-1, 1)])
  move = moves[jax.random.randint(keys[1], (), 0, len(moves))]
  is_off = jax.random.bernoulli(keys[2], config.pose_jitter)
  padded = jnp.pad(crop, 1, constant_values=base.UNKNOWN)
  start = 1 + jnp.where(is_off, move, 0)
  return jax.lax.dynamic_slice(padded, (start[0], start[1]), crop.shape)


def balanced(event: Array, num_events: int) -> Array:
  """f32[...]: weights with which every class of event that occurs counts as much as another.

  The weights of all clips have the mean 1. Events are rare (2 % of Pong's frames), and a classifier
  of what is likeliest could leave them out.
  """
  is_class = jax.nn.one_hot(event, num_events)
  counts = is_class.sum(tuple(range(event.ndim)))
  share = event.size / jnp.maximum(counts, 1.0) / jnp.maximum((counts > 0).sum(), 1)
  return share[event]
