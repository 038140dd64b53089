"""Equality of values with functions, nested roots and powers of sums, by sympy.

sympy gets expressions that are built here, node by node, from values that our grammar read;
never text. Two values that differ in their first digits are different; those that agree in
DIGITS digits are equal only if sympy proves it, so that nothing is rounded.
"""

from collections.abc import Callable
from typing import Any
import zlib

from jaxrl_pt.verifiers import answer_value as values
from jaxrl_pt.verifiers.answer_value import Fraction, Value

DIGITS = 40
MAX_SIZE = 4000.0  # of an argument of exp: what is greater has no digits to compare
NUM_POINTS = 3  # at which values with letters are compared first


def is_proved(left: Value, right: Value) -> bool:
  """Whether left = right is proved. Needs sympy; may take long: call it in a bounded process."""
  import mpmath
  letters = sorted(a[1] for a in values.atoms(left) | values.atoms(right) if a[0] == 'symbol')
  with mpmath.workdps(2 * DIGITS):
    for point in range(NUM_POINTS if letters else 1):
      places = {name: _place(name, point) for name in letters}
      try:
        a, b = _number(left, places), _number(right, places)
      except (ArithmeticError, ValueError):
        return False  # no digits to compare
      if not abs(a - b) <= mpmath.mpf(10) ** -DIGITS * max(abs(a), abs(b)):
        return False
  return _is_zero(_expression(left) - _expression(right))


def _is_zero(difference: Any) -> bool:
  """Whether what is 0 in its first digits is 0: proved by rewriting or, of algebraic numbers, by
  the minimal polynomial."""
  import sympy
  if sympy.simplify(difference) == 0:
    return True
  if difference.free_symbols:
    return False
  if difference.has(sympy.asin, sympy.acos, sympy.atan):
    # Nearly 0, as is known here, and a multiple of π: 0.
    return bool(sympy.simplify(sympy.expand_trig(sympy.sin(difference))) == 0)
  if not difference.is_algebraic:
    return False
  unknown = sympy.Dummy('x')
  return bool(sympy.minimal_polynomial(difference, unknown) == unknown)


def _place(name: str, point: int) -> Fraction:
  """Where a letter is tried: positive, not whole, another for each name and point."""
  return 1 + Fraction(zlib.crc32(f'{name} {point}'.encode()), 2 ** 31)


# --- From values to numbers and to sympy ---------------------------------------------


def _number(value: Value, places: dict[str, Fraction]) -> Any:
  """The value in floating point of the working precision.

  Raises:
    ArithmeticError, ValueError: it has none, or too large a one.
  """
  import mpmath

  def fraction(q: Fraction) -> Any:
    return mpmath.mpf(q.numerator) / mpmath.mpf(q.denominator)

  def bounded(x: Any) -> Any:
    if not abs(x) < MAX_SIZE:
      raise OverflowError('too large to compare')
    return x

  def power(base: Any, exponent: Any) -> Any:
    if base:
      bounded(abs(mpmath.log(base)) * exponent)
    return base ** exponent

  functions = {name: getattr(mpmath, name) for name in (
      'sin', 'cos', 'tan', 'cot', 'sec', 'csc', 'sinh', 'cosh', 'tanh', 'ln', 'floor', 'ceil',
      'factorial')}
  functions |= {'arcsin': mpmath.asin, 'arccos': mpmath.acos, 'arctan': mpmath.atan, 'abs': abs,
                'binom': mpmath.binomial, 'min': min, 'max': max, 'pow': power}

  def of_atom(name: values.Atom, exponent: Fraction) -> Any:
    match name:
      case ('symbol', letter):
        base = fraction(places[letter])
      case ('constant', which):
        base = {'pi': +mpmath.pi, 'e': +mpmath.e}[which]
      case ('prime', prime):
        base = mpmath.mpf(prime)
      case ('i',):
        base = mpmath.mpc(0, 1)
      case ('root' | 'power', top, bottom):
        base = of_value(Value(top, bottom))
        if not isinstance(base, mpmath.mpc) and base < 0 and exponent.denominator % 2:
          return (-1) ** exponent.numerator * power(-base, fraction(exponent))
      case ('symbolic', inner, letters):
        exponent_of = of_value(Value(((letters, Fraction(1)),), values.ONE.top))
        return power(of_value(inner), exponent_of * fraction(exponent))
      case ('function', which, *args):
        base = functions[which](*(bounded(of_value(a)) for a in args))
    return power(base, fraction(exponent))

  def of_value(v: Value) -> Any:
    sums = []
    for poly in (v.top, v.bottom):
      total = mpmath.mpf(0)
      for monomial, coefficient in poly:
        term = fraction(coefficient)
        for name, exponent in monomial:
          term *= of_atom(name, exponent)
        total += term
      sums.append(total)
    return sums[0] / sums[1]

  return of_value(value)


def _expression(value: Value) -> Any:
  """The value as a sympy expression; letters are real."""
  import sympy

  def rational(q: Fraction) -> Any:
    return sympy.Rational(q.numerator, q.denominator)

  def bracketed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: function(x)

  functions = {name: getattr(sympy, name) for name in (
      'sin', 'cos', 'tan', 'cot', 'sec', 'csc', 'sinh', 'cosh', 'tanh', 'factorial', 'floor')}
  functions |= {'ln': sympy.log, 'ceil': bracketed(sympy.ceiling), 'arcsin': sympy.asin,
                'arccos': sympy.acos, 'arctan': sympy.atan, 'abs': sympy.Abs,
                'binom': sympy.binomial, 'min': sympy.Min, 'max': sympy.Max, 'pow': sympy.Pow}

  def of_atom(name: values.Atom, exponent: Fraction) -> Any:
    match name:
      case ('symbol', letter):
        base = sympy.Symbol(letter, real=True)
      case ('constant', which):
        base = {'pi': sympy.pi, 'e': sympy.E}[which]
      case ('prime', prime):
        base = sympy.Integer(prime)
      case ('i',):
        base = sympy.I
      case ('root' | 'power', top, bottom):
        base = of_value(Value(top, bottom))
        if base.is_negative and exponent.denominator % 2:
          return (-1) ** exponent.numerator * sympy.Pow(-base, rational(exponent))
      case ('symbolic', inner, letters):
        exponent_of = of_value(Value(((letters, Fraction(1)),), values.ONE.top))
        return sympy.Pow(of_value(inner), exponent_of * rational(exponent))
      case ('function', which, *args):
        base = functions[which](*map(of_value, args))
    return sympy.Pow(base, rational(exponent))

  def of_value(v: Value) -> Any:
    top, bottom = (sympy.Add(*(rational(c) * sympy.Mul(*(of_atom(a, e) for a, e in m))
                               for m, c in poly)) for poly in (v.top, v.bottom))
    return top / bottom

  return of_value(value)
