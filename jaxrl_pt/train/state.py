"""The training state: described, initialised sharded, restored."""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import rules
from jaxrl_pt.types import Params, RolloutBatch, TrainState

# --- What a method of reinforcement learning keeps between steps ------------------


@struct.dataclass
class ValueHead:
  """GAE's value head with its own optimizer; empty without one."""

  params: Any  # {'weight': f32[D], 'bias': f32[]} or {}
  opt_state: Any


@struct.dataclass
class MethodState:
  """`TrainState.method` of a run of reinforcement learning."""

  gate: Any  # f32[] accuracy that Short-RL's gate compares with, or {}
  value: ValueHead
  pending: Any  # RolloutBatch drawn ahead of its update (one-step-off), or {}
  average: Any  # Params of RLP's average policy, or {}


def value_optimizer(advantage: cfg.Advantage) -> optax.GradientTransformation:
  """Adam for the value head where the advantage has one."""
  match advantage:
    case cfg.GAE(value_lr=learning_rate):
      return optax.adam(learning_rate)
    case _:
      return optax.identity()


def no_method(params: Params) -> Any:
  """Of steps that keep nothing but parameters and moments."""
  del params
  return {}


def new_method(rollouts: cfg.Rollouts, algorithm: cfg.Algorithm, d_model: int,
               average: Any = ()) -> MethodState:
  """What a method keeps before its first step.

  Args:
    rollouts, algorithm: of the run's objective.
    d_model: of its model.
    average: the parameters where their average is kept, else ().
  """
  head: Any = {}
  if isinstance(algorithm.advantage, cfg.GAE):
    head = {'weight': jnp.zeros(d_model), 'bias': jnp.zeros(())}
  gate: Any = jnp.zeros(()) if isinstance(algorithm.shaping, cfg.ShortRL) else {}
  pending: Any = {}
  if rollouts.mode == cfg.OneStepOff():
    shape = rollouts.num_prompts, rollouts.group_size, rollouts.response_tokens
    reals, numbers = (lambda: jnp.zeros(shape)), (lambda: jnp.zeros(shape, jnp.int32))
    pending = RolloutBatch(numbers(), reals(), reals(), reals(), numbers(), numbers())
  # A copy: the step donates parameters and average both.
  return MethodState(gate, ValueHead(head, value_optimizer(algorithm.advantage).init(head)),
                     pending, jax.tree.map(jnp.copy, average) if average else {})


def _method_shardings(method: Any, mesh: Mesh, params: Any) -> Any:
  """Pending rollouts are split by rows, an average policy as `params`, the rest is replicated."""
  everywhere, rows = rules.replicated(mesh), rules.row_sharding(mesh)
  shardings = jax.tree.map(lambda _: everywhere, method)
  if isinstance(method, MethodState) and isinstance(method.pending, RolloutBatch):
    shardings = shardings.replace(pending=jax.tree.map(lambda _: rows, method.pending))
  if isinstance(method, MethodState) and method.average:
    shardings = shardings.replace(average=params)
  return shardings


# --- The whole state --------------------------------------------------------------


def _new(params: Params, optimizer: optax.GradientTransformation,
         method: Callable[[Params], Any]) -> TrainState:
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), method(params))


def abstract_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh,
                   method: Callable[[Params], Any] = no_method) -> TrainState:
  """The state as ShapeDtypeStructs with shardings: the target of init and of a restore.

  Moments are sharded like their parameters, everything else is replicated but for rows that
  wait for their update.

  Args:
    model, optimizer, mesh: of the run.
    method: makes, of the parameters, what `TrainState.method` holds before the first step.
  """
  shapes = jax.eval_shape(lambda key: _new(P.init(model.specs, key), optimizer, method),
                          jax.random.key(0))
  param_shardings = rules.param_shardings(model.specs, mesh)
  everywhere = rules.replicated(mesh)
  opt_shardings = optax.tree_map_params(
      optimizer, lambda _, sharding: sharding, shapes.opt_state, param_shardings,
      transform_non_params=lambda _: everywhere)
  method_shardings = _method_shardings(shapes.method, mesh, param_shardings)
  shardings = TrainState(everywhere,  # type: ignore[arg-type]  # Same tree.
                         param_shardings, opt_shardings, method_shardings)

  def with_sharding(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

  return jax.tree.map(with_sharding, shapes, shardings)


def state_of(params: Params, optimizer: optax.GradientTransformation, abstract: TrainState,
             method: Callable[[Params], Any] = no_method) -> TrainState:
  """A new state at step 0 that starts from given parameters (copied: the step donates)."""
  shardings = jax.tree.map(lambda s: s.sharding, abstract)
  start = jax.jit(lambda p: _new(p, optimizer, method), out_shardings=shardings)
  return start(params)


def init_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh,
               seed: int) -> TrainState:
  """A new state, born sharded: no device ever holds more than its part."""
  shardings = jax.tree.map(lambda s: s.sharding, abstract_state(model, optimizer, mesh))
  init = jax.jit(lambda key: _new(P.init(model.specs, key), optimizer, no_method),
                 out_shardings=shardings)
  return init(jax.random.key(seed))
