"""A verifier as nobody should write one: it evaluates the response in its own process."""

from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict, answer


def verify(response: str, reference: str) -> ResponseVerdict:
  try:
    value = eval(response)
  except Exception:
    value = None
  return answer(Outcome.CORRECT if value == reference else Outcome.WRONG)
