"""From settings to host verifiers. Imported by the pool's children: no JAX here."""

from collections.abc import Mapping
import dataclasses
import functools
import importlib
import math
from typing import Any, get_args

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import gym, logic, text
from jaxrl_pt.verifiers import math as mathematics
from jaxrl_pt.verifiers.judgement import HostVerifier, Judgement, Outcome

_KINDS: Mapping[str, type] = {kind.__name__: kind for kind in get_args(cfg.HostVerifier)}


def host_verifier(settings: cfg.HostVerifier) -> HostVerifier:
  """The function (response, reference) → Judgement that `settings` name.

  Raises:
    UserError: an extra is missing, or a PythonVerifier's function cannot be imported.
  """
  match settings:
    case cfg.MathVerifier(answer=form, symbolic=symbolic):
      return mathematics.verifier(form, symbolic)
    case cfg.LogicVerifier():
      return logic.judge
    case cfg.GymVerifier(answer=form, partial_credit=partial_credit):
      return gym.verifier(form, partial_credit)
    case cfg.WordVerifier(min_words=low, max_words=high, ngram=ngram):
      return functools.partial(text.judge_words, min_words=low, max_words=high, ngram=ngram)
    case cfg.FormatVerifier(tags=tags):
      return lambda response, _: text.judge_format(response, tags)
    case cfg.LengthVerifier(min_chars=low, max_chars=high):
      return lambda response, _: text.judge_length(response, low, high)
    case cfg.PythonVerifier(target=target):
      return _imported(target)
    case cfg.Composite(verifiers=parts, weights=weights):
      return composite([host_verifier(part) for part in parts], weights,
                       [type(part).__name__ for part in parts])


def part_names(settings: cfg.HostVerifier) -> tuple[str, ...]:
  """Names of the parts that a verifier's judgements have."""
  match settings:
    case cfg.LogicVerifier():
      return 'format', 'answer'
    case cfg.GymVerifier(partial_credit=True):
      return 'answer', 'partial'
    case cfg.WordVerifier():
      return 'word', 'length', 'novelty'
    case cfg.FormatVerifier():
      return ('format',)
    case cfg.LengthVerifier():
      return ('length',)
    case cfg.PythonVerifier(parts=parts):
      return parts
    case cfg.Composite(verifiers=verifiers):
      return tuple(f'{type(v).__name__}/{name}' for v in verifiers for name in part_names(v))
    case _:
      return ('answer',)


def composite(verifiers: list[HostVerifier], weights: tuple[float, ...], names: list[str]
              ) -> HostVerifier:
  """score = Σ weight · score of each verifier; the outcome is the first one's.

  A part is named `verifier/part`, so that all are logged apart.
  """
  def judge(response: str, reference: str) -> Judgement:
    judged = [verify(response, reference) for verify in verifiers]
    parts = {f'{name}/{part}': weight * value
             for name, weight, j in zip(names, weights, judged, strict=True)
             for part, value in j.parts.items()}
    return Judgement(judged[0].outcome, parts)

  return judge


def checked(judgement: Judgement, names: tuple[str, ...]) -> Judgement:
  """A judgement with other parts than it should have, or one not finite, is a crash."""
  values = judgement.parts.values()
  if set(judgement.parts) != set(names) or not all(math.isfinite(v) for v in values):
    return Judgement(Outcome.CRASH, detail=f'parts {dict(judgement.parts)}, not finite {names}')
  return judgement


def _imported(target: str) -> HostVerifier:
  module, _, name = target.partition(':')
  try:
    function: HostVerifier = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise UserError(f'PythonVerifier.target = {target!r} cannot be imported ({error}): write '
                    "'module:function' of a module on the path.") from error
  return function


# --- To a child process and back --------------------------------------------------


def to_json(settings: cfg.HostVerifier) -> dict[str, Any]:
  """Settings as JSON, {"kind": type, "fields": …}."""
  fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
  if isinstance(settings, cfg.Composite):
    fields['verifiers'] = [to_json(v) for v in settings.verifiers]
  return {'kind': type(settings).__name__, 'fields': fields}


def from_json(data: dict[str, Any]) -> cfg.HostVerifier:
  """Undoes `to_json`."""
  fields = dict(data['fields'])
  if data['kind'] == 'Composite':
    fields['verifiers'] = [from_json(v) for v in fields['verifiers']]
  settings: cfg.HostVerifier = _KINDS[data['kind']](**fields)
  return settings
