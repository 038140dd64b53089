"""Verification as a service (`service.py`): a request is a response with its reference answer."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from jaxrl_pt import config as cfg
from jaxrl_pt.verifiers import build
from jaxrl_pt.verifiers.channel import MAX_RESULT
from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict
from jaxrl_pt.verifiers.service import Failure, Handle, Kind, Role

KIND = Kind('jaxrl_pt.verifiers.child', 'verifier')


class Verifying:
  """The service of a verifier: one worker, or two where a Composite needs both sandboxes. Final."""

  kind = KIND
  max_answer = MAX_RESULT

  def __init__(self, settings: cfg.HostVerifier) -> None:
    self._settings = settings
    self._parts = build.parts_of(settings)
    by_sandbox = [[i for i, part in enumerate(self._parts) if build.is_tight(part) == tight]
                  for tight in (True, False)]
    self._places = [places for places in by_sandbox if places]  # in `_parts`, for each role

  def roles(self) -> Sequence[Role]:
    """A role for each sandbox that the verifiers need."""
    return [Role(functools.partial(_handler, [self._parts[i] for i in places]),
                 build.is_tight(self._parts[places[0]])) for places in self._places]

  def preload(self) -> None:
    """Imports the libraries of the built-in verifiers."""
    build.preload(self._settings)

  def serve(self, ask: Callable[[int, Any], Any], request: Any) -> dict[str, Any]:
    """The verdict on a response, from those of all verifiers."""
    verdicts: dict[int, ResponseVerdict] = {}
    for role, places in enumerate(self._places):
      answers = ask(role, request)
      if not isinstance(answers, list) or len(answers) != len(places):
        raise ValueError('a message that is not a verdict')
      verdicts |= {i: build.decoded(data, self._parts[i])
                   for i, data in zip(places, answers, strict=True)}
    return build.encoded(
        build.combined(self._settings, [verdicts[i] for i in range(len(self._parts))]))

  def failed(self, failure: Failure) -> dict[str, Any]:
    """The verdict TIMEOUT or CRASH."""
    outcome = Outcome.TIMEOUT if failure.reason == 'timeout' else Outcome.CRASH
    return build.encoded(ResponseVerdict(outcome, detail=failure.detail))

  def is_spent(self, request: Any) -> bool:
    """Whether verifying has evaluated the response as an expression."""
    return build.evaluates(self._settings, request['reference'])


def _handler(parts: Sequence[cfg.HostVerifier]) -> Handle:
  """The function from a request to the encoded verdicts of verifiers that share a process."""
  verifiers = [build.host_verifier(part) for part in parts]

  def handle(request: Any) -> list[dict[str, Any]]:
    answers = []
    for verify, part in zip(verifiers, parts, strict=True):
      verdict = verify(request['response'], request['reference'])
      if not isinstance(verdict, ResponseVerdict):
        verdict = ResponseVerdict(
            Outcome.CRASH, detail=f'the verifier returned {type(verdict).__name__}, '
                                  'not a ResponseVerdict')
      answers.append(build.encoded(build.checked(verdict, part)))
    return answers

  return handle
