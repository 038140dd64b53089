r"""Parses answers into trees, by a small grammar that understands the whole text or nothing.

    answer    parts with `,`, `;`, `and` or `or` between them; or numbers with spaces between them
    part      relation of sides: `x = 5`, `1 < x \le 3`, `\ne 7`, `x \in [1, 2)`
    side      sum, or union of sets, with a unit behind it: `5\text{ cm}`, `50\%`, `30^\circ`
    sum       terms with +, − or ± between them
    term      factors with ×, ·, / or nothing between them
    factor    primary with !, ^, _ or %
    primary   number, letter, bracket, \frac, \sqrt, …

`1 1/2` and `1\frac{1}{2}` are mixed numbers. A text that may be read in two ways (`1/2x`,
`\sqrt23`, `\sin x/2`) is not understood.
"""

from jaxrl_pt.verifiers import answer_tokens, answer_units
from jaxrl_pt.verifiers.answer_formula import Formulas
from jaxrl_pt.verifiers.answer_tokens import NotUnderstood
from jaxrl_pt.verifiers.answer_tree import (
  Node,
  Number,
  Relation,
  Row,
  Unit,
  Word,
  with_both_signs,
  with_mark,
)

RELATIONS = {'=': '=', '<': '<', '>': '>', 'le': '<=', 'ge': '>=', 'ne': '!=', 'lt': '<',
             'gt': '>', 'in': 'in', 'approx': '~', 'equiv': '==', 'sim': '~', 'notin': '!in',
             'not': '!'}


def parse(text: str) -> Node:
  """The tree of an answer.

  Raises:
    NotUnderstood: some of the text has no meaning, or two.
    TooLarge: brackets are too deep, or a number's exponent is too large.
  """
  tokens = answer_tokens.tokens(text)
  if not tokens:
    raise NotUnderstood('nothing')
  if len(tokens) == 1 and tokens[0].kind == 'word':
    return Word(tokens[0].text)
  try:
    return _whole(_Parser(tokens))
  except NotUnderstood:
    # 2 5 and 12% 34% are several numbers, which must not become one.
    numbers = tuple(Number(t.value) for t in tokens if t.kind == 'number')
    if len(numbers) > 1 and all(t.kind == 'number' or t.text == '%' for t in tokens):
      return Row('list', numbers)
    raise


def _whole(parser: '_Parser') -> Node:
  tree = parser.row(('end',))
  parser.take('end')
  return tree


class _Parser(Formulas):
  """The parser of the whole grammar."""

  def row(self, closing: tuple[str, ...]) -> Node:
    """Reads parts up to a closing bracket, which stays. A single part makes no row."""
    parts = [self.part()]
    while not self.is_next(*closing):
      if not self._separator():
        raise NotUnderstood(self.next.text)
      parts.append(self.part())
    flat: list[Node] = []
    for part in parts:
      flat += part.items if isinstance(part, Row) and part.kind == 'list' else [part]
    return flat[0] if len(flat) == 1 else Row('list', tuple(flat))

  def _separator(self) -> bool:
    is_comma = self.accept(',', ';')
    is_word = (self.next.kind == 'word'
               and self.next.text.lower() in answer_tokens.SEPARATORS)
    self.place += is_word
    return is_comma or is_word

  def part(self) -> Node:
    """Reads a relation, or a side alone."""
    sides: list[Node | None] = []
    operators: list[str] = []
    sides.append(None if self.next.text in RELATIONS and self.next.kind in ('sign', 'command')
                 else self.side())
    while self.next.kind in ('sign', 'command') and self.next.text in RELATIONS:
      operator = RELATIONS[self.next.text]
      self.place += 1
      if operator == '!':
        operator = '!' + RELATIONS.get(self.next.text, '?')
        self.place += 1
      operators.append(operator)
      sides.append(self.side())
    if not operators:
      assert sides[0] is not None
      return with_both_signs(sides[0])
    if len(sides) == 2 and operators == ['='] and sides[1] is not None:
      both = with_both_signs(sides[1])
      if isinstance(both, Row) and both.kind == 'list':  # x = ±3
        return Row('list', tuple(Relation(('=',), (sides[0], value)) for value in both.items))
    return Relation(tuple(operators), tuple(sides))

  def side(self) -> Node:
    """Reads a sum, a ratio or a union, with its unit."""
    if (prefix := self.next).kind == 'word' and prefix.text in answer_units.CURRENCIES:
      self.place += 1
      return Unit(self.sum(), answer_units.CURRENCIES[prefix.text])
    first = self._with_unit(self.sum())
    for sign, kind in ((':', 'ratio'), ('cup', 'union')):
      if self.is_next(sign):
        items = [first]
        while self.accept(sign):
          items.append(self.sum())
        return Row(kind, tuple(items))
    return first

  def _with_unit(self, value: Node) -> Node:
    unit, count = answer_units.read(self.tokens[self.place:])
    if unit is None:
      return with_mark(value)
    self.place += count
    return Unit(value, unit)
