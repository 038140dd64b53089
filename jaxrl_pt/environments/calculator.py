"""A calculator: expressions as `verifiers/answer_parse.py` reads them, never as code.

A rational value is exact; any other is given to 12 digits.
"""

from collections.abc import Callable, Mapping
import fractions
import math

from jaxrl_pt.verifiers import answer_evaluate, answer_parse, answer_text, answer_value
from jaxrl_pt.verifiers import answer_tree as tree
from jaxrl_pt.verifiers.answer_tokens import NotUnderstood, TooLarge

_MAX_CHARS, _MAX_DIGITS = 1000, 400
_FLOATS: Mapping[str, Callable[..., float]] = {
    'add': lambda a, b: a + b, 'mul': lambda a, b: a * b, 'div': lambda a, b: a / b,
    'neg': lambda a: -a, 'pow': math.pow, 'root': lambda a, n: math.pow(a, 1 / n),
    'percent': lambda a: a / 100, 'degree': math.radians, 'mixed': lambda a, b, c: a + b / c,
    'ln': math.log, 'lg': math.log10, 'exp': math.exp, 'abs': abs, 'floor': math.floor,
    'ceil': math.ceil, 'min': lambda *args: min(args), 'max': lambda *args: max(args),
    'sin': math.sin, 'cos': math.cos, 'tan': math.tan,
    'arcsin': math.asin, 'arccos': math.acos, 'arctan': math.atan, 'sinh': math.sinh,
    'cosh': math.cosh, 'tanh': math.tanh}


class CalculatorError(Exception):
  """An expression that cannot be worked out; the message says why."""


def calculate(expression: str) -> str:
  """The value of an expression of numbers, such as '12' for '3*4' and '1/3 = 0.333333333333'.

  Raises:
    CalculatorError: it is too long, is no expression of numbers, or has no value.
  """
  if len(expression) > _MAX_CHARS:
    raise CalculatorError(f'the expression has more than {_MAX_CHARS} characters')
  try:
    node = answer_parse.parse(answer_text.undressed(expression))
    value = answer_evaluate.value(node)
    if any(name[0] == 'symbol' or name[0] == 'i' for name in answer_value.atoms(value)):
      raise CalculatorError('the expression holds a letter: write numbers only')
    rational = value.rational
    return _exact(rational) if rational is not None else f'{_approximate(node):.12g}'
  except (NotUnderstood, RecursionError) as error:
    raise CalculatorError('this is no expression: write numbers with + - * / ^ ( ) and functions '
                          'such as \\sqrt{2}') from error
  except (TooLarge, OverflowError) as error:
    raise CalculatorError('the value has too many digits') from error
  except (answer_value.Undefined, ValueError, ZeroDivisionError) as error:
    raise CalculatorError(f'the expression has no value ({error})') from error


def _exact(value: fractions.Fraction) -> str:
  """A rational number as an integer, a decimal if it ends within 12 digits, or a quotient."""
  if max(value.numerator.bit_length(), value.denominator.bit_length()) > 3.3 * _MAX_DIGITS:
    raise TooLarge('digits')
  if value.denominator == 1:
    return str(value.numerator)
  decimal = f'{float(value):.12g}'
  return decimal if fractions.Fraction(decimal) == value else f'{value} = {decimal}'


def _approximate(node: tree.Node) -> float:
  match node:
    case tree.Number(value=value):
      return float(value)
    case tree.Symbol(name='π' | 'e'):
      return math.pi if node.name == 'π' else math.e
    case tree.Unit(value=inner, unit='%' | 'degree'):
      return _FLOATS['percent' if node.unit == '%' else 'degree'](_approximate(inner))
    case tree.Call(name='log', args=(argument, *base)):
      return math.log(_approximate(argument), *map(_approximate, base or [tree.Number(
          fractions.Fraction(10))]))
    case tree.Call(name=name, args=args) if name in _FLOATS:
      return _FLOATS[name](*map(_approximate, args))
  raise NotUnderstood(repr(node))
