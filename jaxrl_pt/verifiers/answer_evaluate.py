"""Turns trees into values by their operations and functions, after a bound on what these cost."""

from collections.abc import Callable
from dataclasses import dataclass
import math

from jaxrl_pt.verifiers import answer_tree as tree
from jaxrl_pt.verifiers.answer_tokens import TooLarge
from jaxrl_pt.verifiers.answer_value import (
  MAX_BITS,
  MAX_EXPANDED,
  ONE,
  Fraction,
  Undefined,
  Value,
  add,
  atom,
  constant,
  divide,
  multiply,
  negative,
  power,
  prime_factors,
  total,
)

MAX_WORK = 40_000  # The largest `_Cost.work` of an expression.
_ODD = ('sin', 'tan', 'cot', 'csc', 'arcsin', 'arctan', 'sinh', 'tanh')
_EVEN = ('cos', 'sec', 'cosh')

# --- Functions ------------------------------------------------------------------------


def _logarithm(value: Value) -> Value:
  """ln of a value: a sum over primes where it is a positive product of known atoms, else opaque."""
  if not value.top:
    raise Undefined('the logarithm of 0')
  single = value.monomial
  if single is None or single[1] <= 0 or any(a[0] not in ('prime', 'constant') or a == (
      'constant', 'pi') for a, _ in single[0]):
    return atom('function', 'ln', value)
  monomial, coefficient = single
  if coefficient.numerator.bit_length() + coefficient.denominator.bit_length() > 400:
    raise TooLarge('a logarithm')
  counts = [*((p, Fraction(k)) for p, k in prime_factors(coefficient.numerator)),
            *((p, -Fraction(k)) for p, k in prime_factors(coefficient.denominator)),
            *((a[1], e) for a, e in monomial if a[0] == 'prime')]
  terms = [multiply(constant(k), atom('function', 'ln', constant(p))) for p, k in counts]
  terms += [constant(e) for a, e in monomial if a[0] == 'constant']
  return total(terms)


def _factorial(value: Value) -> Value:
  number = value.rational
  if number is None:
    return atom('function', 'factorial', value)
  if number.denominator != 1 or number < 0:
    raise Undefined('a factorial')
  if number > 10_000 or number * int(number).bit_length() > MAX_BITS:
    raise TooLarge('a factorial')
  return constant(math.factorial(int(number)))


def _binomial(top: Value, bottom: Value) -> Value:
  n, k = top.rational, bottom.rational
  if n is None or k is None:
    return atom('function', 'binom', top, bottom)
  if n.denominator * k.denominator != 1 or n < 0 or k < 0:
    raise Undefined('a binomial')
  if n > 10_000 or min(k, abs(n - k)) * int(n).bit_length() > MAX_BITS:
    raise TooLarge('a binomial')
  return constant(math.comb(int(n), int(k)))


def _absolute(value: Value) -> Value:
  number = value.rational
  return atom('function', 'abs', value) if number is None else constant(abs(number))


def _rounded(name: str, value: Value) -> Value:
  number = value.rational
  if number is None:
    return atom('function', name, value)
  return constant(math.floor(number) if name == 'floor' else math.ceil(number))


def _of_integers(function: Callable[..., int], values: list[Value]) -> Value:
  numbers = [v.rational for v in values]
  if any(n is None or n.denominator != 1 for n in numbers):
    raise Undefined('of integers only')
  return constant(function(*(int(n) for n in numbers if n is not None)))


def _with_parity(name: str, values: list[Value]) -> Value:
  """An opaque function with a normalised sign: sin −x is −sin x, arccos −x is π − arccos x."""
  if name in (*_ODD, *_EVEN, 'arccos') and values[0].top and values[0].top[0][1] < 0:
    turned = atom('function', name, negative(values[0]))
    if name == 'arccos':
      return add(atom('constant', 'pi'), negative(turned))
    return turned if name in _EVEN else negative(turned)
  return atom('function', name, *values)


def _function(name: str, values: list[Value]) -> Value:
  match name:
    case 'ln':
      return _logarithm(values[0])
    case 'log' | 'lg':  # The base is 10 if none is given.
      base = values[1] if len(values) > 1 else constant(10)
      return divide(_logarithm(values[0]), _logarithm(base))
    case 'exp':
      return power(atom('constant', 'e'), values[0])
    case 'factorial':
      return _factorial(values[0])
    case 'binom':
      return _binomial(values[0], values[1])
    case 'abs':
      return _absolute(values[0])
    case 'floor' | 'ceil':
      return _rounded(name, values[0])
    case 'gcd' | 'lcm':
      return _of_integers(math.gcd if name == 'gcd' else math.lcm, values)
    case 'min' | 'max':
      numbers = [v.rational for v in values]
      known = [n for n in numbers if n is not None]
      if len(known) == len(numbers):
        return constant(min(known) if name == 'min' else max(known))
  return _with_parity(name, values)


