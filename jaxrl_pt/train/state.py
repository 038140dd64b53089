"""The training state: described, initialised sharded, restored."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from jaxrl_pt import params as P
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import rules
from jaxrl_pt.types import Array, Params, TrainState


def _new(model: Model, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
  params = P.init(model.specs, key)
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), {})


def abstract_state(model: Model, optimizer: optax.GradientTransformation,
                   mesh: Mesh) -> TrainState:
  """The state as ShapeDtypeStructs with shardings: the target of init and of a restore.

  Moments are sharded like their parameters, everything else is replicated.
  """
  shapes = jax.eval_shape(lambda key: _new(model, optimizer, key), jax.random.key(0))
  param_shardings = rules.param_shardings(model.specs, mesh)
  everywhere = rules.replicated(mesh)
  opt_shardings = optax.tree_map_params(
      optimizer, lambda _, sharding: sharding, shapes.opt_state, param_shardings,
      transform_non_params=lambda _: everywhere)
  shardings = TrainState(everywhere,  # type: ignore[arg-type]  # Same tree.
                         param_shardings, opt_shardings, {})

  def with_sharding(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

  return jax.tree.map(with_sharding, shapes, shardings)


def state_of(params: Params, optimizer: optax.GradientTransformation,
             abstract: TrainState) -> TrainState:
  """A new state at step 0 that starts from given parameters (copied: the step donates)."""
  shardings = jax.tree.map(lambda s: s.sharding, abstract)
  start = jax.jit(lambda p: TrainState(jnp.zeros((), jnp.int32), p, optimizer.init(p), {}),
                  out_shardings=shardings)
  return start(params)


def init_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh,
               seed: int) -> TrainState:
  """A new state, born sharded: no device ever holds more than its part."""
  shardings = jax.tree.map(lambda s: s.sharding, abstract_state(model, optimizer, mesh))
  init = jax.jit(lambda key: _new(model, optimizer, key), out_shardings=shardings)
  return init(jax.random.key(seed))
