"""One optimiser step as a pure function, with exact accumulation over micro-batches."""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_pt import params as P
from jaxrl_pt.train import accumulate
from jaxrl_pt.train.losses import SumLoss
from jaxrl_pt.train.optim import Schedule, global_norm
from jaxrl_pt.train.state import ValueHead
from jaxrl_pt.types import Array, Batch, TrainState, Weighted

# What the summed loss of a batch is divided by: the number of its targets, or nothing.
Reduction = Literal['mean', 'sum']
Metrics = dict[str, Weighted]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
# loss(parameters, examples) → (the sum over the examples, metrics)
MeasuredLoss = Callable[[Any, Any], tuple[Array, Metrics]]


class Optimizers(NamedTuple):
  """The optimizers of the parameters and of a reward model's head, which its loss reads too.

  head: None where there is no head.
  """

  params: optax.GradientTransformation
  head: optax.GradientTransformation | None = None


def make_train_step(specs: Any, loss: SumLoss, optimizer: optax.GradientTransformation,
                    learning_rate: Schedule, accumulation: int = 1,
                    reduction: Reduction = 'mean') -> Step:
  """step(state, batch) → (state, metrics), to be jitted with the state donated.

  The gradient is that of Σ loss / n over the whole batch, whatever the number of micro-batches
  and of devices. n is the number of targets that have a weight, whatever their weights; for the
  reduction 'sum' it is 1. The metric 'loss' is the mean in either case.

  Args:
    specs: the parameters' tree of ParamSpec; those that are not trained stay as they are.
    loss: (params, batch) → f32[], a sum over the batch's targets.
    optimizer: the optimizer whose state is in `state.opt_state`.
    learning_rate: the optimizer's schedule, from which the metric 'learning_rate' is read.
    accumulation: the number of micro-batches.
    reduction: says what n is.
  """
  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    count = jnp.maximum((batch.weights > 0).sum(dtype=jnp.float32), 1.0)
    divisor = count if reduction == 'mean' else 1.0
    trained = P.trained(specs, state.params)
    value_and_grad = jax.value_and_grad(
        lambda trained, b: loss(P.joined(state.params, trained), b) / divisor)
    loss_value, grads = accumulate.gradient(value_and_grad, trained, batch, accumulation)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    metrics = {
        'loss': Weighted(loss_value * divisor, count),
        'grad_norm': Weighted.single(global_norm(grads)),
        'learning_rate': Weighted.single(learning_rate(state.step)),
    }
    params = P.joined(state.params, optax.apply_updates(trained, updates))
    state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return state, metrics

  return step


def make_measured_step(specs: Any, loss: MeasuredLoss, count: Callable[[Any], Array],
                       optimizers: Optimizers, learning_rate: Schedule, accumulation: int = 1
                       ) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
  """step(state, examples) → (state, metrics) of a loss that comes with metrics of its own.

  The gradient is that of Σ loss / n over the whole batch, whatever the number of micro-batches and
  of devices.

  Args:
    specs: the parameters' tree of ParamSpec; those that are not trained stay as they are.
    loss: of the parameters, or of (parameters, head) where `optimizers` has one for a head.
    count: the whole batch → n; a batch in which nothing counts is divided by 1.
    optimizers: those whose states are in `state.opt_state` and `state.method`.
    learning_rate: the schedule, from which the metric 'learning_rate' is read.
    accumulation: the number of micro-batches.
  """
  def step(state: TrainState, examples: Any) -> tuple[TrainState, Metrics]:
    number = jnp.maximum(count(examples), 1.0)
    own = P.trained(specs, state.params)
    has_head = optimizers.head is not None

    def mean(trained: Any, part: Any) -> tuple[Array, Metrics]:
      params = P.joined(state.params, trained[0] if has_head else trained)
      total, metrics = loss((params, trained[1]) if has_head else params, part)
      return total / number, metrics

    trained = (own, state.method.params) if has_head else own
    (_, metrics), grads = accumulate.gradient(
        jax.value_and_grad(mean, has_aux=True), trained, examples, accumulation)
    metrics = {**metrics, 'grad_norm': Weighted.single(global_norm(grads)),
               'learning_rate': Weighted.single(learning_rate(state.step))}
    method = state.method
    if optimizers.head is not None:
      grads, head_grads = grads
      updates, head_state = optimizers.head.update(head_grads, method.opt_state, method.params)
      method = ValueHead(optax.apply_updates(method.params, updates), head_state)
    updates, opt_state = optimizers.params.update(grads, state.opt_state, own)
    params = P.joined(state.params, optax.apply_updates(own, updates))
    return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state,
                               method=method), metrics

  return step
