r"""Mathematical answers: where a response states one, and whether it equals the reference.

Where the answer stands is the format's to say, and a response that has several is judged by
the last one:

    boxed        content of the balanced \boxed{…} that opens last
    gsm8k        rest of the line after the last ####
    last_number  the last number of the response

Two answers are equal if they are the same exact number, the same text up to spacing and
dressing ($, \left, \text, a final full stop), or, where asked for, the same expression
to `math-verify`, which is not asked of powers and factorials too large to work out. An answer
of more than MAX_ANSWER characters is wrong without being read: none is that long, and reading
it could take for ever.
"""

import fractions
import re
from typing import assert_never

from jaxrl_pt.config import AnswerFormat
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers.judgement import HostVerifier, Judgement, Outcome, answer

MAX_ANSWER = 1000
# Braces and boxes in one pass; an escaped brace is text.
_BRACES = re.compile(r'(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})', re.DOTALL)
_NUMBER = re.compile(r'-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)')
_PLAIN = re.compile(r'([+-]?)(\d+(?:\.\d*)?|\.\d+)(?:/(\d+))?')
_FRACTION = re.compile(r'([+-]?)\\[dt]?frac\{?(-?\d+)\}?\{?(\d+)\}?')
_THOUSANDS = re.compile(r'(?<=\d),(?=\d{3}(?!\d))')
# Dressing that changes no value.
_DRESSING = re.compile(r'\\(?:left|right|displaystyle|[,;:!\s])|[$\s]|\\[%$]|%')
# Powers that no reference needs and whose value fills the memory: 9^{9^9}, 2^{12345}, 10000!.
_HUGE = re.compile(
    r'(?:\^|\*\*)\s*\{?\s*[(-]*(?:\d{4}|[^{}^*]*(?:\^|\*\*))|\d{4}[\s)}]*!|![\s)}]*!')
_WRAPPED = re.compile(r'\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}')


# --- Where the answer stands ------------------------------------------------------


def boxed(text: str) -> str | None:
  r"""Content of the balanced `\boxed{…}` that opens last, or None. Linear in the text."""
  opened: list[tuple[int, int] | None] = []  # (start of box, start of content), None: a brace
  best: tuple[int, int, int] | None = None
  for match in _BRACES.finditer(text):
    if match['box'] is not None:
      opened.append((match.start(), match.end()))
    elif match['open'] is not None:
      opened.append(None)
    elif match['close'] is not None and opened:
      box = opened.pop()
      if box is not None and (best is None or box[0] > best[0]):
        best = (*box, match.start())
  return None if best is None else text[best[1]:best[2]]


def extract(response: str, form: AnswerFormat) -> str | None:
  """The answer that a response states in this format, or None; blank counts as none."""
  match form:
    case 'boxed':
      found = boxed(response)
    case 'gsm8k':
      _, mark, rest = response.rpartition('####')
      found = rest.split('\n', 1)[0] if mark else None
    case 'last_number':
      numbers = _NUMBER.findall(response)
      found = numbers[-1] if numbers else None
    case _:
      assert_never(form)
  return found.strip() if found and found.strip() else None


def reference_answer(reference: str) -> str:
  r"""What follows the last #### of a reference, else its last box, else all of it."""
  forms: tuple[AnswerFormat, ...] = ('gsm8k', 'boxed')
  for form in forms:
    found = extract(reference, form)
    if found is not None:
      return found
  return reference.strip()


# --- Whether two answers are equal ------------------------------------------------


def number(text: str) -> fractions.Fraction | None:
  r"""The exact value of an integer, decimal, a/b or \frac{a}{b}; None for all else.

  Neither exponents, nor infinity, nor NaN are numbers here.
  """
  text = _THOUSANDS.sub('', plain(text))
  if found := _FRACTION.fullmatch(text):
    sign, top, bottom = found[1], found[2], found[3]
  elif found := _PLAIN.fullmatch(text):
    sign, top, bottom = found[1], found[2], found[3] or '1'
  else:
    return None
  if int(bottom) == 0:
    return None
  value = fractions.Fraction(top) / int(bottom)
  return -value if sign == '-' else value


def plain(text: str) -> str:
  """The answer without dressing: spacing, dollar and percent signs, \\text, a full stop."""
  text = _WRAPPED.sub(r'\1', text)
  return _DRESSING.sub('', text).removesuffix('.')


def equal(stated: str, truth: str) -> bool:
  """Whether two answers are the same number or, up to dressing, the same text."""
  left, right = number(stated), number(truth)
  if left is not None and right is not None:
    return left == right
  return plain(stated) == plain(truth)


def _same_expression(stated: str, truth: str) -> bool:
  """math-verify's verdict. Without its own timeouts, which are signals: the pool has deadlines."""
  import math_verify
  targets = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]

  def parse(text: str) -> list[object]:
    return list(math_verify.parse(f'${text}$', targets, parsing_timeout=None,
                                  raise_on_error=False))

  gold, found = parse(truth), parse(stated)
  return bool(gold and found and math_verify.verify(
      gold, found, timeout_seconds=None, raise_on_error=False))


def verifier(form: AnswerFormat, symbolic: bool) -> HostVerifier:
  """The verifier of answers in this format.

  Raises:
    UserError: `symbolic` without the `math` extra.
  """
  if symbolic:
    try:
      import math_verify  # noqa: F401 an extra: only symbolic answers need it
    except ImportError as error:
      raise UserError("MathVerifier.symbolic needs the extra `math`: pip install "
                      "'jaxrl_pt[math]', or set it to False for numbers and plain text."
                      ) from error

  def judge(response: str, reference: str) -> Judgement:
    stated, truth = extract(response, form), reference_answer(reference)
    if stated is None:
      return answer(Outcome.UNPARSED)
    if len(stated) > MAX_ANSWER:
      return answer(Outcome.WRONG)
    is_right = equal(stated, truth) or (
        symbolic and not _HUGE.search(stated) and _same_expression(stated, truth))
    return answer(Outcome.CORRECT if is_right else Outcome.WRONG)

  return judge
