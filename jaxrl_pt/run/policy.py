"""Loads from a work directory a run's policy, or its whole state."""

from collections.abc import Callable
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrl_pt import checkpoint, gin_bindings
from jaxrl_pt import config as cfg
from jaxrl_pt.checkpoint import Restored
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model, Specified
from jaxrl_pt.run import places
from jaxrl_pt.run import session as sessions
from jaxrl_pt.sampling import weight_sync
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Params


@dataclass(frozen=True)
class Policy:
  """A trained model with all that is needed to use it."""

  session: sessions.Session
  model: Model
  params: Params
  step: int  # the checkpoint's step


def load_policy(workdir: Path, step: int | None = None, mesh: cfg.Mesh = cfg.Mesh()) -> Policy:
  """Restores the policy of a work directory onto the devices at hand.

  Parameters, tokenizer and settings in the directory suffice. The run's data are opened only when
  they are asked for.

  Args:
    workdir: a work directory written by `train`.
    step: the checkpoint's step; None takes the newest good one.
    mesh: the mesh to use, which need not be the mesh that the policy was trained on.

  Raises:
    UserError: no such directory, no checkpoint, another tokenizer, or a model of a game.
  """
  session = open_run(workdir, step, mesh)
  if session.prepared is None:
    raise UserError(f'{workdir} holds a run of {type(session.run.objective).__name__}, which draws '
                    'frames and no text: give the work directory of a language model.')
  restored = restore(session, step, 'params')
  model = session.model(cfg.model_at(session.run, restored.step))
  return Policy(session, model, restored.state, restored.step)


class Held(NamedTuple):
  """How a sampler on one device holds weights: `head` and `packed` as in `cfg.Slots`."""

  head: cfg.Table = 'model'
  packed: bool = False


def as_sampled(policy: Policy, held: Held) -> Policy:
  """The policy with its parameters as a sampler on one device reads them.

  The whole ones are freed once nobody else has them.

  Args:
    policy: from `load_policy`.
    held: how they are held.

  Raises:
    UserError: there are several devices, or no ternary weights to pack.
  """
  if held == Held():
    return policy
  mesh, dtype = policy.session.mesh, policy.session.run.compute.dtype
  if mesh.size > 1:
    raise UserError(f'--head and --packed hold weights on one device, and there are {mesh.size}: '
                    'leave them out, or let the process see one device.')
  read = weight_sync.for_one_device(policy.model, mesh.devices.flat[0], dtype, *held)
  return dataclasses.replace(policy, params=jax.jit(read)(policy.params))


def open_run(workdir: Path, step: int | None, mesh: cfg.Mesh) -> sessions.Session:
  """The session of a checkpoint's run, with the settings that the checkpoint was made with.

  The work directory's config.gin may hold other settings, which later steps were made with.
  Arguments and errors as in `load_policy`.
  """
  if not (workdir / places.CONFIG).is_file():
    raise UserError(f'{workdir} holds no config.gin: give the --workdir of a finished or '
                    'interrupted train run.')
  _, extras = checkpoint.read_extras(workdir / places.CHECKPOINTS, step)
  run, text = gin_bindings.load([], [gin_bindings.current_names(extras['config'])])
  run = dataclasses.replace(run, mesh=mesh)
  data = sessions.policy_data(run, workdir, extras) if isinstance(run.data, cfg.Data) else None
  return sessions.open_session(run, workdir, text, data=data)


def restore(session: sessions.Session, step: int | None, part: str,
            new_method: Callable[[Params], Any] = states.no_method,
            model: Specified | None = None) -> Restored:
  """Restores a checkpoint's state, or one field of it.

  Args:
    session: the session from `open_run`.
    step: the checkpoint's step; None takes the newest good one.
    part: the name of a field of TrainState; empty restores the whole state.
    new_method: parameters → what `TrainState.method` holds before the first step, which describes
      the arrays to restore. It matters only for the whole state.
    model: the model whose parameters they are; None for the run's language model.
  """
  run = session.run
  # Only the tree of the optimizer's state is read here, and the schedule does not change that tree.
  # A run whose schedule this version would refuse can thus still be opened.
  settings = dataclasses.replace(run.optimizer, schedule=cfg.ConstantRate(1.0))
  model = session.model(run.model) if model is None else model
  optimizer = optim.make_optimizer(settings, run.train.num_steps, model.specs)
  abstract = states.abstract_state(model, optimizer, session.mesh, new_method)
  return checkpoint.restore(session.workdir / places.CHECKPOINTS,
                            getattr(abstract, part) if part else abstract, step, part=part)
