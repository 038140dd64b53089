"""Tries a verifier on reference answers before training starts.

A verifier that fails on every response, or that reads another form of answer than the problems
have, would give no reward in the whole run: training would go on to its end and learn nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import json
import sys
from typing import Any

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import code, gym, pool
from jaxrl_pt.verifiers import math as mathematics
from jaxrl_pt.verifiers.response_verdict import UNVERIFIED, Outcome, ResponseVerdict

NUM_TRIED = 16


@dataclass(frozen=True)
class Tried:
  """A response on which the verifier is tried.

  response: the text of the response.
  reference: the problem's reference answer.
  place: where the problem stands in the data, for messages.
  is_right: whether the verifier must find the response correct.
  """

  response: str
  reference: str
  place: str
  is_right: bool


def tried(settings: cfg.HostVerifier, reference: str, demonstration: str, place: str) -> Tried:
  """A problem's reference answer as a response in the form that the verifier reads.

  The form that a user's function reads is not known. Such a verifier is tried on the demonstration,
  and need only give a verdict.
  """
  first = settings.verifiers[0] if isinstance(settings, cfg.Composite) else settings
  response = _right_response(first, reference, demonstration)
  if response is None:
    return Tried(demonstration or reference, reference, place, False)
  return Tried(response, reference, place, True)


def _right_response(settings: cfg.HostVerifier, reference: str, demonstration: str
                    ) -> str | None:
  """A response that the verifier must find correct; None where its form is not known."""
  match settings:
    case cfg.MathVerifier(answer='boxed'):
      return rf'\boxed{{{mathematics.reference_answer(reference)}}}'
    case cfg.MathVerifier(answer='gsm8k'):
      return f'#### {mathematics.reference_answer(reference)}'
    case cfg.MathVerifier():
      return mathematics.reference_answer(reference)
    case cfg.JudgeVerifier(verdict=form) if reference in form.labels:
      return form.text(form.labels.index(reference))
    case cfg.JudgeVerifier():
      return reference  # These are no pairs.
    case cfg.LogicVerifier():
      return f'<think></think><answer>{reference}</answer>'
    case cfg.GymVerifier(answer=form):
      right = _gym_answer(reference)
      return right if right is None or form == 'text' else f'<answer>{right}</answer>'
    case cfg.WordVerifier(min_words=low, ngram=ngram):
      fill = max(low, ngram) - len(reference.split())
      return ' '.join([reference, *(f'word{i}' for i in range(fill))])
    case cfg.FormatVerifier(tags=tags):
      return ''.join(f'<{tag}></{tag}>' for tag in tags)
    case cfg.LengthVerifier():
      return ''
    case cfg.CodeVerifier(answer='fence') if demonstration:
      return demonstration
    case cfg.CodeVerifier() if demonstration:
      return code.extract(demonstration, 'fence')
    case _:
      return None


def _gym_answer(reference: str) -> str | None:
  """reasoning-gym's own answer to the problem; None where the reference holds none."""
  problem: dict[str, Any] = json.loads(reference)
  answer = gym.restored(problem['entry'])['answer'] if 'entry' in problem else None
  return None if answer is None else str(answer)


def check(verifiers: pool.Pool, settings: cfg.HostVerifier, items: Sequence[Tried]) -> None:
  """Verifies responses and warns of right ones that the verifier does not find correct.

  Args:
    verifiers: the pool that runs the verifier.
    settings: the verifier's settings.
    items: at least one response.

  Raises:
    UserError: the verifier gives a verdict on none of them, or finds none of them correct although
      all are right.
  """
  name = type(settings).__name__
  verdicts = verifiers.submit([(item.response, item.reference) for item in items]).result()
  if all(verdict.outcome in UNVERIFIED for verdict in verdicts):
    raise UserError(f'{name} gave no verdict on any of the {len(items)} answers that it was tried '
                    f'on before the first step: {last_words(verdicts)}.')
  missed = [item for item, verdict in zip(items, verdicts, strict=True)
            if item.is_right and verdict.outcome is not Outcome.CORRECT]
  if not missed:
    return
  first = missed[0]
  example = f'{_short(first.response)} where the reference is {_short(first.reference)} ' \
            f'({first.place})'
  if len(missed) == len(items):
    raise UserError(f'{name} finds none of {len(items)} reference answers right, though stated in '
                    f'its own form: {example}. Use the verifier that these problems are for.')
  print(f'{name} finds {len(missed)} of {len(items)} reference answers not right, though stated '
        f'in its own form: {example}. They cannot be earned.', file=sys.stderr, flush=True)


def last_words(verdicts: Sequence[ResponseVerdict]) -> str:
  """The most frequent reason why responses were not verified."""
  reasons = [v.detail or v.outcome.value for v in verdicts if v.outcome in UNVERIFIED]
  return max(reasons, key=reasons.count).rstrip('.') if reasons else 'it did not say why'


def _short(text: str) -> str:
  return repr(text if len(text) <= 200 else f'{text[:200]}…')
