r"""Numbers that are written out: the value of a number, and the last number of a text.

The last number is the last digits of the text with all that belongs to them: sign, thousands,
decimals, exponent, fraction, percent. It counts only if it stands for itself. Digits are no answer
if they are a part of something else (`x^2`, `2\sqrt{3}`, `3:4`, `H2`) or if the text denies them
(`≠ 7`, `not 7`, `5 = 6`); the numbers before them are no answer either.
"""

import fractions
import re

from jaxrl_pt.verifiers import (
  answer_evaluate,
  answer_parse,
  answer_text,
  answer_units,
  answer_value,
)
from jaxrl_pt.verifiers import answer_tree as tree
from jaxrl_pt.verifiers.answer_tokens import NotUnderstood, TooLarge

WINDOW = 1000  # How many characters on both sides of the last digits are read.

_INTEGER = r'(?:[1-9]\d{0,2}(?:,\d{3})+(?![\d,]*\d)|\d+)'
_DECIMAL = rf'(?:{_INTEGER}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?'
_NUMBER = re.compile(
    rf'(?P<sign>[+-])?(?P<number>\\[dt]?frac\s*\{{-?\d+\}}\s*\{{\d+\}}|'
    rf'\\[dt]?frac\s*\d\d(?!\d)|\d+[ ]\d+/\d+|\d+\s*\\[dt]?frac\s*\{{\d+\}}\{{\d+\}}|'
    rf'[1-9]\d{{0,2}}(?:(?:\{{,\}}|\\,|\\!|,\\!|[ ])\d{{3}})+(?!\d)(?:\.\d+)?|'
    rf'{_DECIMAL}(?:/{_DECIMAL})?)')
# Matches text before a number that makes the number a part of a formula.
_JOINED_BEFORE = re.compile(
    r'(?:[\w)\]}]\s*[+*/^]|[\w)\]}]\s*\\(?:times|cdot|div|pm|mp)|[_^√\\}]|\d\s*:|\d\.|'
    r'\\(?:sqrt|surd|pm|log|ln|sin|cos|tan)\s*(?:_\s*(?:\{[^{}]*\}|\w))?\s*|\\[dtc]?frac\s*(?:\{[^{}]*\})?)\s*\{?\s*\Z')
_GLUED_BEFORE = re.compile(r'(?:[^\W_]|[^\W_]\.)\Z')
_HYPHEN_BEFORE = re.compile(r'(?:(?:\A|[\s(,:])\d[\d,.]*|[^\W\d_]{2,})\Z')
_DENIED_BEFORE = re.compile(
    r"(?:\\(?:neq?|not|approx|sim|[lg]eq?|[lg]t|[lg]eqslant)\s*=?|!=|<=|>=|(?<![<>])[<>]|~|"
    r"\b(?:not|never|isn['’]?t|than|least|most|about|around|nearly|almost|approximately)"
    r"|不是|不等于|不为|非|不到|约|大约|(?:不会|并不)是)\s*[\s$({\[*]*\Z", re.IGNORECASE)
_JOINED_AFTER = re.compile(
    r'\}*\s*(?:\^|\\(?:sqrt|surd|pi|times|cdot|div|pm|frac|dfrac|tfrac|binom|circ)|[*/+]\s*[\w(\\]|π|√)|'
    r'\.\d|:\d|_|!\s*[\w=]|\(|\{|(?=[^\W\d_])(?!st\b|nd\b|rd\b|th\b)')
_EQUATION = re.compile(r'(?:\A|[.;:,$(\n]|\b(?:is|so|thus|hence)\b)\s*'
                       r'([^.;:,$\n=]*?\d[^.;:,$\n=]*?)\s*=\s*[\s$]*\Z')


def number(text: str) -> fractions.Fraction | None:
  r"""The exact value of a number that is written out, such as 50 for 50%; None for all else.

  Integers, decimals, 1e5, a/b, \frac{a}{b} and mixed numbers are numbers; infinity and NaN are not.
  """
  try:
    return value(answer_parse.parse(answer_text.undressed(text)))
  except (NotUnderstood, TooLarge, RecursionError):
    return None


