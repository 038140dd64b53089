"""What a run has left, loaded for use: its policy, or its whole state."""

from collections.abc import Callable
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrl_pt import checkpoint, gin_bindings
from jaxrl_pt import config as cfg
from jaxrl_pt.checkpoint import Restored
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.run import places
from jaxrl_pt.run import session as sessions
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Params


@dataclass(frozen=True)
class Policy:
  """A trained model with all that is needed to use it."""

  session: sessions.Session
  model: Model
  params: Params
  step: int


def load_policy(workdir: Path, step: int | None = None, mesh: cfg.Mesh = cfg.Mesh()) -> Policy:
  """Restores the policy of a work directory onto the devices at hand.

  Weights, tokenizer and settings in the directory are all it takes; the run's data are opened
  when they are asked for.

  Args:
    workdir: written by `train`.
    step: which checkpoint; None takes the newest good one.
    mesh: how to lay it over the devices, whatever mesh trained it.

  Raises:
    UserError: no such directory, no checkpoint, another tokenizer.
  """
  session = open_run(workdir, step, mesh)
  restored = restore(session, step, 'params')
  model = session.model(cfg.model_at(session.run, restored.step))
  return Policy(session, model, restored.state, restored.step)


def open_run(workdir: Path, step: int | None, mesh: cfg.Mesh) -> sessions.Session:
  """What a checkpoint's run was in, with the settings that its weights were made with.

  Those of later steps may be others. Arguments as in `load_policy`.
  """
  if not (workdir / places.CONFIG).is_file():
    raise UserError(f'{workdir} holds no config.gin: give the --workdir of a finished or '
                    'interrupted train run.')
  _, extras = checkpoint.read_extras(workdir / places.CHECKPOINTS, step)
  run, text = gin_bindings.load([], [gin_bindings.current_names(extras['config'])])
  run = dataclasses.replace(run, mesh=mesh)
  return sessions.open_session(run, workdir, text,
                               data=sessions.policy_data(run, workdir, extras))


def restore(session: sessions.Session, step: int | None, part: str,
            new_method: Callable[[Params], Any] = states.no_method) -> Restored:
  """A checkpoint's state, or one part of it.

  Args:
    session: from `open_run`.
    step: which checkpoint; None takes the newest good one.
    part: a field of TrainState; empty for all of it.
    new_method: makes what `TrainState.method` holds; read only with the whole state.
  """
  run = session.run
  # Of the optimizer only the tree of its state is read, which no schedule changes: a run whose
  # schedule would be refused today can still be opened.
  settings = dataclasses.replace(run.optimizer, schedule=cfg.ConstantRate(1.0))
  model = session.model(run.model)
  optimizer = optim.make_optimizer(settings, run.train.num_steps, model.specs)
  abstract = states.abstract_state(model, optimizer, session.mesh, new_method)
  return checkpoint.restore(session.workdir / places.CHECKPOINTS,
                            getattr(abstract, part) if part else abstract, step, part=part)
