"""Pretraining: next-token prediction on packed documents."""

from collections.abc import Iterator
import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.data import loader
from jaxrl_pt.jobs.kind import Kind, Program, abstract
from jaxrl_pt.parallel import memory, rules
from jaxrl_pt.parallel import model as models
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.evaluate import evaluate_packed
from jaxrl_pt.run.job import Dispatched
from jaxrl_pt.run.workdir import claimed
from jaxrl_pt.train import losses, optim
from jaxrl_pt.train import state as states
from jaxrl_pt.train.step import make_train_step
from jaxrl_pt.types import Batch, TrainState


class Pretraining:
  """A pretraining run that has been opened. Final."""

  measured_first = False
  agrees_at_once = False

  def __init__(self, session: sessions.Session) -> None:
    """Opens the loader; compiles nothing yet."""
    run = session.run
    self.session = session
    self.flops_per_token = _model_flops(run) / _num_tokens(run)
    # Only the activations' quantiser may change over a run, so every step's model has this state.
    model = session.model(run.model)
    self._optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), model.specs)
    self.abstract = states.abstract_state(model, self._optimizer, session.mesh)
    rows, tokens = session.owned()
    self._batches = loader.train_iterator(
        session.data.train, seed=run.seed, batch_size=run.train.batch_size, rows=rows,
        tokens=tokens, num_workers=run.data.num_workers)
    self._compiled = functools.cache(
        lambda model: train_step(run, session.mesh, model, self._optimizer))

  def close(self) -> None:
    """Ends the loader's threads."""
    self._batches.close()

  def start(self) -> TrainState:
    """A new state with random parameters."""
    run = self.session.run
    return states.init_state(self.session.model(run.model), self._optimizer, self.session.mesh,
                             run.seed)

  def check(self, position: dict[str, Any]) -> None:
    """Checks nothing: the loader refuses a position of other data in `resume`."""

  def resume(self, state: TrainState, position: dict[str, Any]) -> None:
    """Sets the loader to the checkpoint's position."""
    del state
    self._batches.set_state(position)

  def step(self, state: TrainState, step: int) -> Dispatched:
    """Dispatches a step on the loader's next batch."""
    batch = self.session.put(next(self._batches))
    state, values = self._compiled(cfg.model_at(self.session.run, step))(state, batch)
    return Dispatched(state, values, batch.ids, values['loss'].count)

  def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """validation/{loss,accuracy,bits_per_byte}, with the activations of the step just taken."""
    run, data = self.session.run, self.session.data
    if len(data.validation) == 0:
      return {}
    results = evaluate_packed(self.session, cfg.model_at(run, step - 1), state.params,
                              data.validation, limit=run.train.eval_batches)
    return {f'validation/{name}': value for name, value in results.items()}

  def saved(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state as it is, and the loader's position."""
    del step
    return state, self._batches.get_state()


@contextlib.contextmanager
def _open(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str]
          ) -> Iterator[Pretraining]:
  optim.check_schedule(run.optimizer.schedule, cfg.num_updates(run))
  memory.check_fits(run)
  with claimed(workdir):
    session = sessions.open_session(run, workdir, resolved_text, allow=allow)
    with contextlib.closing(Pretraining(session)) as job:
      yield job


# --- Its programs -----------------------------------------------------------------


def train_step(run: cfg.Run, mesh: Mesh, model: cfg.Model,
               optimizer: optax.GradientTransformation) -> Any:
  """The jitted step(state, batch) of pretraining; the state is donated."""
  loss = losses.next_token(models.build(model, run.compute, mesh), run.compute.loss_chunk)
  schedule = optim.learning_rate(run.optimizer.schedule, cfg.num_updates(run))
  step = make_train_step(loss, optimizer, schedule, run.train.accumulation)
  return jax.jit(step, donate_argnums=0)


def _num_tokens(run: cfg.Run) -> int:
  return run.train.batch_size * run.data.seq_len


def _model_flops(run: cfg.Run) -> float:
  return _num_tokens(run) * metrics.flops_per_token(run.model, (run.data.seq_len + 1) / 2)


def _programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  """The step; if the activations' quantiser changes over the run, one step for each quantiser."""
  model = models.build(run.model, run.compute, mesh)
  optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), model.specs)
  state = states.abstract_state(model, optimizer, mesh)
  first, last = cfg.model_at(run, 0), cfg.model_at(run, run.train.num_steps - 1)
  return [Program(f'pretraining step, {config.quant.activations} activations',
                  train_step(run, mesh, config, optimizer), (state, _abstract_batch(run, mesh)))
          for config in dict.fromkeys((first, last))]


def _abstract_batch(run: cfg.Run, mesh: Mesh) -> Batch:
  shardings: Any = rules.batch_sharding(mesh)
  rows, length = run.train.batch_size, run.data.seq_len
  ints = abstract((rows, length), jnp.int32, shardings.tokens)
  return Batch(ints, ints, ints, ints, abstract((rows, length), jnp.float32, shardings.weights),
               abstract((rows,), jnp.int32, shardings.ids))


def _keeps_nothing(run: cfg.Run, mesh: Mesh, params: Any) -> Any:
  del run, mesh
  return states.no_method(params)


KIND = Kind(_open, _programs, _num_tokens, _model_flops, _keeps_nothing)