def value(node: tree.Node) -> fractions.Fraction | None:
  """The value of a number that is written out, without its percent or degree sign; else None."""
  match node:
    case tree.Number(value=exact):
      return exact
    case tree.Unit(value=inner, unit='%' | 'degree'):
      return value(inner)
    case tree.Call(name='neg', args=(inner,)) if not isinstance(inner, tree.Unit):
      size = value(inner)
      return None if size is None else -size
    case tree.Call(name='div', args=(top, bottom)):
      above, below = _plain_value(top), _plain_value(bottom)
      return None if above is None or not below else above / below
    case tree.Call(name='mixed', args=(tree.Number() as whole, tree.Number() as top,
                                       tree.Number() as bottom)):
      return whole.value + top.value / bottom.value
  return None


def _plain_value(node: tree.Node) -> fractions.Fraction | None:
  """The value of a number alone, with or without a minus sign; None of all else."""
  if isinstance(node, tree.Call):
    inner = node.args[0]
    return -inner.value if node.name == 'neg' and isinstance(inner, tree.Number) else None
  return node.value if isinstance(node, tree.Number) else None


def last(text: str) -> str | None:
  """The last number of a text, or None where its last digits are a part of something else."""
  end = max((i for i in map(text.rfind, '0123456789') if i >= 0), default=-1)
  if not text.isascii():
    end = next((i for i in range(len(text) - 1, -1, -1) if text[i].isdecimal()
                or text[i] in '½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞'), end)
  if end < 0:
    return None
  start = max(0, end - WINDOW)
  shown = answer_text.unified(text[start:end + WINDOW])
  matches = list(_NUMBER.finditer(shown))
  if not matches:
    return None
  match = matches[-1]
  if start and not match.start():
    return None  # The number is longer than any answer.
  return _standing(shown, match)


def _standing(shown: str, match: re.Match[str]) -> str | None:
  """The number as it stands in its sentence, or None if it does not stand for itself."""
  found, begin = match['number'], match.start('number')
  before, after = shown[:begin], shown[match.end():]
  if match['sign']:
    before = shown[:match.start()]
    if match['sign'] == '-' and _HYPHEN_BEFORE.search(before):
      before = ''  # In "10-12" and "covid-19" the hyphen is no minus sign.
    elif re.search(r'(?:\w|[\d)\]}]\s*)\Z', before):
      return None  # The number is a part of a difference or a sum.
    else:
      found = match['sign'] + found
  if _DENIED_BEFORE.search(before) or _is_part(before, after):
    return None
  equation = _EQUATION.search(before[-200:])
  if equation and not _is_true(equation[1], found):
    return None
  if percent := re.match(r'\s*\\?%', after):
    found += percent[0]
  return found


def _is_part(before: str, after: str) -> bool:
  """Whether the digits between `before` and `after` are a part of a formula or a name."""
  if _JOINED_BEFORE.search(before) and not before.rstrip().endswith('**'):
    return True
  if _GLUED_BEFORE.search(before) and before[-1:].isascii():
    return True
  joined = _JOINED_AFTER.match(after)
  if joined is None or after.startswith('**'):
    return False
  word = re.match(r'[^\W\d_]+', after)  # A unit makes no formula: 5km, 42个.
  return not (word and (word[0] in answer_units.UNITS or not word[0].isascii()))


def _is_true(left: str, right: str) -> bool:
  """Whether `left = right` is not a false equation of two numbers."""
  left_value, right_value = _worked_out(left), number(right)
  return left_value is None or right_value is None or left_value == right_value


def _worked_out(text: str) -> fractions.Fraction | None:
  try:
    return answer_evaluate.value(answer_parse.parse(answer_text.undressed(text))).rational
  except (NotUnderstood, TooLarge, RecursionError, answer_value.Undefined):
    return None
