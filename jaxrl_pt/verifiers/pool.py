"""Runs host verifiers in killable child processes, while the device goes on.

    with Pool(settings, limits) as pool:
      pending = pool.submit([(response, reference), …])  # returns at once
      …                                                 # draw the next batch
      verdicts = pending.result()                       # in the order of submission

A response on which the verifier loops, crashes, eats memory or sends nonsense has the outcome
TIMEOUT or CRASH, and no other response is affected. The pool accepts only parts and ranges that the
verifier declares.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from jaxrl_pt import config as cfg
from jaxrl_pt.verifiers import build, verifying
from jaxrl_pt.verifiers.channel import MAX_RESULT
from jaxrl_pt.verifiers.processes import Asked, Pending, ProcessPool
from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict

PendingVerdicts = Pending[ResponseVerdict]


class Pool:
  """Child processes that verify responses. Final."""

  def __init__(self, verifier: cfg.HostVerifier, limits: cfg.VerifierPool) -> None:
    """Starts `limits.num_workers` children and waits until they are ready.

    Raises:
      UserError: the verifier needs an extra, or a function that cannot be imported, or runs
        programs, which this machine does not isolate.
      RuntimeError: a child does not start.
    """
    self._verifier = verifier
    self._processes = ProcessPool(verifying.KIND, verifier, limits, MAX_RESULT)

  @property
  def parts(self) -> tuple[str, ...]:
    """The names of the parts of every verdict."""
    return build.part_names(self._verifier)

  def submit(self, items: Sequence[tuple[str, str]]) -> PendingVerdicts:
    """Hands over pairs of a response and its reference answer, and returns at once."""
    return self._processes.submit([
        Asked({'response': response, 'reference': reference}, self._decoded, _crashed)
        for response, reference in items])

  def _decoded(self, answer: dict[str, Any]) -> ResponseVerdict:
    return build.decoded(answer, self._verifier)

  def close(self) -> None:
    """Ends all children at once and cancels unverified responses. It may be called again."""
    self._processes.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
               trace: TracebackType | None) -> None:
    self.close()


def _crashed(detail: str) -> ResponseVerdict:
  return ResponseVerdict(Outcome.CRASH, detail=detail)
