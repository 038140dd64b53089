"""Programs: right if every expression of the problem's asserts has the value that it should have.

The reference answer is JSON, as `data/code_problems.py` writes it:

    {"setup": text, "tests": [[expression, literal], …]}

The program runs in isolation and gives the expressions' values. They are compared here, in another
process, with literals that the program's process never holds: a program that ends early, prints
results, redefines `==` or rewrites whatever runs beside it gets nothing for it. What it can do is
answer the inputs that it is shown in the prompt, without solving the problem.
"""

import ast
import json
import re

from jaxrl_pt import config as cfg
from jaxrl_pt.verifiers import interpreter
from jaxrl_pt.verifiers.response_verdict import HostVerifier, Outcome, ResponseVerdict, answer

_FENCED = re.compile(r'^```(?:python|py|python3)?[ \t]*\n(.*?)^```[ \t]*$',
                     re.DOTALL | re.MULTILINE | re.IGNORECASE)


def extract(response: str, form: cfg.CodeAnswer) -> str | None:
  """The program that a response states: the last fenced block, or all; None if there is none."""
  if form == 'text':
    return response if response.strip() else None
  blocks = _FENCED.findall(response)
  return blocks[-1] if blocks and blocks[-1].strip() else None


def verifier(settings: cfg.CodeVerifier) -> HostVerifier:
  """The verifier of programs.

  Raises:
    UserError: this machine does not isolate programs.
  """
  interpreter.check('CodeVerifier')

  def verify(response: str, reference: str) -> ResponseVerdict:
    program = extract(response, settings.answer)
    if program is None:
      return ResponseVerdict(Outcome.UNPARSED, {'answer': 0.0}, 'no program')
    problem = json.loads(reference)
    expected = [ast.literal_eval(literal) for _, literal in problem['tests']]
    found = interpreter.evaluate(program, problem['setup'], [e for e, _ in problem['tests']],
                                 settings.interpreter)
    is_right = len(found.values) == len(expected) and all(
        value == right for value, right in zip(found.values, expected, strict=True))
    verdict = answer(Outcome.CORRECT if is_right else Outcome.WRONG)
    return ResponseVerdict(verdict.outcome, verdict.parts, found.detail)

  return verify
