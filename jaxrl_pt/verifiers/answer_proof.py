"""Proofs by sympy that values with functions, nested roots and powers of sums are equal.

sympy never gets text, only expressions that are built here, node by node, from values that our
grammar has read. Two values that differ in their first DIGITS digits are different; other values
are equal only if sympy proves it, so that nothing is decided by rounding.
"""

from collections.abc import Callable
from typing import Any
import zlib

from jaxrl_pt.verifiers import answer_value as values
from jaxrl_pt.verifiers.answer_value import Fraction, Value

DIGITS = 40
MAX_SIZE = 4000.0  # The largest argument of exp: a greater one leaves no digits to compare.
NUM_POINTS = 3  # At how many points values with letters are compared before a proof.


def is_proved(left: Value, right: Value) -> bool:
  """Whether left = right is proved.

  It needs sympy, and may take so long that it must run in a process with a time limit.
  """
  import mpmath
  letters = sorted(a[1] for a in values.atoms(left) | values.atoms(right) if a[0] == 'symbol')
  with mpmath.workdps(2 * DIGITS):
    for point in range(NUM_POINTS if letters else 1):
      places = {name: _place(name, point) for name in letters}
      try:
        a, b = _number(left, places), _number(right, places)
      except (ArithmeticError, ValueError):
        return False  # There are no digits to compare.
      if not abs(a - b) <= mpmath.mpf(10) ** -DIGITS * max(abs(a), abs(b)):
        return False
  return _is_zero(_expression(left) - _expression(right))


def _is_zero(difference: Any) -> bool:
  """Whether a difference whose first digits are 0 is proved to be 0.

  The proof rewrites it or, if it is an algebraic number, finds its minimal polynomial.
  """
  import sympy
  if sympy.simplify(difference) == 0:
    return True
  if difference.free_symbols:
    return False
  if difference.has(sympy.asin, sympy.acos, sympy.atan):
    # If its sine is 0 it is a multiple of π, and as it is nearly 0 it is 0.
    return bool(sympy.simplify(sympy.expand_trig(sympy.sin(difference))) == 0)
  if not difference.is_algebraic:
    return False
  unknown = sympy.Dummy('x')
  return bool(sympy.minimal_polynomial(difference, unknown) == unknown)


def _place(name: str, point: int) -> Fraction:
  """The value of a letter at a point: positive, not whole, another for each name and point."""
  return 1 + Fraction(zlib.crc32(f'{name} {point}'.encode()), 2 ** 31)


# --- From values to numbers and to sympy ---------------------------------------------


def _number(value: Value, places: dict[str, Fraction]) -> Any:
  """The value in floating point of mpmath's working precision.

  Args:
    value: the value.
    places: the value of each letter.

  Raises:
    ArithmeticError, ValueError: it has no value, or one that is too large.
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
  """The value as a sympy expression, in which letters are real."""
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
