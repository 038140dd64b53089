r"""The verdict of a judge: which of two responses it names, read from its own response alone.

The last box \boxed{label}, or the text behind the last marker, must be one of the two labels, up to
space round it. Anything else is no verdict: another label, both, an empty box, text behind the
label. What the two responses say stands in the judge's prompt, which is not read here.

Source: Reward Reasoning Model, 2505.14674. Its reward of a verdict is 1 or −1.
"""

from jaxrl_pt import config as cfg
from jaxrl_pt.verifiers import math as mathematics
from jaxrl_pt.verifiers.response_verdict import HostVerifier, Outcome, ResponseVerdict

FIRST, SECOND, NONE = 0, 1, -1  # the response that is shown first, the other one, no verdict


def verdict(response: str, form: cfg.Verdicts) -> int:
  """FIRST, SECOND or NONE.

  Args:
    response: what the judge wrote.
    form: how it states a verdict.
  """
  match form:
    case cfg.BoxedVerdict():
      stated = mathematics.boxed(response)
    case cfg.MarkedVerdict(marker=marker):
      _, found, after = response.rpartition(marker)
      stated = after if found else None
  named = None if stated is None else stated.strip()
  return form.labels.index(named) if named in form.labels else NONE


def verifier(settings: cfg.JudgeVerifier) -> HostVerifier:
  """The verifier whose reference answers are the labels of the better responses."""
  def verify(response: str, reference: str) -> ResponseVerdict:
    named = verdict(response, settings.verdict)
    if named == NONE:
      return ResponseVerdict(Outcome.UNPARSED, {'answer': settings.unparsed})
    if settings.verdict.labels[named] == reference:
      return ResponseVerdict(Outcome.CORRECT, {'answer': 1.0})
    return ResponseVerdict(Outcome.WRONG, {'answer': -1.0})

  return verify
