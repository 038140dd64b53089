r"""The verifier of mathematical answers: it compares the stated answer with the reference answer.

The format says where a response states its answer. If there are several answers, the last one
counts:

    boxed        content of the balanced \boxed{…} that opens last and is not blank; \boxed 5 too
    gsm8k        rest of the line after the last ####
    last_number  the last number of the response, as a whole: `1/2`, `−5`, `1e3`, `1 1/2`

The grammar of `answer_parse` either understands an answer as a whole or leaves it UNPARSED; no part
of a text is read that was not understood. An answer that is the same text as the reference answer,
up to spacing and dressing, is right in any case. Numbers are exact rationals:

    decimals     0.5 is 1/2, and 0.333333 is not 1/3: a decimal is the number that it writes.
                 0.\overline{3} is 1/3, and 3.14 is not π. Nothing is compared by rounding.
    percent      50% is right for the reference answers 1/2 and, since many problems leave the sign
                 to the question, 50. For the reference answer 50%, both 50 and 0.5 are right, but
                 0.5% is not.
    units        `5 cm`, `18 dollars`, `30°` are right for 5, 18, 30, and the reverse; 5 cm is not
                 5 m.
    statements   x = 5 and 2 + 3 = 5 are right for 5; 5 = 6, ≠ 7 and > 7 are right for no value.

docs/answers.md says all of this in full. With `symbolic`, expressions are worked out too, exactly;
where they hold functions or nested roots, sympy must prove the equality. An answer of more than
MAX_ANSWER characters, with very deep brackets or with numbers that are too large to work out is
wrong: no reference answer is like that, and reading it could take for ever.
"""

import re
from typing import assert_never

from jaxrl_pt.config import AnswerFormat
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import answer_equal, answer_number, answer_parse, answer_proof, answer_text
from jaxrl_pt.verifiers.answer_tokens import NotUnderstood, TooLarge
from jaxrl_pt.verifiers.response_verdict import HostVerifier, Outcome, ResponseVerdict, answer

MAX_ANSWER = 1000  # characters
# Matches braces and boxes in one pass; an escaped brace is text.
_BRACES = re.compile(r'(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})', re.DOTALL)
# Matches a box without braces, up to the next space; no formula may go on behind it.
_BARE_BOX = re.compile(r'\\boxed\s*([^\s{}$\\]++)(?!\s*[\d+*/^=_!%{\\-])')


# --- Where the answer stands ------------------------------------------------------


def boxed(text: str) -> str | None:
  r"""Content of the balanced `\boxed{…}` that opens last, or None. It takes linear time.

  A blank box counts only where there is no other box; `\boxed 5` counts as `\boxed{5}`.
  """
  opened: list[tuple[int, int] | None] = []  # (start of box, start of content); None for a brace
  best: tuple[bool, int, str] | None = None  # (is not blank, start, content)
  for match in _BRACES.finditer(text):
    if match['box'] is not None:
      opened.append((match.start(), match.end()))
    elif match['open'] is not None:
      opened.append(None)
    elif match['close'] is not None and opened:
      box = opened.pop()
      # Long content is not copied whole, or a text of nested boxes would take quadratic time.
      if box is not None and (best is None or box[0] > best[1] or not best[0]):
        content = text[box[1]:min(match.start(), box[1] + 2 * MAX_ANSWER)]
        if best is None or bool(content.strip()) >= best[0]:
          best = bool(content.strip()), box[0], content
    elif match[0] == r'\b' and (bare := _BARE_BOX.match(text, match.start())):
      if best is None or match.start() > best[1] or not best[0]:
        best = True, match.start(), bare[1][:2 * MAX_ANSWER]
  return None if best is None else best[2]


def extract(response: str, form: AnswerFormat) -> str | None:
  """The answer that a response states in this format; None where it is missing or blank."""
  match form:
    case 'boxed':
      stated = boxed(response)
    case 'gsm8k':
      _, mark, after = response.rpartition('####')
      stated = after.split('\n', 1)[0] if mark else None
    case 'last_number':
      stated = answer_number.last(response)
    case _:
      assert_never(form)
  return stated.strip() if stated and stated.strip() else None


def reference_answer(reference: str) -> str:
  r"""The reference answer in a problem's text: after its last ####, else its last box, else all."""
  forms: tuple[AnswerFormat, ...] = ('gsm8k', 'boxed')
  for form in forms:
    stated = extract(reference, form)
    if stated is not None:
      return stated
  return reference.strip()


# --- Whether two answers are equal ------------------------------------------------


number = answer_number.number  # gives the exact value of a number that is written out


def plain(text: str) -> str:
  """The answer as a text, without dressing, fonts and spaces beside signs."""
  return answer_text.plain(text)


def equal(stated: str, truth: str) -> bool:
  """Whether two answers are the same number or, up to dressing, the same text."""
  return _outcome(stated, truth, None) is Outcome.CORRECT


def _tree(text: str) -> answer_parse.Node | None:
  try:
    return answer_parse.parse(answer_text.undressed(text))
  except NotUnderstood:
    return None


def _outcome(stated: str, truth: str, prove: answer_equal.Proof | None) -> Outcome:
  """CORRECT, WRONG, or UNPARSED where the true answer is a formula and no formula is stated."""
  if len(stated) > MAX_ANSWER:
    return Outcome.WRONG
  text, wanted_text = plain(stated), plain(truth)
  if text.replace(' ', '').isalpha():  # words, in any case
    text, wanted_text = text.lower(), wanted_text.lower()
  if text and text == wanted_text:
    return Outcome.CORRECT
  try:
    wanted = _tree(truth) if len(truth) <= MAX_ANSWER else None
    if wanted is None:  # The true answer is a text.
      return Outcome.WRONG
    tree = _tree(stated)
    if tree is None:
      return Outcome.UNPARSED
    is_right = answer_equal.is_equal(tree, wanted, prove)
  except (TooLarge, RecursionError):
    return Outcome.WRONG
  return Outcome.CORRECT if is_right else Outcome.WRONG


def verifier(form: AnswerFormat, symbolic: bool) -> HostVerifier:
  """The verifier of mathematical answers in this format.

  Args:
    form: where a response states its answer.
    symbolic: whether expressions are worked out.

  Raises:
    UserError: `symbolic`, and sympy is missing.
  """
  if symbolic:
    try:
      import sympy  # noqa: F401 optional: only symbolic answers need it
    except ImportError as error:
      raise UserError("MathVerifier.symbolic needs sympy (pip install 'jaxrl_pt[math]'): install "
                      'it, or set MathVerifier.symbolic to False for numbers and plain text.'
                      ) from error
  prove = answer_proof.is_proved if symbolic else None

  def verify(response: str, reference: str) -> ResponseVerdict:
    stated = extract(response, form)
    if stated is None:
      return answer(Outcome.UNPARSED)
    return answer(_outcome(stated, reference_answer(reference), prove))

  return verify
