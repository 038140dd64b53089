"""One optimiser step as a pure function, with exact accumulation over micro-batches."""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxrl_pt import params as P
from jaxrl_pt.train import accumulate
from jaxrl_pt.train.losses import SumLoss
from jaxrl_pt.train.optim import Schedule, global_norm
from jaxrl_pt.types import Batch, TrainState, Weighted

# What the summed loss of a batch is divided by: the number of its targets, or nothing.
Reduction = Literal['mean', 'sum']
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Weighted]]]


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
  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Weighted]]:
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
