"""What a model of a game learns from: its sizes, and clips of its episodes with what is told."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.game import base, display, maps
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


def clips(game: base.Game, config: cfg.Diffusion, model: cfg.DiT, episodes: Trajectory,
          keys_B: Array) -> Clips:
  """Clips of episodes: `windows` of each, every one a frame to draw and the frames before it.

  A model with a hidden state learns all frames of an episode, in order, and sees none before them.

  Which frames are taken, what is painted, which cells of the map are hidden and where the map is
  off follows from the keys. Before the first frame of an episode stands that frame itself, as at
  the beginning of a game (`World.begin`).

  Args:
    game: the game.
    config: the number of windows, what is painted, and the noise of the map.
    model: how many frames are before the one to draw, or that there is a hidden state.
    episodes: [B, T, ...].
    keys_B: key[B] of each episode in this step.
  """
  num_frames = episodes.actions.shape[1]
  is_whole = isinstance(model.past, cfg.Recurrent)
  before = 0 if isinstance(model.past, cfg.Recurrent) else model.past.num_frames
  # Who does not see the map could only guess; and in a whole episode later frames would deny it.
  is_painted = bool(config.paint_rate and model.conditions.map and not is_whole and game.contents)

  def one(episode: Trajectory, key: Array, number: Array) -> tuple[Any, ...]:
    keys = jax.random.split(key, 4)
    last = number if is_whole else jax.random.randint(keys[0], (), 1, num_frames)
    frames = jnp.maximum(last + jnp.arange(-before, 1), 0)
    truth = jax.tree.map(lambda x: x[last], episode.truth)
    pictures = episode.frames[frames]
    if is_painted:
      truth = painted(game, config.paint_rate, truth, keys[3])
      pictures = pictures.at[-1].set(base.render(game, truth))
    crop = noisy_crop(game, config, truth.memory, keys[1])
    return pictures, episode.actions[last], truth.counters, crop, truth.event, keys[2]

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


def painted(game: base.Game, rate: float, truth: base.Truth, key: Array) -> base.Truth:
  """What is true of a frame if somebody has painted a cell of the map before it, which `rate` says.

  Any cell in view can become anything that is built, but walls and edges stay, and nobody is
  painted over who stands there.

  Args:
    game: a game with a map.
    rate: how often it happens.
    truth: of the frame.
    key: decides all of it.
  """
  keys, (rows, columns) = jax.random.split(key, 3), game.view_shape
  choices = jnp.asarray(maps.buildable(game))
  changeable = np.append(game.tiles.vacant, False)
  changeable[maps.buildable(game)] = True
  is_free = jnp.asarray(changeable)[truth.cells]  # UNKNOWN, −1, is the last entry.
  for place in truth.objects:
    is_free &= ~base.is_at((rows, columns), place)
  drawn = jnp.where(is_free, jax.random.uniform(keys[0], (rows, columns)), -1.0)
  happens = is_free.any() & jax.random.bernoulli(keys[1], rate)
  here = (drawn == drawn.max()) & happens
  content = choices[jax.random.randint(keys[2], (), 0, len(choices))]
  return dataclasses.replace(truth, cells=jnp.where(here, content, truth.cells),
                             memory=jnp.where(here, content, truth.memory))


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
