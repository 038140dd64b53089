"""The training state: its shapes and shardings, and its initial values."""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import adapters
from jaxrl_pt.models.base import Specified
from jaxrl_pt.parallel import rules
from jaxrl_pt.sampling import in_flight
from jaxrl_pt.types import Array, Params, RolloutBatch, TrainState

# --- What a method of reinforcement learning keeps between steps ------------------


@struct.dataclass
class ValueHead:
  """GAE's value head with its own optimizer; empty where the advantage has no value head."""

  params: Any  # {'weight': f32[D], 'bias': f32[]} or {}
  opt_state: Any


@struct.dataclass
class MethodState:
  """`TrainState.method` of a run of reinforcement learning."""

  gate: Any  # f32[] accuracy with which Short-RL's gate compares, or {}
  value: ValueHead
  pending: Any  # RolloutBatch drawn a step ahead, the sampler where it is in flight, or {}
  average: Any  # the trained parameters of RLP's average policy, or {}


def zero_head(d_model: int) -> dict[str, Array]:
  """A scalar head on hidden states before its first step: it says 0 of everything."""
  return {'weight': jnp.zeros(d_model), 'bias': jnp.zeros(())}


def value_optimizer(advantage: cfg.Advantage) -> optax.GradientTransformation:
  """Adam where the advantage has a value head, else the identity."""
  match advantage:
    case cfg.GAE(value_lr=learning_rate):
      return optax.adam(learning_rate)
    case _:
      return optax.identity()


def new_value(advantage: cfg.Advantage, d_model: int) -> ValueHead:
  """The advantage's value head before its first step, on hidden states of width `d_model`."""
  head: Any = zero_head(d_model) if isinstance(advantage, cfg.GAE) else {}
  return ValueHead(head, value_optimizer(advantage).init(head))


def no_method(params: Params) -> Any:
  """`TrainState.method` of a run whose steps keep only parameters and moments: {}."""
  del params
  return {}


def new_method(rollouts: cfg.Rollouts, algorithm: cfg.Algorithm, d_model: int,
               average: Any = (), sampler: Any = ()) -> MethodState:
  """`TrainState.method` of a run of reinforcement learning before its first step.

  Args:
    rollouts, algorithm: the settings of the run's objective.
    d_model: the model's width, which is the value head's number of inputs.
    average: the policy's trained parameters where the method keeps an average of them, else ().
    sampler: `in_flight.InFlight` where responses are under way over several steps, else ().
  """
  gate: Any = jnp.zeros(()) if isinstance(algorithm.shaping, cfg.ShortRL) else {}
  pending: Any = {}
  if rollouts.mode == cfg.OneStepOff():
    shape = rollouts.num_prompts, rollouts.group_size, rollouts.response_tokens
    reals, ints = (lambda: jnp.zeros(shape)), (lambda: jnp.zeros(shape, jnp.int32))
    pending = RolloutBatch(ints(), reals(), reals(), reals(), ints(), ints())
  elif sampler:
    pending = sampler
  # The average is a copy, because the step donates both the parameters and the average.
  return MethodState(gate, new_value(algorithm.advantage, d_model), pending,
                     jax.tree.map(jnp.copy, average) if average else {})


def _method_shardings(method: Any, mesh: Mesh, trained_shardings: Any) -> Any:
  """Shards pending rollouts by rows and an average policy as the policy; replicates all else.

  Args:
    method: what `TrainState.method` holds, as ShapeDtypeStructs.
    mesh: the run's mesh.
    trained_shardings: the shardings of the policy's trained parameters.
  """
  everywhere, rows = rules.replicated(mesh), rules.row_sharding(mesh)
  shardings = jax.tree.map(lambda _: everywhere, method)
  if isinstance(method, MethodState) and isinstance(method.pending, RolloutBatch):
    shardings = shardings.replace(pending=jax.tree.map(lambda _: rows, method.pending))
  if isinstance(method, MethodState) and isinstance(method.pending, in_flight.InFlight):
    shardings = shardings.replace(pending=in_flight.shardings(method.pending, mesh))
  if isinstance(method, MethodState) and method.average:
    shardings = shardings.replace(average=trained_shardings)
  return shardings


# --- The whole state --------------------------------------------------------------


def _new(model: Specified, params: Params, optimizer: optax.GradientTransformation,
         method: Callable[[Params], Any]) -> TrainState:
  trained = P.trained(model.specs, params)
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trained), method(trained))


def abstract_state(model: Specified, optimizer: optax.GradientTransformation, mesh: Mesh,
                   method: Callable[[Params], Any] = no_method) -> TrainState:
  """The state as ShapeDtypeStructs with shardings: the target of initialising and of restoring.

  Moments and an average policy are sharded like the trained parameters, rollouts that wait for
  their update by rows; everything else is replicated.

  Args:
    model, optimizer, mesh: the run's model, optimizer and mesh.
    method: trained parameters → what `TrainState.method` holds before the first step.
  """
  shapes = jax.eval_shape(lambda key: _new(model, P.init(model.specs, key), optimizer, method),
                          jax.random.key(0))
  param_shardings = rules.param_shardings(model.specs, mesh)
  trained_shardings = P.trained(model.specs, param_shardings)
  everywhere = rules.replicated(mesh)
  opt_shardings = optax.tree_map_params(
      optimizer, lambda _, sharding: sharding, shapes.opt_state, trained_shardings,
      transform_non_params=lambda _: everywhere)
  method_shardings = _method_shardings(shapes.method, mesh, trained_shardings)
  shardings = TrainState(everywhere,  # type: ignore[arg-type]  # The same tree.
                         param_shardings, opt_shardings, method_shardings)

  def with_sharding(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

  return jax.tree.map(with_sharding, shapes, shardings)


def state_of(model: Specified, params: Params, optimizer: optax.GradientTransformation,
             abstract: TrainState, method: Callable[[Params], Any] = no_method,
             seed: int = 0) -> TrainState:
  """A new state at step 0 with a copy of given parameters, since the step donates its state.

  Args:
    model: the run's model.
    params: the parameters to start from, which may be of another type than the state's, and which
      get the adapters that the model has and they lack.
    optimizer: the optimizer whose state is initialised.
    abstract: the state's shapes and shardings, from `abstract_state`.
    method: trained parameters → what `TrainState.method` holds before the first step.
    seed: of the adapters' initial values.
  """
  shardings = jax.tree.map(lambda s: s.sharding, abstract)

  def new(given: Params) -> TrainState:
    adapted = adapters.adapt(model.specs, given, jax.random.key(seed))
    own = jax.tree.map(lambda p, target: p.astype(target.dtype), adapted, abstract.params)
    return _new(model, own, optimizer, method)

  return jax.jit(new, out_shardings=shardings)(params)


def init_state(model: Specified, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int,
               method: Callable[[Params], Any] = no_method) -> TrainState:
  """A new state with random parameters, made sharded: no device ever holds more than its part."""
  shardings = jax.tree.map(lambda s: s.sharding, abstract_state(model, optimizer, mesh, method))
  init = jax.jit(lambda key: _new(model, P.init(model.specs, key), optimizer, method),
                 out_shardings=shardings)
  return init(jax.random.key(seed))
