"""Makes host verifiers from their settings. The pool's child processes import it: no JAX here."""

from collections.abc import Sequence
import functools
import importlib
from typing import Any

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import code, gym, judge, logic, text
from jaxrl_pt.verifiers import math as mathematics
from jaxrl_pt.verifiers.response_verdict import UNVERIFIED, HostVerifier, Outcome, ResponseVerdict

MAX_DETAIL = 2000  # characters of a verdict's reason


def host_verifier(settings: cfg.HostVerifier) -> HostVerifier:
  """The function (response, reference answer) → ResponseVerdict that `settings` describe.

  Raises:
    UserError: an extra is missing, or a PythonVerifier's function cannot be imported.
  """
  match settings:
    case cfg.MathVerifier(answer=form, symbolic=symbolic):
      return mathematics.verifier(form, symbolic)
    case cfg.LogicVerifier():
      return logic.verify
    case cfg.JudgeVerifier():
      return judge.verifier(settings)
    case cfg.GymVerifier(answer=form, partial_credit=partial_credit):
      return gym.verifier(form, partial_credit)
    case cfg.WordVerifier(min_words=low, max_words=high, ngram=ngram):
      return functools.partial(text.verify_words, min_words=low, max_words=high, ngram=ngram)
    case cfg.FormatVerifier(tags=tags):
      return lambda response, _: text.verify_format(response, tags)
    case cfg.LengthVerifier(min_chars=low, max_chars=high):
      return lambda response, _: text.verify_length(response, low, high)
    case cfg.CodeVerifier():
      return code.verifier(settings)
    case cfg.PythonVerifier(target=target):
      return _imported(target)
    case cfg.Composite():
      return composite(settings)


# --- What a verdict may hold ------------------------------------------------------


def part_ranges(settings: cfg.HostVerifier) -> dict[str, tuple[float, float]]:
  """The parts of a verifier's verdicts by name, with the range that each must lie in."""
  match settings:
    case cfg.LogicVerifier():
      return {'format': (-1.0, 1.0), 'answer': (-2.0, 2.0)}
    case cfg.JudgeVerifier():
      return {'answer': (-1.0, 1.0)}
    case cfg.GymVerifier(partial_credit=True):
      return {'answer': (0.0, 1.0), 'partial': (0.0, 1.0)}
    case cfg.WordVerifier():
      return dict.fromkeys(('word', 'length', 'novelty'), (0.0, 1 / 3))
    case cfg.FormatVerifier():
      return {'format': (0.0, 1.0)}
    case cfg.LengthVerifier():
      return {'length': (0.0, 1.0)}
    case cfg.PythonVerifier(parts=parts, min_score=low, max_score=high):
      return dict.fromkeys(parts, (low, high))
    case cfg.Composite(verifiers=verifiers, weights=weights):
      return {f'{type(v).__name__}/{name}': _scaled(weight, ends)
              for v, weight in zip(verifiers, weights, strict=True)
              for name, ends in part_ranges(v).items()}
    case _:
      return {'answer': (0.0, 1.0)}


def _scaled(weight: float, ends: tuple[float, float]) -> tuple[float, float]:
  low, high = sorted(weight * end for end in ends)
  return low, high


def part_names(settings: cfg.HostVerifier) -> tuple[str, ...]:
  """The names of the parts of a verifier's verdicts."""
  return tuple(part_ranges(settings))


def checked(verdict: ResponseVerdict, settings: cfg.HostVerifier) -> ResponseVerdict:
  """The verdict, or a CRASH where its parts are not those of `part_ranges` or out of range."""
  if verdict.outcome in UNVERIFIED:
    return ResponseVerdict(verdict.outcome, detail=verdict.detail)
  ranges, parts = part_ranges(settings), verdict.parts
  if set(parts) != set(ranges):
    return ResponseVerdict(Outcome.CRASH,
                           detail=f'parts {list(parts)} where {list(ranges)} are declared')
  for name, (low, high) in ranges.items():
    if not low <= parts[name] <= high:  # NaN is in no range.
      return ResponseVerdict(
          Outcome.CRASH, detail=f'the part {name!r} is {parts[name]!r}, outside the '
                                f'range from {low:g} to {high:g} that is declared')
  return verdict


