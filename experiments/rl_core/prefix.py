"""RPT's reward as a verifier of text, for `fused.py`: both sides are hexadecimal bytes."""

import json

from jaxrl_pt.verifiers.next_token import prefix_match
from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict, answer


def verify(response: str, reference: str) -> ResponseVerdict:
  """1 if the predicted bytes begin the true ones and end where one of their tokens ends."""
  truth = [bytes.fromhex(token) for token in json.loads(reference)]
  right = prefix_match(bytes.fromhex(response), truth) == 1
  return answer(Outcome.CORRECT if right else Outcome.WRONG)
