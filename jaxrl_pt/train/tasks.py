"""What a run is reinforced on: prompts by number, a judge, and a held-out measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np

from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel.hosts import agreed, on_host
from jaxrl_pt.train.rlp_step import Markers
from jaxrl_pt.types import Params, Prompts, Rollout, Verdict
from jaxrl_pt.verifiers.base import DeviceVerifier


class Ticket(Protocol):
  """Responses handed to a verifier."""

  def result(self) -> Verdict:
    """Waits for the verdict, f32[N, G] arrays."""

  def parsed(self) -> float:
    """The share of the judged responses that state an answer, once there is a result."""

  def last_words(self) -> str:
    """Why responses were not judged, once there is a result."""


@dataclass(frozen=True)
class OnDevice:
  """Judges inside the jitted step."""

  verify: DeviceVerifier


@dataclass(frozen=True)
class OnHost:
  """Judges text while the device goes on: submit(rollout as numpy, references) → ticket."""

  submit: Callable[[Rollout, Sequence[str]], Ticket]


@dataclass(frozen=True)
class InStep:
  """The step judges by itself: RLP, whose reward is what the policy makes of the true text."""

  markers: Markers


@dataclass(frozen=True)
class Task:
  """Prompts, who judges the responses, and how the policy is measured.

  take: (prompts as numpy, references) of batch b = 0, 1, …; a function of b alone.
  score: metrics of the parameters on held-out prompts.
  digest: names the prompts by their content; a run goes on with the same ones only.
  """

  take: Callable[[int], tuple[Prompts, Sequence[str]]]
  judge: OnDevice | OnHost | InStep
  score: Callable[[Params], dict[str, float]]
  digest: str


class FirstBatches:
  """Says in one line that the first batches of a run state hardly an answer. Final."""

  NUM, FEWEST = 3, 0.1

  def __init__(self) -> None:
    self._shares: list[float] = []

  @property
  def is_over(self) -> bool:
    """Whether no further batch counts."""
    return len(self._shares) >= self.NUM

  def note(self, share: float) -> str | None:
    """Takes the share of parsed responses of the next batch.

    Returns:
      The line, after the last of these batches and where there is something to say.
    """
    self._shares.append(share)
    if len(self._shares) != self.NUM or max(self._shares) > self.FEWEST:
      return None
    mean = sum(self._shares) / self.NUM
    return (f'The verifier finds an answer in {mean:.1%} of the responses of the first {self.NUM} '
            'steps, and without one nothing is earned: does the policy know the form of an answer '
            '(a warm start on demonstrations), is Rollouts.response_tokens long enough for it, '
            'and is the verifier the right one?')


def settled(ticket: Ticket) -> Verdict:
  """Waits for the verdict that all hosts share; numpy.

  Raises:
    UserError: nothing was judged, so there is nothing to learn from.
  """
  # What timed out on one host may not have on another.
  verdict = jax.tree.map(np.asarray, agreed(ticket.result()))
  if not verdict.valid.any():
    raise UserError(f'The verifier judged none of {verdict.valid.size} responses: '
                    f'{ticket.last_words()}. This step is not learned from: mend the verifier or '
                    'its limits (VerifierPool), then run the same command to go on from the last '
                    'checkpoint.')
  return verdict


def judged(judge: OnDevice | OnHost, prompts: Prompts, rollout: Rollout,
           references: Sequence[str]) -> tuple[Verdict, Rollout]:
  """Verdict and rollout on the host, waited for."""
  here = on_host(rollout)
  match judge:
    case OnDevice(verify):
      return on_host(jax.jit(verify)(prompts, rollout)), here
    case OnHost(submit):
      return settled(submit(here, references)), here
