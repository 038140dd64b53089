r"""Exact values of expressions: quotients of polynomials with rational coefficients.

The indeterminates, `atoms`, are letters, π, e, i, roots of primes p^{r} with 0 < r < 1, and opaque
atoms, which are not worked out: functions of a value, powers and roots of sums. Products of roots
of primes are linearly independent over the rationals. Two values without opaque atoms are therefore
equal exactly if their forms are. No step rounds, and none makes different values equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
import fractions
import functools
import math
from typing import Any

from jaxrl_pt.verifiers.answer_tokens import TooLarge

Fraction = fractions.Fraction
Atom = tuple[Any, ...]
# Atoms with their exponents, in order, none of which is 0.
Monomial = tuple[tuple[Atom, Fraction], ...]
Poly = Mapping[Monomial, Fraction]

MAX_BITS = 60_000  # Bits of a number that is worked out; 3^{2023} has 3,207 and 2024! has 19,000.
MAX_TERMS = 600
MAX_FACTOR = 1 << 16  # Trial division stops here.
MAX_EXPANDED = 16  # Sums are multiplied out up to this power.
OPAQUE = ('function', 'root', 'power', 'symbolic')  # tags of atoms that may hide an equality


class Undefined(Exception):
  """The expression has no value: 1/0, 0^0, ∞ − ∞, the logarithm of 0."""


@dataclass(frozen=True)
class Value:
  """top / bottom; `bottom` is 1 where it would be a single monomial."""

  top: tuple[tuple[Monomial, Fraction], ...]
  bottom: tuple[tuple[Monomial, Fraction], ...]

  @property
  def rational(self) -> Fraction | None:
    """The value if it is a rational number."""
    if not self.top:
      return Fraction(0)
    is_rational = self.bottom == ONE.top and len(self.top) == 1 and not self.top[0][0]
    return self.top[0][1] if is_rational else None

  @property
  def monomial(self) -> tuple[Monomial, Fraction] | None:
    """The value if it is one coefficient times atoms."""
    return self.top[0] if self.bottom == ONE.top and len(self.top) == 1 else None


@functools.lru_cache(maxsize=4096)
def _order(item: Any) -> str:
  """A key by which monomials and atoms are sorted: any order that is the same for equal ones."""
  match item:
    case fractions.Fraction():
      return f'{item.numerator:x}/{item.denominator:x}'  # Decimal digits would take quadratic time.
    case tuple():
      return f'({",".join(map(_order, item))})'
    case Value(top=top, bottom=bottom):
      return f'{_order(top)}:{_order(bottom)}'
  return str(item)


def _by_monomial(term: tuple[Monomial, Fraction]) -> str:
  return _order(term[0])


def _frozen(poly: Poly) -> tuple[tuple[Monomial, Fraction], ...]:
  kept = [(m, c) for m, c in poly.items() if c]
  if len(kept) > MAX_TERMS:
    raise TooLarge('terms')
  if any(c.numerator.bit_length() + c.denominator.bit_length() > 2 * MAX_BITS for _, c in kept):
    raise TooLarge('digits')
  return tuple(sorted(kept, key=_by_monomial))


ONE = Value((((), Fraction(1)),), (((), Fraction(1)),))


def constant(number: Fraction | int) -> Value:
  """A rational number as a value."""
  return Value(_frozen({(): Fraction(number)}), ONE.top)


def atom(*name: Any) -> Value:
  """A single atom as a value."""
  return Value(((((name, Fraction(1)),), Fraction(1)),), ONE.top)


def quotient(top: Poly, bottom: Poly) -> Value:
  """top / bottom as a value in normal form.

  Raises:
    Undefined: `bottom` is 0.
  """
  below = _frozen(bottom)
  if not below:
    raise Undefined('division by 0')
  if len(below) == 1:  # A single monomial divides every term.
    (letters, coefficient), = below
    inverse = tuple((a, -e) for a, e in letters)
    return total([_monomial([*m, *inverse], c / coefficient) for m, c in top.items()])
  scale = below[0][1]
  return Value(_frozen({m: c / scale for m, c in top.items()}),
               tuple((m, c / scale) for m, c in below))


def _monomial(factors: list[tuple[Atom, Fraction]], coefficient: Fraction) -> Value:
  """coefficient · Π atom^exponent, with equal atoms joined and whole powers worked out."""
  exponents: dict[Atom, Fraction] = {}
  for name, exponent in factors:
    exponents[name] = exponents.get(name, Fraction(0)) + exponent
  kept: list[tuple[Atom, Fraction]] = []
  expanded: list[Value] = []
  for name, exponent in exponents.items():
    if name[0] == 'prime':
      whole = math.floor(exponent)
      coefficient *= _power(Fraction(name[1]), whole)
      exponent -= whole
    elif name[0] == 'i':
      turns = int(exponent) % 4
      coefficient, exponent = coefficient * (-1) ** (turns // 2), Fraction(turns % 2)
    elif name[0] == 'root':
      whole = math.floor(exponent)
      exponent -= whole
      if whole:
        expanded.append(power(Value(name[1], name[2]), constant(whole)))
    if exponent:
      kept.append((name, exponent))
  value = Value(_frozen({tuple(sorted(kept, key=_order)): coefficient}), ONE.top)
  for other in expanded:
    value = multiply(value, other)
  return value


def total(values: list[Value]) -> Value:
  """Σ values."""
  summed: dict[Monomial, Fraction] = {}
  quotients: list[Value] = []
  for value in values:
    if value.bottom != ONE.top:
      quotients.append(value)
      continue
    for m, c in value.top:
      summed[m] = summed.get(m, Fraction(0)) + c
  result = Value(_frozen(summed), ONE.top)
  for value in quotients:
    result = add(result, value)
  return result


def _times(left: Poly, right: Poly) -> Value:
  if len(left) * len(right) > 20 * MAX_TERMS:
    raise TooLarge('terms')
  return total([_monomial([*m, *n], c * d) for m, c in left.items() for n, d in right.items()])


def add(left: Value, right: Value) -> Value:
  """left + right."""
  if left.bottom == right.bottom:
    summed = dict(left.top)
    for m, c in right.top:
      summed[m] = summed.get(m, Fraction(0)) + c
    return quotient(summed, dict(left.bottom))
  return _over(total([_times(dict(left.top), dict(right.bottom)),
                     _times(dict(right.top), dict(left.bottom))]),
               _times(dict(left.bottom), dict(right.bottom)))


def multiply(left: Value, right: Value) -> Value:
  """left · right."""
  return _over(_times(dict(left.top), dict(right.top)),
               _times(dict(left.bottom), dict(right.bottom)))


def divide(left: Value, right: Value) -> Value:
  """left / right."""
  if not right.top:
    raise Undefined('division by 0')
  return _over(_times(dict(left.top), dict(right.bottom)),
               _times(dict(left.bottom), dict(right.top)))


def _over(top: Value, bottom: Value) -> Value:
  if top.bottom == bottom.bottom:
    return quotient(dict(top.top), dict(bottom.top))
  return divide(top, bottom)


def negative(value: Value) -> Value:
  """−value."""
  return Value(tuple((m, -c) for m, c in value.top), value.bottom)


def is_same(left: Value, right: Value) -> bool:
  """Whether the two have the same form, which is exact where neither has opaque atoms."""
  return left == right or not add(left, negative(right)).top


def factor(left: Value, right: Value) -> Fraction | None:
  """The rational q ≠ 0 with left = q · right; None if there is none or one of them is 0."""
  if not left.top or not right.top:
    return None
  q = left.top[0][1] / right.top[0][1]
  return q if is_same(left, multiply(constant(q), right)) else None


def atoms(value: Value) -> set[Atom]:
  """All atoms of a value, including those inside other atoms."""
  found: set[Atom] = set()
  for monomial, _ in (*value.top, *value.bottom):
    for name, _ in monomial:
      found.add(name)
      for inner in _inside(name):
        found |= atoms(inner)
  return found


def _inside(name: Atom) -> list[Value]:
  match name:
    case ('root' | 'power', top, bottom):
      return [Value(top, bottom)]
    case ('symbolic', base, letters):
      return [base, Value(((letters, Fraction(1)),), ONE.top)]
    case ('function', _, *values):
      return list(values)
  return []


# --- Powers -------------------------------------------------------------------------


def _power(base: Fraction, exponent: int) -> Fraction:
  """base^exponent.

  Raises:
    TooLarge: it has too many digits.
    Undefined: it is 0 to a negative power.
  """
  size = max(base.numerator.bit_length(), base.denominator.bit_length())
  if size * abs(exponent) > MAX_BITS and abs(base) != 1 and base:
    raise TooLarge('a power')
  if not base and exponent < 0:
    raise Undefined('division by 0')
  return base ** exponent


@functools.lru_cache(maxsize=1024)
def prime_factors(number: int) -> tuple[tuple[int, int], ...]:
  """Prime factors of a positive integer with their multiplicities.

  A cofactor without small prime factors counts as a prime, or as the square of one.
  """
  factors, divisor = [], 2
  while divisor * divisor <= number and divisor < MAX_FACTOR:
    count = 0
    while number % divisor == 0:
      number, count = number // divisor, count + 1
    if count:
      factors.append((divisor, count))
    divisor += 1 + (divisor > 2)
  if number > 1:
    root = math.isqrt(number)
    factors.append((root, 2) if root * root == number else (number, 1))
  return tuple(factors)


def _rational_power(base: Fraction, exponent: Fraction) -> Value:
  """A positive rational to a rational power, as roots of primes."""
  if base.numerator.bit_length() + base.denominator.bit_length() > 400:
    raise TooLarge('a root')
  factors = [(('prime', p), k * exponent) for p, k in prime_factors(base.numerator)]
  factors += [(('prime', p), -k * exponent) for p, k in prime_factors(base.denominator)]
  return _monomial(factors, Fraction(1))


def power(base: Value, exponent: Value) -> Value:
  """base^exponent; a root of a negative number is the real one where its degree is odd."""
  rational = exponent.rational
  if rational is None:
    return _symbolic_power(base, exponent)
  if not base.top:
    if rational <= 0:
      raise Undefined('0 to a power that is not positive')
    return base
  return (_integer_power(base, int(rational)) if rational.denominator == 1
          else _root(base, rational))


def _integer_power(base: Value, exponent: int) -> Value:
  if abs(exponent) > MAX_BITS:
    raise TooLarge('a power')
  if (single := base.monomial) is not None:
    monomial, coefficient = single
    return _monomial([(a, e * exponent) for a, e in monomial], _power(coefficient, exponent))
  if exponent < 0:
    return divide(ONE, _integer_power(base, -exponent))
  if exponent > MAX_EXPANDED:
    return Value(((((('power', base.top, base.bottom), Fraction(exponent)),), Fraction(1)),),
                 ONE.top)
  value = ONE
  for _ in range(exponent):
    value = multiply(value, base)
  return value


def _root(base: Value, exponent: Fraction) -> Value:
  """base^exponent for a fractional exponent; rational content and positive constants come out."""
  content = _content(base)
  inner = multiply(base, constant(1 / content))
  value = _rational_power(content, exponent)
  if (single := inner.monomial) is not None:
    monomial, sign = single
    outside = [(a, e) for a, e in monomial if a[0] in ('prime', 'constant')]
    value = multiply(value, _monomial([(a, e * exponent) for a, e in outside], Fraction(1)))
    inside = [(a, e) for a, e in monomial if a[0] not in ('prime', 'constant')]
    if sign < 0 and exponent.denominator % 2 == 1:
      value, sign = multiply(value, constant((-1) ** exponent.numerator)), Fraction(1)
    elif sign < 0 and exponent.denominator == 2 and not inside:
      turned = _monomial([(('i',), Fraction(exponent.numerator))], Fraction(1))
      return multiply(value, turned)
    if sign > 0 and not inside:
      return value
    inner = _monomial(inside, sign)
  return multiply(value, _monomial([(('root', inner.top, inner.bottom), exponent)], Fraction(1)))


def _content(value: Value) -> Fraction:
  """The positive rational q for which value / q has coprime whole coefficients."""
  coefficients = [c for _, c in value.top]
  top = math.gcd(*(c.numerator for c in coefficients))
  return Fraction(top, math.lcm(*(c.denominator for c in coefficients)))


def _symbolic_power(base: Value, exponent: Value) -> Value:
  """base^exponent with letters in the exponent, each of whose terms gives a factor of its own."""
  if not base.top:
    raise Undefined('0 to an unknown power')
  if exponent.bottom != ONE.top:
    return atom('function', 'pow', base, exponent)
  rational, single = base.rational, base.monomial
  value = ONE
  for letters, count in exponent.top:
    if not letters:
      value = multiply(value, power(base, constant(count)))
    elif rational is not None and rational > 0:
      factors = [*((p, k) for p, k in prime_factors(rational.numerator)),
                 *((p, -k) for p, k in prime_factors(rational.denominator))]
      value = multiply(value, _monomial(
          [(('symbolic', constant(p), letters), k * count) for p, k in factors], Fraction(1)))
    elif single is not None and single == (((('constant', 'e'), single[0][0][1]),), Fraction(1)):
      value = multiply(value, _monomial(
          [(('symbolic', atom('constant', 'e'), letters), single[0][0][1] * count)],
          Fraction(1)))
    else:
      value = multiply(value, _monomial([(('symbolic', base, letters), count)], Fraction(1)))
  return value
