"""What the loop asks of a run, whatever its objective."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from jaxrl_pt.run.recorder import Check
from jaxrl_pt.run.session import Session
from jaxrl_pt.types import Array, TrainState, Weighted


class Dispatched(NamedTuple):
  """A step that is under way.

  state: after it.
  metrics: on the devices.
  ids: of its examples on all hosts.
  num_tokens: that it works on, of all hosts.
  check: may stop the run for the step's metrics.
  finish: does what is left once the step is recorded as under way, which may wait for it (keeping
    its rollouts, measuring its stages), and gives times and speeds; None where nothing is left.
  """

  state: TrainState
  metrics: dict[str, Weighted]
  ids: Array
  num_tokens: Array | int
  check: Check | None = None
  finish: Callable[[], Mapping[str, float]] | None = None


class Job(Protocol):
  """A run that has been opened: its state, its steps and its place among the data.

  session: files, devices, data.
  abstract: of the state, with shardings.
  flops_per_token: of the model, forward and backward.
  measured_first: whether the policy is evaluated before the first step, as row 0.
  agrees_at_once: whether hosts wait for the step when they agree on stopping.
  """

  session: Session
  abstract: TrainState
  flops_per_token: float
  measured_first: bool
  agrees_at_once: bool

  def start(self) -> TrainState:
    """The state before the first step."""

  def check(self, position: dict[str, Any]) -> None:
    """Refuses a checkpoint of other data, before its arrays are read.

    Raises:
      UserError: the data are not those that the checkpoint was made with.
    """

  def resume(self, state: TrainState, position: dict[str, Any]) -> None:
    """Goes to where a checkpoint stands among the data."""

  def step(self, state: TrainState, step: int) -> Dispatched:
    """Dispatches step `step`, from 0; the state is donated."""

  def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """Held-out metrics of the state after `step` steps."""

  def saved(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state as a checkpoint keeps it, and where it stands among the data."""
