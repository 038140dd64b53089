"""Plays a game inside its model: the functions of which a rollout, a server or a policy are made.

A frame of B games goes like this, whatever is around it:

    logits = event_logits(world, params, state, action)      → the caller's ledger (`game.base`)
    told   = Told(action, counters, crop)                    → counters and map are the caller's
    frame, state = next_frame(world, params, solver, state, told, keys)

All are pure functions that can be jitted and scanned, and whose carry is the state. Each game has a
key of its own, so that what happens in it does not depend on the batch that it is in.
"""

from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.diffusion import processes
from jaxrl_pt.models.told import Told
from jaxrl_pt.models.world import World
from jaxrl_pt.types import Array, Params


class Solver(NamedTuple):
  """How noise becomes a frame: the process that the model was trained in, in so many steps."""

  process: cfg.Process
  num_steps: int


@struct.dataclass
class State:
  """What the model itself keeps from frame to frame of B games."""

  past: Array  # as in `World`


def as_pixels(frame: Array) -> Array:
  """f32[...] from −1 to 1, of frames u8, or f32 from 0 to 1."""
  scaled = frame.astype(jnp.float32) / 255 if frame.dtype == jnp.uint8 else frame
  return 2 * scaled - 1


def init_state(world: World, params: Params, frame_BHWC: Array, told: Told) -> State:
  """The state after the first frame of an episode.

  Args:
    world, params: the model.
    frame_BHWC: u8 or f32[B, H, W, 3] from 0 to 1.
    told: what it shows; its action is the one that does nothing.
  """
  return State(world.begin(params, world.encode(params, as_pixels(frame_BHWC)), told))


def observe(world: World, params: Params, state: State, frame_BHWC: Array, told: Told) -> State:
  """The state after a frame that was not drawn by the model, such as one of the true game.

  Args:
    world, params: the model.
    state: before the frame.
    frame_BHWC: u8 or f32[B, H, W, 3] from 0 to 1.
    told: the action that led to it, and what it shows.
  """
  frame = world.encode(params, as_pixels(frame_BHWC))
  return State(world.remember(params, state.past, frame, told))


def event_logits(world: World, params: Params, state: State, action_B: Array) -> Array:
  """f32[B, E + 1]: LogicNet's logits of what the action leads to; event 0 is that there is none."""
  return world.events(params, state.past, action_B)


def next_frame(world: World, params: Params, solver: Solver, state: State, told: Told,
               keys_B: Array) -> tuple[Array, State]:
  """Draws the frame that an action leads to.

  Args:
    world, params: the model.
    solver: the process and the number of its steps, each of which is a pass of the transformer.
    state: of B games.
    told: action, counters after the event, and what the map says of the cells that will be in
      view.
    keys_B: key[B] of the noise of each game's frame.

  Returns:
    f32[B, H, W, 3] from 0 to 1, as `game.reading.read` takes it, and the state after it.
  """
  process, num = solver.process, keys_B.shape[0]
  at = jnp.asarray(processes.times(process, solver.num_steps))
  clean = jnp.zeros(num, jnp.int32)  # The bucket of a past that is as it is.
  size = jnp.full(num, processes.step_index(process, solver.num_steps))

  def denoise(carry: tuple[Array, Array], levels: tuple[Array, Array]
              ) -> tuple[tuple[Array, Array], None]:
    time_B, next_B = (jnp.broadcast_to(level, (num,)) for level in levels)
    said, past = world.denoise(params, state.past, carry[0], time_B, told, clean, size)
    return (processes.step(process, said, carry[0], time_B, next_B), past), None

  noise = jax.vmap(lambda key: jax.random.normal(key, world.frame_shape))(keys_B)
  (frame, past), _ = jax.lax.scan(denoise, (noise, state.past), (at[:-1], at[1:]))
  pixels = jnp.clip(world.decode(params, frame), -1.0, 1.0)
  if isinstance(world.config.space, cfg.Pixels):  # It remembers what it has shown.
    frame = pixels
  return (pixels + 1) / 2, State(world.drawn(past, frame))
