"""What a run is reinforced on: prompts by number, a judge, and a held-out measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxrl_pt.types import Params, Prompts, Rollout, Verdict
from jaxrl_pt.verifiers.base import DeviceVerifier


class Ticket(Protocol):
  """Responses handed to a verifier."""

  def result(self) -> Verdict:
    """Waits for the verdict, f32[N, G] arrays."""


@dataclass(frozen=True)
class OnDevice:
  """Judges inside the jitted step."""

  verify: DeviceVerifier


@dataclass(frozen=True)
class OnHost:
  """Judges text while the device goes on: submit(rollout as numpy, references) → ticket."""

  submit: Callable[[Rollout, Sequence[str]], Ticket]


@dataclass(frozen=True)
class Task:
  """Prompts, who judges the responses, and how the policy is measured.

  take: (prompts as numpy, references) of batch b = 0, 1, …; a function of b alone.
  score: metrics of the parameters on held-out prompts.
  """

  take: Callable[[int], tuple[Prompts, Sequence[str]]]
  judge: OnDevice | OnHost
  score: Callable[[Params], dict[str, float]]