# --- Several verifiers as one -------------------------------------------------------


def parts_of(settings: cfg.HostVerifier) -> tuple[cfg.HostVerifier, ...]:
  """The verifiers of a Composite, or the verifier itself."""
  return settings.verifiers if isinstance(settings, cfg.Composite) else (settings,)


def combined(settings: cfg.HostVerifier, verdicts: Sequence[ResponseVerdict]) -> ResponseVerdict:
  """One verdict from the verdicts of `parts_of(settings)`.

  For a Composite the score is Σ weight · score over its verifiers, and the outcome is that of the
  first one. A part is named `verifier/part`, so that all are logged apart. If one verifier times
  out or crashes, so does the whole.
  """
  if not isinstance(settings, cfg.Composite):
    return verdicts[0]
  for verdict in verdicts:
    if verdict.outcome in UNVERIFIED:
      return verdict
  parts = {f'{type(part).__name__}/{name}': weight * value
           for part, weight, verdict in zip(settings.verifiers, settings.weights, verdicts,
                                            strict=True)
           for name, value in verdict.parts.items()}
  return ResponseVerdict(verdicts[0].outcome, parts)


def composite(settings: cfg.Composite) -> HostVerifier:
  """A verifier that runs all verifiers of `settings` and combines their verdicts."""
  verifiers = [host_verifier(part) for part in settings.verifiers]
  return lambda response, reference: combined(
      settings, [verify(response, reference) for verify in verifiers])


def _imported(target: str) -> HostVerifier:
  module, _, name = target.partition(':')
  try:
    function: HostVerifier = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise UserError(f'PythonVerifier.target = {target!r} cannot be imported ({error}): write '
                    "'module:function' of a module on the path.") from error
  return function


# --- In which process a verifier runs -----------------------------------------------


def is_tight(part: cfg.HostVerifier) -> bool:
  """Whether it can run in `sandbox.enter_tight`, where no function of the user's can be trusted to
  run and no process be started."""
  return not isinstance(part, cfg.PythonVerifier | cfg.CodeVerifier)


def evaluates(settings: cfg.HostVerifier, reference: str) -> bool:
  """Whether verifying evaluates the response as an expression; its process serves no other then."""
  return any(isinstance(part, cfg.GymVerifier) and gym.evaluates(reference)
             for part in parts_of(settings))


def preload(settings: cfg.HostVerifier) -> None:
  """Imports the libraries of the built-in verifiers, for processes that are forked from this one.

  Raises:
    UserError: an extra is missing.
  """
  for part in parts_of(settings):
    if is_tight(part):
      host_verifier(part)


# --- To a child process and back --------------------------------------------------


def encoded(verdict: ResponseVerdict) -> dict[str, Any]:
  """The verdict as JSON."""
  return {'outcome': verdict.outcome.value,
          'parts': {name: float(value) for name, value in verdict.parts.items()},
          'detail': verdict.detail[:MAX_DETAIL]}


def decoded(data: Any, settings: cfg.HostVerifier) -> ResponseVerdict:
  """The verdict that `encoded` has written, checked as data of a hostile process.

  Raises:
    ValueError: the data are no verdict; a verdict that `checked` refuses is a CRASH instead.
  """
  if not isinstance(data, dict) or set(data) != {'outcome', 'parts', 'detail'}:
    raise ValueError('a message that is not a verdict')
  outcome, parts, detail = data['outcome'], data['parts'], data['detail']
  is_text = isinstance(outcome, str) and isinstance(detail, str)
  if not is_text or not isinstance(parts, dict) or not all(
      type(value) is float for value in parts.values()):
    raise ValueError('a message that is not a verdict')
  return checked(ResponseVerdict(Outcome(outcome), parts, detail[:MAX_DETAIL]), settings)
