"""What each objective's file in jobs/ provides: a job, and what is known without opening a run."""

from collections.abc import Callable
import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Specified
from jaxrl_pt.parallel import model as models
from jaxrl_pt.run.evaluate import evaluate_text
from jaxrl_pt.run.job import Job
from jaxrl_pt.run.session import Session
from jaxrl_pt.types import Params

OTHER_START = ('The policy in start_from is not the one that this run started from: put it back, '
               'or use a new --workdir.')


class Program(NamedTuple):
  """A jitted function, and the abstract arguments with which a run would call it.

  share: the program's share of the step's model FLOPs.
  beside: abstract arrays that the run keeps on the devices while the program runs.
  copies: how many of it run at once, each on devices of its own.
  """

  name: str
  run: Any  # the function from jax.jit
  args: tuple[Any, ...]
  share: float = 1.0
  beside: Any = ()
  copies: int = 1


def abstract(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
  """A `jax.ShapeDtypeStruct` with a sharding, typed Any so that it can stand for an array."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


class Kind(NamedTuple):
  """What the rest of the code knows of an objective.

  open: (run, work directory, settings as gin text, settings that may differ from the checkpoint's)
    → a context with the job.
  programs: (run, mesh) → the programs that the run would dispatch, which can thus be compiled
    without data and for devices that are not there.
  num_tokens: run → the number of tokens that a step works on.
  model_flops: run → the model FLOPs of a step.
  new_method: (run, mesh, trained parameters) → what `TrainState.method` holds before the first
    step.
  reopen: (session of a checkpoint, reference policy's parameters) → a context with the
    `reinforce.Reinforcement` of that session, for a replay; None if the objective draws no
    rollouts.
  evaluate: (session of a checkpoint with the data to measure on, its step) → metrics of the whole
    validation split.
  build: (run, mesh) → the model whose parameters a checkpoint holds.
  """

  open: Callable[[cfg.Run, Path, str, frozenset[str]], contextlib.AbstractContextManager[Job]]
  programs: Callable[[cfg.Run, Mesh], list[Program]]
  num_tokens: Callable[[cfg.Run], int]
  model_flops: Callable[[cfg.Run], float]
  new_method: Callable[[cfg.Run, Mesh, Params], Any]
  reopen: Callable[[Session, Params], contextlib.AbstractContextManager[Any]] | None = None
  evaluate: Callable[[Session, int], dict[str, float]] = evaluate_text
  build: Callable[[cfg.Run, Mesh], Specified] = (
      lambda run, mesh: models.build(run.model, run.compute, mesh))
