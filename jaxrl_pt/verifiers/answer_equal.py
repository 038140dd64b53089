r"""Whether a stated answer equals the true one, both as trees.

A stated answer may lack what the question often says: the name before an equals sign, a unit, a
percent or degree sign, the brackets of a pair. All that it states must be true: every side of a
chain of equations must equal the others, a relation other than = is no value, and it may have no
letter that the true answer lacks (`0 \cdot x`).
"""

from collections.abc import Callable
import functools

from jaxrl_pt.verifiers import answer_evaluate as evaluate
from jaxrl_pt.verifiers import answer_tokens
from jaxrl_pt.verifiers import answer_tree as tree
from jaxrl_pt.verifiers import answer_value as values
from jaxrl_pt.verifiers.answer_value import Undefined, Value

Fraction = values.Fraction
# (left, right) → whether two values, at least one of them opaque, are proved to be equal.
Proof = Callable[[Value, Value], bool]
Node = tree.Node

_ORDERED = ('()', '(]', '[)', '[]')
_FLIPPED = {'<': '>', '>': '<', '<=': '>=', '>=': '<=', '!=': '!=', '=': '='}
MAX_ITEMS = 60  # Values of an answer, each of which is compared with each.


def is_equal(stated: Node, truth: Node, prove: Proof | None) -> bool:
  """Whether the stated answer equals the true one.

  Args:
    stated, truth: trees of `answer_parse.parse`.
    prove: the proof for values with opaque atoms. With None only numbers that are written out,
      alone or in rows, can be equal, and no expression is worked out.

  Raises:
    TooLarge: a value takes too many digits or terms.
  """
  if prove is None and not (_is_written_out(stated) and _is_written_out(truth)):
    return False
  try:
    return _equal(_set_like(stated), _set_like(truth), prove or (lambda _, __: False))
  except Undefined:
    return False


def _is_written_out(node: Node) -> bool:
  """Whether it needs no working out: `-1.5`, `3/4`, `1 1/2`, `x = 5`, `(1, 2)`, `50\\%`, `x`."""
  match node:
    case tree.Number() | tree.Symbol() | tree.Word():
      return True
    case tree.Call(name='neg', args=(inner,)):
      return isinstance(inner, (tree.Number, tree.Symbol, tree.Call)) and _is_written_out(inner)
    case tree.Call(name='div' | 'mixed', args=args):
      return all(isinstance(a, tree.Number) and a.is_digits for a in args) or node.name == 'mixed'
    case tree.Unit(value=inner):
      return _is_written_out(inner)
    case tree.Row(items=items):
      return all(map(_is_written_out, items))
    case tree.Relation(operators=('=',), sides=(name, side)):
      return side is not None and (name is None or isinstance(name, tree.Symbol)) and (
          _is_written_out(side))
  return False


# --- Rows and relations -----------------------------------------------------------------


def _set_like(node: Node) -> Node:
  r"""The tree with `x > 5` and `x \in (5, \infty)` as the interval, and `= 7` as 7."""
  match node:
    case tree.Row(kind='list' | 'union', items=items):
      return tree.Row(node.kind, tuple(map(_set_like, items)))
    case tree.Relation(operators=('=',), sides=(None, side)) if side is not None:
      return side
    case tree.Relation(operators=('in',), sides=(tree.Symbol() | None, side)) if (
        isinstance(side, (tree.Row, tree.Symbol))):
      return side
    case tree.Relation():
      return _interval(node) or node
  return node


def _interval(relation: tree.Relation) -> Node | None:
  """The interval of a letter that a relation bounds by constants; None of other relations."""
  names = [s for s in relation.sides if isinstance(s, tree.Symbol) and s.name not in 'πe∞']
  bounds = [s for s in relation.sides if s is not None and s not in names]
  operators = relation.operators
  if len(names) != 1 or len(bounds) != len(operators) or not all(map(_is_constant, bounds)):
    return None
  if len(operators) == 2 and relation.sides[1] == names[0]:
    if set(operators) <= {'>', '>='}:
      bounds, operators = bounds[::-1], tuple(_FLIPPED[o] for o in operators[::-1])
    if not set(operators) <= {'<', '<='}:
      return None
    kind = ('[' if operators[0] == '<=' else '(') + (']' if operators[1] == '<=' else ')')
    return tree.Row(kind, tuple(bounds))
  if len(operators) != 1 or operators[0] not in ('<', '<=', '>', '>='):
    return None
  operator = operators[0] if relation.sides[0] == names[0] else _FLIPPED[operators[0]]
  infinity = tree.Symbol('∞')
  if operator in ('<', '<='):
    return tree.Row('(' + (']' if operator == '<=' else ')'),
                    (tree.Call('neg', (infinity,)), bounds[0]))
  return tree.Row(('[' if operator == '>=' else '(') + ')', (bounds[0], infinity))


