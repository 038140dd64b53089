"""What a host verifier says of one response. Its processes have no JAX, so this file has none."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
import enum


class Outcome(enum.Enum):
  """What became of one response under a host verifier."""

  CORRECT = 'correct'
  WRONG = 'wrong'
  UNPARSED = 'unparsed'  # The response states no answer that the verifier reads: it is wrong.
  TIMEOUT = 'timeout'  # The verifier ran out of time, which says nothing about the response.
  CRASH = 'crash'  # The verifier failed, which says nothing about the response.


UNVERIFIED = (Outcome.TIMEOUT, Outcome.CRASH)


@dataclass(frozen=True)
class ResponseVerdict:
  """The outcome of one response and the parts of its reward.

  parts: the parts by name, such as {'format': 1.0, 'answer': -1.5}; empty for TIMEOUT and CRASH.
  detail: a reason for the log, such as why the verifier crashed.
  """

  outcome: Outcome
  parts: Mapping[str, float] = field(default_factory=dict)
  detail: str = ''

  @property
  def score(self) -> float:
    """The reward: Σ parts."""
    return sum(self.parts.values())


# (response, reference answer) → verdict. The function may loop, crash or eat memory: it runs in a
# process that can be killed.
HostVerifier = Callable[[str, str], ResponseVerdict]


def answer(outcome: Outcome) -> ResponseVerdict:
  """The verdict whose only part, `answer`, is 1 if the outcome is CORRECT, else 0."""
  return ResponseVerdict(outcome, {'answer': float(outcome is Outcome.CORRECT)})
