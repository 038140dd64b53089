"""From a run's objective to its job: the only place that asks which objective it is."""

from pathlib import Path
from typing import get_args

from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt.checkpoint import Restored
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import pretrain, rl, rpt
from jaxrl_pt.jobs.kind import Kind, Program
from jaxrl_pt.parallel import rules
from jaxrl_pt.run import loop, policy
from jaxrl_pt.run.session import Session
from jaxrl_pt.types import TrainState


def kind(objective: cfg.Objective) -> Kind:
  """What is known of an objective.

  Raises:
    UserError: no job is known for it.
  """
  match objective:
    case cfg.NextToken():
      return pretrain.KIND
    case cfg.RPT():
      return rpt.KIND
    case cfg.RL():
      return rl.KIND
    case _:
      known = ', '.join(f'@cfg.{known.__name__}()' for known in get_args(cfg.Objective))
      raise UserError(f'Run.objective = {objective!r}: there is no job for it; choose one of '
                      f'{known}.')


def train(run: cfg.Run, workdir: Path, resolved_text: str,
          allow: frozenset[str] = frozenset()) -> None:
  """Takes `run` to its last step in `workdir`, resuming what is there.

  Args:
    run: the settings.
    workdir: receives config.gin, data/, checkpoints/, metrics.jsonl, plots, report.html and, as
      asked for, rollouts/.
    resolved_text: the run as gin text, saved with it.
    allow: settings that may differ from those of the checkpoint resumed from (`run.resume`).

  Raises:
    UserError: a mistake in settings or files, a full disk, a non-finite loss, another run in
      `workdir`.
    Preempted: a signal came before the last step; what has been learned is saved.
  """
  with kind(run.objective).open(run, workdir, resolved_text, allow) as job:
    loop.run(job)


def load_run(workdir: Path, step: int | None = None) -> tuple[Session, Restored]:
  """A run as a checkpoint has it: its surroundings, whole state and extras.

  Args:
    workdir: written by `train`.
    step: which checkpoint; None takes the newest good one.
  """
  session = policy.open_run(workdir, step, cfg.Mesh())
  new_method = kind(session.run.objective).new_method
  return session, policy.restore(session, step, '',
                                 lambda params: new_method(session.run, params))


def load_state(workdir: Path, step: int | None = None) -> TrainState:
  """The whole training state of a checkpoint, e.g. to compare two runs."""
  state: TrainState = load_run(workdir, step)[1].state
  return state


def programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  """The steps that the run's loop would dispatch, each with its abstract arguments.

  Raises:
    UserError: a mesh axis divides no size of the run.
  """
  rules.check_divides(run, mesh)
  return kind(run.objective).programs(run, mesh)