def _is_constant(node: Node) -> bool:
  return isinstance(node, (tree.Number, tree.Call, tree.Symbol)) and not _letters(node)


def _equal(stated: Node, truth: Node, prove: Proof) -> bool:
  match stated, truth:
    case tree.Relation(), _:
      return _equal_relation(stated, truth, prove)
    case _, tree.Relation():
      return (name := _named(truth)) is not None and _equal(stated, name[1], prove)
    case tree.Row(), tree.Row():
      return _equal_rows(stated, truth, prove)
    case (tree.Row(), _) | (_, tree.Row()):
      pair = _one_value(stated), _one_value(truth)
      return pair[0] is not None and pair[1] is not None and _equal(pair[0], pair[1], prove)
    case tree.Word(text=left), tree.Word(text=right):
      return left.lower() == right.lower()
    case (tree.Word(text=text), other) | (other, tree.Word(text=text)):
      # xy alone is a word, but compared with x · y it is a product.
      product = _product(text)
      return product is not None and _equal_quantities(product, other, prove)
  return _equal_quantities(stated, truth, prove)


def _product(text: str) -> Node | None:
  if not text.isascii() or len(text) > answer_tokens.MAX_LETTERS:
    return None
  return tree.product([tree.Symbol(letter) for letter in text])


def _one_value(node: Node) -> Node | None:
  """The value of a row that means one value: {5} as 5, 3:4 as 3/4; None of other rows."""
  match node:
    case tree.Row(kind='set' | 'list', items=(item,)):
      return item
    case tree.Row(kind='ratio', items=(top, bottom)):
      return tree.Call('div', (top, bottom))
    case tree.Row():
      return None
  return node


def _named(node: Node | None) -> tuple[Node | None, Node] | None:
  r"""(name, value) of `x = 5`, `f(x) = 2x`, `x = 2 + 3 = 5`, `2 + 3 = 5`; None of other relations.

  The value is the last side of a chain, whose other sides `_equal_relation` checks.
  """
  if not isinstance(node, tree.Relation) or set(node.operators) != {'='}:
    return None
  first, last = node.sides[0], node.sides[-1]
  assert last is not None
  if first is not None and _is_name(first) and not (_letters(first) & _letters(last)
                                                    and isinstance(first, tree.Symbol)):
    return first, last
  if any(s is not None and _letters(s) for s in node.sides):
    return None
  return None, last


def _is_name(node: Node) -> bool:
  """Whether it is a letter, or a function's letter with its argument: x, a_1, f(x), P(2)."""
  match node:
    case tree.Symbol(name=name):
      return name not in ('π', '∞', '∅')
    case tree.Call(name='mul', args=(tree.Symbol(), tree.Symbol() | tree.Number())):
      return True
  return False


def _equal_relation(stated: tree.Relation, truth: Node, prove: Proof) -> bool:
  named = _named(stated)
  if named is None:
    return isinstance(truth, tree.Relation) and _same_relation(stated, truth, prove)
  name, side = named
  checked = stated.sides[1 if name is not None else 0:-1]
  if not all(other is not None and _equal(other, side, prove) for other in checked):
    return False  # 5 = 6, and x = 5 = 6
  if not isinstance(truth, tree.Relation):
    return _equal(side, truth, prove)
  wanted = _named(truth)
  if wanted is not None and (name is None or wanted[0] in (None, name)) and (
      _equal(side, wanted[1], prove)):
    return True
  return _same_relation(stated, truth, prove)


def _same_relation(stated: tree.Relation, truth: tree.Relation, prove: Proof) -> bool:
  """Whether they are the same equation or inequality up to a factor, or the same chain.

  If the true answer gives an unknown in numbers, so must the stated one: 2x = 10 is not x = 5.
  """
  wanted = _named(truth)
  if wanted is not None and not _letters(wanted[1]):
    return False
  left, right = _difference(stated), _difference(truth)
  if left is None or right is None:
    return stated.operators == truth.operators and all(
        (a is None) == (b is None) and (a is None or b is None or _equal_quantities(a, b, prove))
        for a, b in zip(stated.sides, truth.sides, strict=True))
  factor = values.factor(left[1], right[1])
  if factor is None:
    return False
  return left[0] == (right[0] if factor > 0 else _FLIPPED[right[0]])


def _difference(relation: tree.Relation) -> tuple[str, Value] | None:
  """(operator, left − right) of a relation of two expressions."""
  if len(relation.sides) != 2 or relation.operators[0] not in _FLIPPED:
    return None
  left, right = relation.sides
  if left is None or right is None:
    return None
  return relation.operators[0], values.add(evaluate.value(left),
                                           values.negative(evaluate.value(right)))


