"""What DPO and reward models share: steps and evaluation on rows of preference pairs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt.data import loader
from jaxrl_pt.jobs import packed
from jaxrl_pt.jobs.kind import Program, abstract
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel import rules
from jaxrl_pt.run import evaluate
from jaxrl_pt.run import session as sessions
from jaxrl_pt.train import optim, preferences
from jaxrl_pt.train import state as states
from jaxrl_pt.train import step as steps
from jaxrl_pt.types import Array, Batch, TrainState

# Segments of a row, for preflight, which has no data.
ASSUMED_SEGMENTS = 32

# (model settings, number of segments) → the loss of pairs.
LossOf = Callable[[cfg.Model, int], preferences.PairLoss]


def num_segments(data: loader.Prepared) -> int:
  """The most segments that a row of either split has, which is even."""
  return max(data.train.num_segments, data.validation.num_segments)


def compiled_step(run: cfg.Run, specs: Any, loss: preferences.PairLoss,
                  optimizers: steps.Optimizers, segments: int) -> Any:
  """The jitted step(state, pairs); the state is donated."""
  schedule = optim.learning_rate(run.optimizer.schedule, cfg.num_updates(run))
  step = steps.make_measured_step(
      specs, loss, lambda examples: preferences.num_pairs(examples, segments), optimizers, schedule,
      run.train.accumulation)
  return jax.jit(step, donate_argnums=0)


def stage(session: sessions.Session, loss_of: LossOf, pair_of: Callable[[str, Batch], Any],
          optimizers_of: Callable[[optax.GradientTransformation], steps.Optimizers],
          trained_of: Callable[[TrainState], Any], new_method: Any) -> packed.Stage:
  """The stage of an objective over pairs.

  Args:
    session: the run's session.
    loss_of: (model settings, number of segments) → the loss.
    pair_of: ('train' or 'validation', batch) → `preferences.Pairs`.
    optimizers_of: the run's optimizer → all that a step updates with.
    trained_of: state → what the loss takes as its parameters.
    new_method: as in `packed.Stage`.
  """
  run, segments = session.run, num_segments(session.data)

  def compile_step(model: cfg.Model, optimizer: optax.GradientTransformation) -> Any:
    step = compiled_step(run, session.model(model).specs, loss_of(model, segments),
                         optimizers_of(optimizer), segments)
    return lambda state, batch: step(state, pair_of('train', batch))

  measure = jax.jit(loss_of(run.model, segments))

  def measured(state: TrainState, step: int) -> dict[str, float]:
    del step
    found = _totals(session, measure, trained_of(state), pair_of, run.train.eval_batches)
    return {f'validation/{name}': value for name, value in found.items()}

  return packed.Stage(compile_step, session.put, measured, new_method)


def _totals(session: sessions.Session, measure: preferences.PairLoss, trained: Any,
            pair_of: Callable[[str, Batch], Any], limit: int) -> dict[str, float]:
  return evaluate.totals(session, session.data.validation, limit,
                         lambda batch: measure(trained, pair_of('validation', batch))[1])


def evaluated(session: sessions.Session, loss_of: LossOf, trained: Any,
              pair_of: Callable[[str, Batch], Any]) -> dict[str, float]:
  """`Kind.evaluate` of an objective over pairs.

  Args:
    session: the session of a checkpoint with the data to measure on.
    loss_of, pair_of: as `stage` takes them.
    trained: what the loss takes as its parameters.
  """
  split = session.data.validation
  batches = loader.eval_batches(split, session.run.train.batch_size)
  measure = jax.jit(loss_of(session.run.model, num_segments(session.data)))
  return {'num_pairs': sum(int(batch.segments.max(1).sum()) for batch in batches) // 2,
          **_totals(session, measure, trained, pair_of, limit=0)}


def program(run: cfg.Run, mesh: Mesh, name: str, loss_of: LossOf,
            optimizers: steps.Optimizers, new_method: Any) -> Program:
  """The step as a program for preflight, with rows of at most 32 segments."""
  model = models.build(run.model, run.compute, mesh)
  state = states.abstract_state(model, optimizers.params, mesh, new_method)
  reference = abstract((run.train.batch_size, ASSUMED_SEGMENTS), jnp.float32,
                       rules.row_sharding(mesh))
  pairs = preferences.Pairs(packed.abstract_batch(run, mesh), reference)
  step = compiled_step(run, model.specs, loss_of(run.model, ASSUMED_SEGMENTS), optimizers,
                       ASSUMED_SEGMENTS)
  return Program(name, step, (state, pairs))


def no_reference(split: str, batch: Batch, segments: int) -> preferences.Pairs:
  """Pairs whose loss reads no reference policy."""
  del split
  zeros: Array = jnp.zeros((batch.segments.shape[0], segments))
  return preferences.Pairs(batch, zeros)
