r"""Knights and Knaves: verifies the roles that a response states.

The response must hold one `<think>…</think>` and then one `<answer>…</answer>`. The answer must
say `NAME is a knight` or `NAME is a knave` once of every name of the reference, and name no
role beyond. Rewards:

    format  +1, or −1
    answer  +2 all roles right, −1.5 some wrong, −2 not parsed (always so where the format is bad)

Source: the logic experiments of Short-RL, 2505.12284 (docs/methods/short_rl.md).
"""

import re

from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict
from jaxrl_pt.verifiers.text import between_tags

TAGS = ('think', 'answer')
_CLAIM = re.compile(r'\b([^\W\d_]+) is a (knight|knave)\b', re.IGNORECASE)
_ROLE = re.compile(r'\b(?:knight|knave)s?\b', re.IGNORECASE)


def roles(text: str) -> dict[str, str] | None:
  """Name → role of each claim in `text`; None if a name is claimed twice, a role is said
  outside a claim, or there is no claim."""
  claims = [(name.lower(), role.lower()) for name, role in _CLAIM.findall(text)]
  found = dict(claims)
  is_exact = len(found) == len(claims) == len(_ROLE.findall(text))
  return found if found and is_exact else None


def verify(response: str, reference: str) -> ResponseVerdict:
  """The rewards of the module's docstring.

  Args:
    response: whole text of the response.
    reference: `Alice is a knight, Bob is a knave`, as the generator writes it.
  """
  contents = between_tags(response, TAGS)
  if contents is None:
    return ResponseVerdict(Outcome.UNPARSED, {'format': -1.0, 'answer': -2.0})
  truth, found = roles(reference), roles(contents[1])
  if found is None or truth is None or found.keys() != truth.keys():
    return ResponseVerdict(Outcome.UNPARSED, {'format': 1.0, 'answer': -2.0})
  if found != truth:
    return ResponseVerdict(Outcome.WRONG, {'format': 1.0, 'answer': -1.5})
  return ResponseVerdict(Outcome.CORRECT, {'format': 1.0, 'answer': 2.0})
