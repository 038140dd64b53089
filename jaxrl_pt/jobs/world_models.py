"""A model of a game as the three functions that rollouts ask for, and the program of a frame."""

import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.diffusion import sampling
from jaxrl_pt.game import base, dream, noise
from jaxrl_pt.jobs.kind import Program, abstract
from jaxrl_pt.models.world import Told, World
from jaxrl_pt.parallel import rules
from jaxrl_pt.types import Params


def world_model(world: World, solver: sampling.Solver, stay: int) -> dream.WorldModel:
  """A model as rollouts ask for it.

  Args:
    world: the model.
    solver: how it turns noise into a frame.
    stay: the game's action that does nothing.
  """
  def begin(params: Params, frames: Array, told: dream.Condition) -> sampling.State:
    still = jnp.full(len(frames), stay, jnp.int32)
    return sampling.init_state(world, params, frames, Told(still, told.values, told.crop))

  def event_logits(params: Params, state: sampling.State, actions: Array) -> Array:
    return sampling.event_logits(world, params, state, actions)

  def next_frame(params: Params, state: sampling.State, actions: Array, told: dream.Condition,
                 keys: Array) -> tuple[Array, sampling.State]:
    return sampling.next_frame(world, params, solver, state,
                               Told(actions, told.values, told.crop),
                               jax.random.wrap_key_data(keys))

  return dream.WorldModel(begin, event_logits, next_frame)


def frame_program(game: base.Game, world: World, solver: sampling.Solver, mesh: Mesh,
                  share: float) -> Program:
  """The frame of one player with all modules round the model, as `play` draws it.

  Args:
    game, world, solver: the game, its model, and how that draws.
    mesh: one device.
    share: of the model FLOPs of a training step, those of the frame.
  """
  memory = cfg.MapMemory() if game.contents else cfg.NoMap()
  played = dream.World(game, world_model(world, solver, game.stay), memory)

  def begin(params: Params, key: Array) -> dream.Dream:
    truth = game.truth(game.init(key))
    frame = base.render(game, truth)
    return dream.start(played, params, frame[None], jax.tree.map(lambda x: x[None], truth),
                       key[None])

  params, everywhere = P.abstract(world.specs), rules.replicated(mesh)
  started = jax.eval_shape(begin, params, noise.key(0))
  args: Any = (params, started, dream.given(jnp.zeros(1, jnp.int32)),
               dream.switches(cfg.MaaG(map=memory)))
  return Program('frame of one player', jax.jit(functools.partial(dream.step, played)),
                 jax.tree.map(lambda x: abstract(x.shape, x.dtype, everywhere), args), share)
