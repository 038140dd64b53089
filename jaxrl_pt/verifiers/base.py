"""What a verifier is: it takes prompts and groups of responses and returns a verdict's future.

A verifier sees the whole group of a prompt, so that it may compare responses, and returns a future,
so that it may work in other processes or ask another model. A verifier that is a function of arrays
alone can also be traced into the training step (`DeviceVerifier.verify`).
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
    """Waits for the verdict, whose arrays are f32[N, G]."""

  def parsed(self) -> float | None:
    """The share of the verified responses that state an answer.

    It is None where the verdict has a part named 'parsed' instead.
    """

  def last_words(self) -> str:
    """The most frequent reason why responses were not verified, once there is a result."""


class Verifier(Protocol):
  """Verifies responses."""

  def submit(self, prompts: Prompts, rollouts: RolloutBatch, references: Sequence[str]
             ) -> PendingVerdict:
    """Hands over whole groups and returns at once.

    Args:
      prompts: N prompts.
      rollouts: G responses to each prompt.
      references: N reference answers as text, or none where `prompts.extras` holds them.
    """


@dataclass(frozen=True)
class Ready:
  """The verdict of a verifier on the device, as arrays that the device may still compute."""

  verdict: Verdict

  def result(self) -> Verdict:
    """The verdict."""
    return self.verdict

  def parsed(self) -> None:
    """None: the verdict has a part named 'parsed' where responses may state no answer."""

  def last_words(self) -> str:
    """A sentence for the log: a function of arrays leaves no response unverified."""
    return 'every response is verified on the device'


# Verifies by arrays alone, so that it may be traced into the training step.
Verify = Callable[[Prompts, RolloutBatch], Verdict]


class DeviceVerifier:
  """A verifier that is a function of arrays. Final."""

  def __init__(self, verify: Verify) -> None:
    self.verify = verify
    self._compiled = jax.jit(verify)

  def submit(self, prompts: Prompts, rollouts: RolloutBatch, references: Sequence[str]) -> Ready:
    """Dispatches the function."""
    del references
    return Ready(self._compiled(prompts, rollouts))


def verdict(groups: Sequence[Sequence[ResponseVerdict]], parts: Sequence[str] = ('answer',)
            ) -> Verdict:
  """Turns the verdicts of single responses into the arrays of one verdict.

  Responses that were not verified stay in the arrays and have valid 0.

  Args:
    groups: N groups of the verdicts of G responses.
    parts: names of the reward's parts to log; where a response's verdict lacks one it is 0.

  Returns:
    Verdict of f32[N, G] arrays: reward is the score, correct is 1 where the outcome is CORRECT.
  """
  def table(of: Callable[[ResponseVerdict], float]) -> Array:
    return jnp.asarray(np.array([[of(v) for v in group] for group in groups], np.float32))

  return Verdict(
      table(lambda v: v.score), table(lambda v: v.outcome not in UNVERIFIED),
      table(lambda v: v.outcome is Outcome.CORRECT),
      {name: table(functools.partial(_part, name)) for name in parts})


def _part(name: str, verdict: ResponseVerdict) -> float:
  return verdict.parts.get(name, 0.0)
