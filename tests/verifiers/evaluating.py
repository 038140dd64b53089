"""A verifier as nobody should write one: it evaluates the response in its own process."""

from jaxrl_pt.verifiers.judgement import Judgement, Outcome, answer


def judge(response: str, reference: str) -> Judgement:
  try:
    value = eval(response)
  except Exception:
    value = None
  return answer(Outcome.CORRECT if value == reference else Outcome.WRONG)