def _equal_rows(stated: tree.Row, truth: tree.Row, prove: Proof) -> bool:
  same = functools.partial(_equal, prove=prove)
  left, right = stated.items, truth.items
  if max(len(left), len(right)) > MAX_ITEMS:
    return False
  kinds = {stated.kind, truth.kind}
  if kinds == {'ratio'}:
    return len(left) == len(right) and all(
        same(tree.Call('mul', (a, right[0])), tree.Call('mul', (b, left[0])))
        for a, b in zip(left, right, strict=True))
  if stated.kind == 'set':  # A set may name an element twice.
    left = _distinct(left, same)
  if truth.kind == 'set':
    right = _distinct(right, same)
  if len(left) != len(right):
    return False
  in_order = all(same(a, b) for a, b in zip(left, right, strict=True))
  if len(kinds) == 1 and stated.kind not in ('list', 'set', 'union'):
    return in_order  # Pairs such as (1, 2) and intervals such as [1, 2) have an order.
  if kinds == {'list', '()'}:  # The brackets of a pair may be left out.
    return in_order
  if kinds <= {'list', 'set'} or kinds <= {'list', 'union'}:
    return in_order or (not _have_names(left) or _have_names(right)) and _is_permuted(
        left, right, same)
  return False


def _have_names(items: tuple[Node, ...]) -> bool:
  """Whether the items give several unknowns: x = 1, y = 2 has an order, x = 1, x = 2 has none."""
  return len({repr(i.sides[0]) for i in items if isinstance(i, tree.Relation)}) > 1


def _distinct(items: tuple[Node, ...], same: Callable[[Node, Node], bool]) -> tuple[Node, ...]:
  kept: list[Node] = []
  for item in items:
    if not any(same(item, other) for other in kept):
      kept.append(item)
  return tuple(kept)


def _is_permuted(left: tuple[Node, ...], right: tuple[Node, ...],
                 same: Callable[[Node, Node], bool]) -> bool:
  unmatched = list(right)
  for item in left:
    place = next((i for i, other in enumerate(unmatched) if same(item, other)), None)
    if place is None:
      return False
    del unmatched[place]
  return True


# --- Quantities ---------------------------------------------------------------------------


def _equal_quantities(stated: Node, truth: Node, prove: Proof) -> bool:
  """Whether two values with units are equal; a unit that only one of them has is ignored."""
  match stated, truth:
    case tree.Unit(value=left, unit=unit), tree.Unit(value=right, unit=other):
      return unit == other and _equal_values(left, right, prove)
    case (tree.Unit(value=inner, unit=unit), bare) | (bare, tree.Unit(value=inner, unit=unit)):
      # The unit's number counts, and for 50% and 30° also 1/2 and π/6.
      is_swapped = isinstance(truth, tree.Unit)
      for worth in (inner, *([tree.Unit(inner, unit)] if unit in ('%', 'degree') else [])):
        if _equal_values(*((bare, worth) if is_swapped else (worth, bare)), prove):
          return True
      return False
  return _equal_values(stated, truth, prove)


def _equal_values(stated: Node, truth: Node, prove: Proof) -> bool:
  infinite = _infinity(stated), _infinity(truth)
  if infinite != (0, 0):
    return infinite[0] == infinite[1]
  if isinstance(stated, tree.Symbol) and isinstance(truth, tree.Symbol):
    # The letter of a choice may be upper or lower case.
    return stated == truth or (len(stated.name) == len(truth.name) == 1 and stated.name.lower(
        ) == truth.name.lower())
  if not _letters(stated) <= _letters(truth):
    return False  # 0 · x is not 0.
  left, right = evaluate.value(stated), evaluate.value(truth)
  if values.is_same(left, right):
    return True
  is_opaque = any(a[0] in values.OPAQUE for a in values.atoms(left) | values.atoms(right))
  return is_opaque and prove(left, right)


def _infinity(node: Node) -> int:
  """1 for ∞, −1 for −∞, 2 for ∅, and 0 for all else."""
  match node:
    case tree.Symbol(name='∞'):
      return 1
    case tree.Symbol(name='∅'):
      return 2
    case tree.Call(name='neg', args=(tree.Symbol(name='∞'),)):
      return -1
  return 0


def _letters(node: Node | None) -> set[str]:
  """Names of the letters in a tree, without constants."""
  match node:
    case tree.Symbol(name=name):
      return {name} - {'π', 'e', 'i', '∞', '∅'}
    case tree.Call(args=parts) | tree.Row(items=parts):
      return set().union(*map(_letters, parts))
    case tree.Unit(value=inner):
      return _letters(inner)
    case tree.Relation(sides=sides):
      return set().union(*map(_letters, sides))
  return set()
