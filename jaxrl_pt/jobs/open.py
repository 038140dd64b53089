"""From a run to its job. No other module asks which objective a run has."""

from pathlib import Path
from typing import Any, get_args

import jax
from jax.sharding import Mesh

from jaxrl_pt import checkpoint
from jaxrl_pt import config as cfg
from jaxrl_pt.checkpoint import Restored
from jaxrl_pt.config import checks
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import (
  autoencoding,
  diffusion,
  dpo,
  game_rl,
  pretrain,
  reward_model,
  rl,
  rpt,
  sft,
)
from jaxrl_pt.jobs.kind import Kind, Program
from jaxrl_pt.parallel import rules
from jaxrl_pt.run import evaluate, loop, places, policy
from jaxrl_pt.run.session import Session
from jaxrl_pt.types import TrainState


def kind(objective: cfg.Objective) -> Kind:
  """The job, programs and sizes of an objective.

  Raises:
    UserError: there is no job for the objective.
  """
  match objective:
    case cfg.NextToken():
      return pretrain.KIND
    case cfg.SFT():
      return sft.KIND
    case cfg.DPO():
      return dpo.KIND
    case cfg.RewardModel():
      return reward_model.KIND
    case cfg.RPT():
      return rpt.KIND
    case cfg.RL():
      return rl.KIND
    case cfg.Diffusion():
      return diffusion.KIND
    case cfg.Autoencoding():
      return autoencoding.KIND
    case cfg.GameRL():
      return game_rl.KIND
    case _:
      raise UserError(f'Run.objective = {objective!r}: there is no job for it; choose '
                      f'{checks.one_of(get_args(cfg.Objective))}.')


def train(run: cfg.Run, workdir: Path, resolved_text: str,
          allow: frozenset[str] = frozenset()) -> None:
  """Takes `run` to its last step, resuming from the newest checkpoint in `workdir` if it has one.

  Args:
    run: the settings.
    workdir: receives config.gin, tokenizer/, data/, checkpoints/, metrics.jsonl, plots/,
      report.html and, if `Rollouts.dump_every` asks for it, rollouts/.
    resolved_text: the settings as gin text, which is saved with the run.
    allow: names of settings that may differ from the checkpoint's (`run.resume`).

  Raises:
    UserError: a mistake in settings or files, a full disk, a non-finite loss, another run in
      `workdir`.
    Preempted: a signal came before the last step; a checkpoint has been saved.
  """
  rules.check_compiles(run.model, jax.devices()[0].platform)
  with kind(run.objective).open(run, workdir, resolved_text, allow) as job:
    loop.run(job)


def load_run(workdir: Path, step: int | None = None) -> tuple[Session, Restored]:
  """The session of a checkpoint's run, and the checkpoint with its whole state.

  Args:
    workdir: a directory written by `train`.
    step: the checkpoint's step; None takes the newest good one.

  Raises:
    UserError: no such directory, no checkpoint, another tokenizer.
  """
  session = policy.open_run(workdir, step, cfg.Mesh())
  known = kind(session.run.objective)
  return session, policy.restore(
      session, step, '', lambda params: known.new_method(session.run, session.mesh, params),
      known.build(session.run, session.mesh))


def load_state(workdir: Path, step: int | None = None) -> TrainState:
  """The whole training state of a checkpoint, for example to compare two runs.

  Arguments and errors as in `load_run`.
  """
  state: TrainState = load_run(workdir, step)[1].state
  return state


def evaluate_workdir(workdir: Path, *, step: int | None = None,
                     data: cfg.Data | None = None) -> dict[str, Any]:
  """The `eval` command: measures what a run has learned on a whole validation split.

  Args:
    workdir: a work directory written by `train`.
    step: the checkpoint's step; None takes the newest good one.
    data: a data set to evaluate on; None takes the run's own.

  Returns:
    'step', and the metrics of pairs of an objective that learns from pairs, of text of any other.

  Raises:
    UserError: no checkpoint, data of another tokenizer, or an empty validation split.
  """
  found, _ = checkpoint.read_extras(workdir / places.CHECKPOINTS, step)
  session = evaluate.with_data(policy.open_run(workdir, found, cfg.Mesh()), data)
  return {'step': found, **kind(session.run.objective).evaluate(session, found)}


def programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  """The programs that the run would dispatch, each with its abstract arguments.

  Raises:
    UserError: a mesh axis does not divide the size that is split over it, or the compiler takes no
      training step of the model.
  """
  rules.check_divides(run, mesh)
  rules.check_compiles(run.model, mesh.devices.flat[0].platform)
  return kind(run.objective).programs(run, mesh)
