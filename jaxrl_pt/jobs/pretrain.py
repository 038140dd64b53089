"""Pretraining: next-token prediction on packed documents."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import packed
from jaxrl_pt.jobs.kind import Kind, Program
from jaxrl_pt.parallel import memory
from jaxrl_pt.parallel import model as models
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.evaluate import validation
from jaxrl_pt.run.workdir import claimed
from jaxrl_pt.train import losses, optim
from jaxrl_pt.train import state as states
from jaxrl_pt.train.step import Reduction, make_train_step


@contextlib.contextmanager
def _open(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str]
          ) -> Iterator[packed.PackedTraining]:
  optim.check_schedule(run.optimizer.schedule, cfg.num_updates(run))
  if run.model.adapter != cfg.NoAdapter():
    raise UserError('Run.objective = @cfg.NextToken() starts from random parameters, of which '
                    'Model.adapter = @cfg.LoRA() would train none but the adapters: leave the '
                    'adapter out, or choose an objective that starts from a policy.')
  memory.check_fits(run)
  with claimed(workdir):
    session = sessions.open_session(run, workdir, resolved_text, allow=allow)
    with contextlib.closing(packed.PackedTraining(session, stage(session))) as job:
      yield job


def stage(session: sessions.Session, reduction: Reduction = 'mean') -> packed.Stage:
  """Next-token prediction of the targets that have a weight."""
  return packed.Stage(
      lambda model, optimizer: train_step(session.run, session.mesh, model, optimizer, reduction),
      session.put, lambda state, step: validation(session, state, step))


# --- Its programs -----------------------------------------------------------------


def train_step(run: cfg.Run, mesh: Mesh, model: cfg.Model,
               optimizer: optax.GradientTransformation, reduction: Reduction = 'mean') -> Any:
  """The jitted step(state, batch) of next-token prediction; the state is donated."""
  built = models.build(model, run.compute, mesh)
  loss = losses.next_token(built, run.compute.loss_chunk)
  schedule = optim.learning_rate(run.optimizer.schedule, cfg.num_updates(run))
  step = make_train_step(built.specs, loss, optimizer, schedule, run.train.accumulation, reduction)
  return jax.jit(step, donate_argnums=0)


def _programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  """The step; if the activations' quantiser changes over the run, one step for each quantiser."""
  model = models.build(run.model, run.compute, mesh)
  optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), model.specs)
  state = states.abstract_state(model, optimizer, mesh)
  first, last = cfg.model_at(run, 0), cfg.model_at(run, run.train.num_steps - 1)
  return [Program(f'pretraining step, {config.quant.activations} activations',
                  train_step(run, mesh, config, optimizer),
                  (state, packed.abstract_batch(run, mesh)))
          for config in dict.fromkeys((first, last))]


KIND = Kind(_open, _programs, packed.num_tokens, packed.model_flops, packed.keeps_nothing)
