"""What a verifier is: prompts and whole groups of responses in, the future of a verdict out.

A verifier sees a group at once, so that it may compare its responses, and answers later, so that
it may work in other processes or ask another model. One that is a function of arrays alone can
also be traced into the step that learns from it (`DeviceVerifier.verify`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.types import Array, Prompts, RolloutBatch, Verdict
from jaxrl_pt.verifiers.response_verdict import UNVERIFIED, Outcome, ResponseVerdict


class PendingVerdict(Protocol):
  """The future of a verdict."""

  def result(self) -> Verdict:
    """Waits for the verdict, f32[N, G] arrays."""

  def parsed(self) -> float | None:
    """The share of the verified responses that state an answer; None where the verdict's own part
    'parsed' says it."""

  def last_words(self) -> str:
    """Why responses were not verified, once there is a result."""


class Verifier(Protocol):
  """Verifies responses."""

  def submit(self, prompts: Prompts, rollouts: RolloutBatch, references: Sequence[str]
             ) -> PendingVerdict:
    """Hands over whole groups and returns at once.

    Args:
      prompts: N of them.
      rollouts: G responses to each.
      references: N reference answers as text, or none where the prompts carry theirs.
    """


@dataclass(frozen=True)
class Ready:
  """The verdict of a verifier on the device, which is there when the device gets to it."""

  verdict: Verdict

  def result(self) -> Verdict:
    """The verdict."""
    return self.verdict

  def parsed(self) -> None:
    """See `PendingVerdict.parsed`."""

  def last_words(self) -> str:
    """A function of arrays verifies everything."""
    return 'every response is verified on the device'


# A verdict by arrays alone, which may be traced into the step that learns from it.
Verify = Callable[[Prompts, RolloutBatch], Verdict]


class DeviceVerifier:
  """A function of arrays as a verifier. Final."""

  def __init__(self, verify: Verify) -> None:
    self.verify = verify
    self._compiled = jax.jit(verify)

  def submit(self, prompts: Prompts, rollouts: RolloutBatch, references: Sequence[str]) -> Ready:
    """Dispatches the function."""
    del references
    return Ready(self._compiled(prompts, rollouts))


def verdict(groups: Sequence[Sequence[ResponseVerdict]], parts: Sequence[str] = ('answer',)
            ) -> Verdict:
  """The arrays of N groups of G verdicts; what was not verified is masked, not dropped.

  Args:
    groups: N groups of G.
    parts: names of the parts to log apart; a verdict without one counts 0 there.

  Returns:
    Verdict of f32[N, G] arrays: reward is the score, correct is 1 where the outcome is CORRECT.
  """
  def table(of: Callable[[ResponseVerdict], float]) -> Array:
    return jnp.asarray(np.array([[of(j) for j in group] for group in groups], np.float32))

  return Verdict(
      table(lambda j: j.score), table(lambda j: j.outcome not in UNVERIFIED),
      table(lambda j: j.outcome is Outcome.CORRECT),
      {name: table(functools.partial(_part, name)) for name in parts})


def _part(name: str, verdict: ResponseVerdict) -> float:
  return verdict.parts.get(name, 0.0)
