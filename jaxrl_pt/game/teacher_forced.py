"""Frames that a model draws after a true past, and what the reader says of them."""

import jax
from jax import Array
import jax.numpy as jnp

from jaxrl_pt.diffusion.sampling import Solver, State, init_state, next_frame, observe
from jaxrl_pt.game import base, reading
from jaxrl_pt.game.trajectories import Trajectory
from jaxrl_pt.models.told import Told
from jaxrl_pt.models.world import World
from jaxrl_pt.types import Params, Weighted


def told_of(frame: Trajectory) -> Told:
  """What is true of a frame of each episode, without a time axis."""
  return Told(frame.actions, frame.truth.counters, frame.truth.memory)


def frames(world: World, params: Params, solver: Solver, episodes: Trajectory, keys_B: Array
           ) -> Array:
  """f32[B, T − 1, H, W, 3]: every frame but the first, each drawn after the true ones before it.

  The model is told the true numbers, and the map that a perfect memory has.

  Args:
    world, params, solver: the model, and how it draws.
    episodes: [B, T, ...].
    keys_B: key[B] of each episode's noise.
  """
  def turn(state: State, frame: tuple[Trajectory, Array]) -> tuple[State, Array]:
    episode, number = frame
    told = told_of(episode)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)
    drawn, _ = next_frame(world, params, solver, state, told, keys)
    return observe(world, params, state, episode.frames, told), drawn

  by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), episodes)
  first, rest = (jax.tree.map(lambda x, part=part: x[part], by_time)
                 for part in (0, slice(1, None)))
  numbers = jnp.arange(1, episodes.actions.shape[1])
  _, drawn = jax.lax.scan(turn, init_state(world, params, first.frames, told_of(first)),
                          (rest, numbers))
  return jnp.moveaxis(drawn, 0, 1)


def frame_metrics(game: base.Game, world: World, params: Params, solver: Solver,
                  episodes: Trajectory, keys_B: Array) -> dict[str, Weighted]:
  """How often a frame drawn after a true past can be read, and shows what is true.

  `counters` and `objects` are shares of frames in which all of them are right; `cells` is the share
  of right ones among cells of which the map tells what they show, `new_cells` among all others that
  are shown: those of which it says nothing, and where something has just been built. An unreadable
  frame is right in nothing.

  Arguments as in `frames`.
  """
  drawn = frames(world, params, solver, episodes, keys_B)
  truth = jax.tree.map(lambda x: x[:, 1:], episodes.truth)
  read = jax.vmap(jax.vmap(lambda frame: reading.read(game, frame)))(drawn)
  readable = read.readable
  everywhere = jnp.ones_like(readable)
  same = lambda a, b: (a == b).reshape(*readable.shape, -1).all(-1) & readable
  cells = (read.cells == truth.cells) & readable[..., None, None]
  is_told = truth.memory == truth.cells
  shown = truth.cells != base.UNKNOWN
  return {'readable': Weighted.of(readable, everywhere),
          'counters': Weighted.of(same(read.counters, truth.counters), everywhere),
          'objects': Weighted.of(same(read.objects, truth.objects), everywhere),
          'cells': Weighted.of(cells, is_told & shown),
          'new_cells': Weighted.of(cells, ~is_told & shown)}
