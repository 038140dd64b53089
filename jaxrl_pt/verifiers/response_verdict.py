"""What a host verifier says of one response. No JAX here: verifiers run in bare processes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
import enum


class Outcome(enum.Enum):
  """What became of one response under a host verifier."""

  CORRECT = 'correct'
  WRONG = 'wrong'
  UNPARSED = 'unparsed'  # no answer found: counts as wrong
  TIMEOUT = 'timeout'  # the verifier ran out of time: says nothing about the response
  CRASH = 'crash'  # the verifier failed: says nothing about the response


UNVERIFIED = (Outcome.TIMEOUT, Outcome.CRASH)


@dataclass(frozen=True)
class ResponseVerdict:
  """An outcome and what each part of the reward is; `score` is their sum.

  parts: such as {'format': 1.0, 'answer': -1.5}; empty where nothing was verified.
  detail: why a verifier timed out or crashed, for the log.
  """

  outcome: Outcome
  parts: Mapping[str, float] = field(default_factory=dict)
  detail: str = ''

  @property
  def score(self) -> float:
    """The reward: Σ parts."""
    return sum(self.parts.values())


# (response, reference) → verdict. It may loop, crash or eat memory: it runs in a process
# that may be killed.
HostVerifier = Callable[[str, str], ResponseVerdict]


def answer(outcome: Outcome) -> ResponseVerdict:
  """The verdict whose only part is the answer: 1 for a correct one, else 0."""
  return ResponseVerdict(outcome, {'answer': float(outcome is Outcome.CORRECT)})
