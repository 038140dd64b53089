"""The tree of an answer, as `answer_parse` builds it, and functions from trees to trees."""

from dataclasses import dataclass
import fractions


@dataclass(frozen=True)
class Number:
  """A number that is written out; `is_digits` says that digits alone were written."""

  value: fractions.Fraction
  is_digits: bool = False


@dataclass(frozen=True)
class Symbol:
  """A letter, perhaps with an index (`x`, `x_1`); also `∞`, `∅` and sets such as `R`."""

  name: str


@dataclass(frozen=True)
class Call:
  """An operation: add, neg, mul, div, pow, mixed, pm, mp, root, a function, …"""

  name: str
  args: tuple['Node', ...]


@dataclass(frozen=True)
class Row:
  """Several values.

  kind: 'list' (without order), 'set', 'union', 'ratio', 'matrix', or the two brackets round values
    in order, such as '(]'.
  """

  kind: str
  items: tuple['Node', ...]


@dataclass(frozen=True)
class Relation:
  """Sides with an operator between each two; the first side is None if it is empty."""

  operators: tuple[str, ...]
  sides: tuple['Node | None', ...]


@dataclass(frozen=True)
class Unit:
  """A value with a unit in its canonical spelling; '%' and 'degree' are units too."""

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
  """The sum of the terms, as a balanced tree: many terms must not make it deep."""
  if len(terms) == 1:
    return terms[0]
  middle = len(terms) // 2
  return Call('add', (total(terms[:middle]), total(terms[middle:])))


def signed(sign: str, value: Node) -> Node:
  """The term `value` with the sign +, −, ± or ∓ before it."""
  if sign == '+':
    return value
  return Call({'-': 'neg'}.get(sign, sign), (value,))


def with_mark(value: Node) -> Node:
  """The side with the percent or degree sign of its whole as a unit."""
  if isinstance(value, Call) and value.name in ('percent', 'degree'):
    return Unit(value.args[0], {'percent': '%'}.get(value.name, value.name))
  if isinstance(value, Call) and value.name == 'neg':
    inner = with_mark(value.args[0])
    if isinstance(inner, Unit):
      return Unit(Call('neg', (inner.value,)), inner.unit)
  return value


def is_of_numbers(node: Node) -> bool:
  """Whether it is an operation on numbers alone."""
  return isinstance(node, Call) and all(isinstance(a, Number) for a in node.args)


def with_both_signs(node: Node) -> Node:
  """The list of two values that ± stands for, first with the upper signs, else the node itself."""
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
