"""The tree of an answer, as `answer_parse` builds it, and what is done with trees alone."""

from dataclasses import dataclass
import fractions


@dataclass(frozen=True)
class Number:
  """A number that is written out; is_digits: as digits alone."""

  value: fractions.Fraction
  is_digits: bool = False


@dataclass(frozen=True)
class Symbol:
  """A letter with its index, `x` or `x_1`; also `∞` and `∅`, sets such as `R`."""

  name: str


@dataclass(frozen=True)
class Call:
  """An operation: add, neg, mul, div, pow, mixed, pm, mp, root, a function, …"""

  name: str
  args: tuple['Node', ...]


@dataclass(frozen=True)
class Row:
  """Several values. kind: 'list' (no order), 'set', 'union', 'ratio', 'matrix', or its brackets,
  '(]', in order."""

  kind: str
  items: tuple['Node', ...]


@dataclass(frozen=True)
class Relation:
  """Sides with an operator between each two; an empty first side is None."""

  operators: tuple[str, ...]
  sides: tuple['Node | None', ...]


@dataclass(frozen=True)
class Unit:
  """A value with a unit, in its one writing; '%' and 'degree' are units too."""

  value: 'Node'
  unit: str


@dataclass(frozen=True)
class Word:
  """An answer that is a word or a name."""

  text: str


Node = Number | Symbol | Call | Row | Relation | Unit | Word


def product(factors: list[Node]) -> Node:
  """The product of factors, from the left."""
  value = factors[0]
  for other in factors[1:]:
    value = Call('mul', (value, other))
  return value


def total(terms: list[Node]) -> Node:
  """The sum of many terms, as deep as its logarithm."""
  if len(terms) == 1:
    return terms[0]
  middle = len(terms) // 2
  return Call('add', (total(terms[:middle]), total(terms[middle:])))


def signed(sign: str, value: Node) -> Node:
  """A term behind +, −, ± or ∓."""
  if sign == '+':
    return value
  return Call({'-': 'neg'}.get(sign, sign), (value,))


def with_mark(value: Node) -> Node:
  """A percent or degree sign of the whole side is its unit."""
  if isinstance(value, Call) and value.name in ('percent', 'degree'):
    return Unit(value.args[0], {'percent': '%'}.get(value.name, value.name))
  if isinstance(value, Call) and value.name == 'neg':
    inner = with_mark(value.args[0])
    if isinstance(inner, Unit):
      return Unit(Call('neg', (inner.value,)), inner.unit)
  return value


def is_of_numbers(node: Node) -> bool:
  """Whether a quotient is of two numbers."""
  return isinstance(node, Call) and all(isinstance(a, Number) for a in node.args)


def with_both_signs(node: Node) -> Node:
  """Two values where a ± stands: the upper signs, then the lower ones."""
  if not _has_sign(node):
    return node
  return Row('list', (_chosen(node, True), _chosen(node, False)))


def _has_sign(node: Node) -> bool:
  match node:
    case Call(name=name, args=args):
      return name in ('pm', 'mp') or any(map(_has_sign, args))
    case Unit(value=value):
      return _has_sign(value)
  return False


def _chosen(node: Node, is_upper: bool) -> Node:
  match node:
    case Call(name='pm' | 'mp', args=(value,)):
      inner = _chosen(value, is_upper)
      return inner if is_upper == (node.name == 'pm') else Call('neg', (inner,))
    case Call(name=name, args=args):
      return Call(name, tuple(_chosen(a, is_upper) for a in args))
    case Unit(value=value, unit=unit):
      return Unit(_chosen(value, is_upper), unit)
  return node