# --- Trees ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cost:
  """A bound on a value before it is worked out: its terms, their total size, and all the work."""

  terms: int = 1
  size: int = 1
  work: int = 1

  def times(self, other: '_Cost') -> '_Cost':
    size = self.terms * other.size + other.terms * self.size
    return self._bounded(self.terms * other.terms, size, self.work + other.work + size)

  def plus(self, other: '_Cost') -> '_Cost':
    size = self.size + other.size
    return self._bounded(self.terms + other.terms, size, self.work + other.work + size)

  def _bounded(self, terms: int, size: int, work: int) -> '_Cost':
    if work > MAX_WORK:
      raise TooLarge('work')
    return _Cost(terms, size, work)


def _cost(node: tree.Node) -> tuple[_Cost, bool]:
  """The bound, and whether the value is a rational number, which is always a single term."""
  if isinstance(node, tree.Unit):
    return _cost(node.value)
  if not isinstance(node, tree.Call):
    return _Cost(), isinstance(node, tree.Number)
  costs, are_rational = zip(*map(_cost, node.args), strict=True)
  total = costs[0]
  if all(are_rational) and node.name not in ('root', 'ln', 'log', 'degree', 'exp'):
    return _Cost(1, 1, 1 + sum(c.work for c in costs)), node.name != 'pow' or _is_whole(node)
  if node.name == 'pow' and isinstance(node.args[1], tree.Number):
    count = node.args[1].value
    if count.denominator == 1 and total.terms > 1 and 1 < count <= MAX_EXPANDED:
      for _ in range(int(count) - 1):
        total = total.times(costs[0])
      return total, False
  if node.name in ('mul', 'div'):
    return costs[0].times(costs[1]), False
  if node.name in ('add', 'mixed'):
    return costs[0].plus(costs[1]), False
  if node.name in ('neg', 'percent', 'degree'):
    return total, False
  for other in costs[1:]:
    total = total.plus(other)
  return _Cost(1, 2 * total.size + 1, total.work + total.size), False


def _is_whole(node: tree.Call) -> bool:
  exponent = node.args[1]
  while isinstance(exponent, tree.Call) and exponent.name == 'neg':
    exponent = exponent.args[0]
  return isinstance(exponent, tree.Number) and exponent.value.denominator == 1


_BINARY = {'add': add, 'mul': multiply, 'div': divide, 'pow': power}


def value(node: tree.Node) -> Value:
  """The value of an expression.

  Raises:
    Undefined: it has no value: it divides by 0, has infinity inside, or is no expression.
    TooLarge: it would take too many digits or terms to work out.
  """
  _cost(node)
  return _value(node)


def _value(node: tree.Node) -> Value:
  match node:
    case tree.Number(value=number):
      return constant(number)
    case tree.Symbol(name='π' | 'e'):
      return atom('constant', {'π': 'pi'}.get(node.name, 'e'))
    case tree.Symbol(name='i'):
      return atom('i')
    case tree.Symbol(name='∞' | '∅'):
      raise Undefined(node.name)
    case tree.Symbol(name=name):
      return atom('symbol', name)
    case tree.Unit(value=inner, unit='%'):
      return divide(_value(inner), constant(100))
    case tree.Unit(value=inner, unit='degree'):
      return _value(tree.Call('degree', (inner,)))
    case tree.Call(name=name, args=args):
      return _operation(name, [_value(a) for a in args])
  raise Undefined('no expression')


def _operation(name: str, values: list[Value]) -> Value:
  if name in _BINARY:
    return _BINARY[name](values[0], values[1])
  match name:
    case 'neg':
      return negative(values[0])
    case 'mixed':
      return add(values[0], divide(values[1], values[2]))
    case 'root':
      return power(values[0], divide(ONE, values[1]))
    case 'percent':
      return divide(values[0], constant(100))
    case 'degree':
      return multiply(values[0], divide(atom('constant', 'pi'), constant(180)))
  return _function(name, values)
