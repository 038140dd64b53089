r"""The verifier of Knights and Knaves: it compares the roles that a response states.

The response must hold one `<think>…</think>` and then one `<answer>…</answer>`. The answer must
say `NAME is a knight` or `NAME is a knave` once of every name of the reference answer, and name no
role beyond. The parts of the reward are:

    format  +1 if the tags are right, else −1
    answer  +2 if all roles are right, −1.5 if some are wrong, −2 if the answer or the tags cannot
            be parsed

Source: the logic experiments of Short-RL, 2505.12284 (docs/methods/short_rl.md).
"""

import re

from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict
from jaxrl_pt.verifiers.text import between_tags

TAGS = ('think', 'answer')
_CLAIM = re.compile(r'\b([^\W\d_]+) is a (knight|knave)\b', re.IGNORECASE)
_ROLE = re.compile(r'\b(?:knight|knave)s?\b', re.IGNORECASE)


def roles(text: str) -> dict[str, str] | None:
  """The role of each name in `text`, in lower case.

  It is None if a name has two claims, a role is said outside a claim, or there is no claim.
  """
  claims = [(name.lower(), role.lower()) for name, role in _CLAIM.findall(text)]
  role_of = dict(claims)
  is_exact = len(role_of) == len(claims) == len(_ROLE.findall(text))
  return role_of if role_of and is_exact else None


def verify(response: str, reference: str) -> ResponseVerdict:
  """The verdict with the parts `format` and `answer`.

  Args:
    response: the whole text of the response.
    reference: the reference answer, such as `Alice is a knight, Bob is a knave`.
  """
  contents = between_tags(response, TAGS)
  if contents is None:
    return ResponseVerdict(Outcome.UNPARSED, {'format': -1.0, 'answer': -2.0})
  truth, stated = roles(reference), roles(contents[1])
  if stated is None or truth is None or stated.keys() != truth.keys():
    return ResponseVerdict(Outcome.UNPARSED, {'format': 1.0, 'answer': -2.0})
  if stated != truth:
    return ResponseVerdict(Outcome.WRONG, {'format': 1.0, 'answer': -1.5})
  return ResponseVerdict(Outcome.CORRECT, {'format': 1.0, 'answer': 2.0})
