"""The interface between the training loop and the objectives."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from jaxrl_pt.run.recorder import Check
from jaxrl_pt.run.session import Session
from jaxrl_pt.types import Array, TrainState, Weighted


class Dispatched(NamedTuple):
  """A step that is under way on the devices.

  state: the state after the step.
  metrics: the step's metrics, on the devices.
  ids: i32[B] or i32[N], the ids of the step's examples or prompts, of all hosts.
  num_tokens: the number of tokens that the step works on, of all hosts.
  check: is called with the step's metrics and may stop the run; None checks nothing.
  finish: does what is left to do after the step has been dispatched, such as writing its rollouts,
    and returns times and speeds of its stages. It may wait for the step. None does nothing.
  """

  state: TrainState
  metrics: dict[str, Weighted]
  ids: Array
  num_tokens: Array | int
  check: Check | None = None
  finish: Callable[[], Mapping[str, float]] | None = None


class Job(Protocol):
  """A run that has been opened, with its position in the data.

  session: the run's files, devices and data.
  abstract: the state as ShapeDtypeStructs with shardings.
  flops_per_token: the model FLOPs of a step by the tokens that it works on.
  measured_first: whether the policy is evaluated before the first step, as row 0 of the metrics.
  agrees_at_once: whether hosts wait for the step to agree on stopping after it.
  stop_reason: why the run is to stop at the evaluation just made, as a sentence without its end;
    '' where it goes on.
  """

  session: Session
  abstract: TrainState
  flops_per_token: float
  measured_first: bool
  agrees_at_once: bool
  stop_reason: str

  def start(self) -> TrainState:
    """The state before the first step."""

  def check(self, position: dict[str, Any]) -> None:
    """Refuses a checkpoint that was made with other data, before its arrays are read.

    Args:
      position: what `saved` returned beside the checkpoint's state.

    Raises:
      UserError: the data are not those that the checkpoint was made with.
    """

  def resume(self, state: TrainState, position: dict[str, Any]) -> None:
    """Goes to a checkpoint's position in the data."""

  def step(self, state: TrainState, step: int) -> Dispatched:
    """Dispatches step `step`, counted from 0; the state is donated."""

  def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """Held-out metrics of the state after `step` steps."""

  def saved(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state as a checkpoint of step `step` keeps it, and the position in the data as JSON."""
