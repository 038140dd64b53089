"""What a file in jobs/ says of its objective, without and with opening a run."""

from collections.abc import Callable
import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from jaxrl_pt import config as cfg
from jaxrl_pt.run.job import Job
from jaxrl_pt.run.session import Session
from jaxrl_pt.types import Params


class Program(NamedTuple):
  """A jitted function and the abstract arguments that the loop would call it with.

  share: of the step's model FLOPs that are its own.
  beside: abstract arrays that the loop keeps on the devices while it runs.
  """

  name: str
  run: Any  # of jax.jit
  args: tuple[Any, ...]
  share: float = 1.0
  beside: Any = ()


def abstract(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
  """An array that is not there, standing in a container where one will be."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


class Kind(NamedTuple):
  """An objective's side of a run.

  open: (run, work directory, resolved text, settings that may differ) → the job, as long as the
    context lasts.
  programs: the steps that the run's loop would dispatch, each with its abstract arguments, so
    that they can be compiled for devices that are not there and without data.
  num_tokens: that a step works on.
  model_flops: of a step.
  new_method: (run, parameters) → what `TrainState.method` holds before the first step.
  reopen: (session of a checkpoint, start policy) → its `reinforce.Reinforcement`, for a replay;
    None where nothing is drawn.
  """

  open: Callable[[cfg.Run, Path, str, frozenset[str]], contextlib.AbstractContextManager[Job]]
  programs: Callable[[cfg.Run, Mesh], list[Program]]
  num_tokens: Callable[[cfg.Run], int]
  model_flops: Callable[[cfg.Run], float]
  new_method: Callable[[cfg.Run, Params], Any]
  reopen: Callable[[Session, Params], contextlib.AbstractContextManager[Any]] | None = None
