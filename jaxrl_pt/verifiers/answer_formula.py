r"""The formulas of the grammar of `answer_parse`: sums, terms, factors and primaries."""

import abc
import fractions

from jaxrl_pt.verifiers import answer_tokens, answer_units
from jaxrl_pt.verifiers.answer_tokens import GREEK, NotUnderstood, Token, TooLarge
from jaxrl_pt.verifiers.answer_tree import (
  Call,
  Node,
  Number,
  Relation,
  Row,
  Symbol,
  Unit,
  is_of_numbers,
  product,
  signed,
  total,
)

MAX_DEPTH = 40
MAX_FACTORS = 40
FUNCTIONS = frozenset('sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp '
                      'min max gcd lcm'.split())
_CLOSING = {'(': ')', '[': ']', r'\{': r'\}', '{': '}'}
_END = Token('sign', 'end')


class Formulas(abc.ABC):
  """A recursive-descent parser whose methods read a part each and stop behind it."""

  def __init__(self, tokens: list[Token]) -> None:
    self.tokens, self.place, self.depth, self.in_bars = tokens, 0, 0, 0

  @property
  def next(self) -> Token:
    return self.tokens[self.place] if self.place < len(self.tokens) else _END

  def after(self, count: int = 1) -> Token:
    place = self.place + count
    return self.tokens[place] if place < len(self.tokens) else _END

  def is_next(self, *texts: str) -> bool:
    return self.next.kind in ('sign', 'command') and self.next.text in texts

  def accept(self, *texts: str) -> bool:
    is_next = self.is_next(*texts)
    self.place += is_next
    return is_next

  def take(self, text: str) -> None:
    if not self.accept(text):
      raise NotUnderstood(self.next.text)

  @abc.abstractmethod
  def row(self, closing: tuple[str, ...]) -> Node:
    """Reads the values in a bracket, up to the closing bracket, which stays."""

  # --- Sums, terms, factors ---------------------------------------------------------

  def sum(self) -> Node:
    """Reads terms with signs between them."""
    terms = [self._signed_term()]
    while self.is_next('+', '-', 'pm', 'mp'):
      terms.append(self._signed_term())
    return total(terms)

  def _signed_term(self) -> Node:
    sign = self.next.text if self.is_next('+', '-', 'pm', 'mp') else '+'
    self.place += self.is_next('+', '-', 'pm', 'mp')
    return signed(sign, self.term())

  def term(self) -> Node:
    """Reads factors with ×, ·, / or nothing between them."""
    value = self._mixed() or self.factor()
    # A factor that follows a / without a sign could belong to the divisor: a/bc. 1/2 x is clear.
    is_slashed = value_is_quotient = False
    for _ in range(MAX_FACTORS):
      if self.accept('times', 'cdot', '*'):
        value = Call('mul', (value, self._operand()))
        is_slashed = value_is_quotient = False
      elif self.accept('/', 'div'):
        divisor = self._operand()
        value = Call('div', (value, divisor))
        value_is_quotient = isinstance(divisor, Number) and is_of_numbers(value)
        is_slashed = not value_is_quotient
      elif self._starts_factor():
        if is_slashed or (value_is_quotient and not self.next.spaced):
          raise NotUnderstood('a/bc')
        value = Call('mul', (value, self.factor()))
      else:
        return value
    raise TooLarge('factors')

  def _operand(self) -> Node:
    """Reads a factor behind × or /, which may have a minus sign."""
    if self.accept('-'):
      return Call('neg', (self.factor(),))
    return self.factor()

  def _starts_factor(self) -> bool:
    token = self.next
    if token.kind == 'number':
      return False  # 2 3 and x2 are no products.
    if token.kind == 'symbol':
      return answer_units.read(self.tokens[self.place:])[0] is None or not self._is_after_number()
    if token.kind == 'word':
      return self._is_product(token)
    if token.text == '|':
      return not self.in_bars
    return token.text in ('(', '[', 'frac', 'sqrt', 'surd', 'pi', 'binom', 'lfloor', 'lceil',
                          '{', 'angle') or (token.kind == 'command'
                                   and token.text in FUNCTIONS | GREEK | {'infty', 'overline'})

  def _is_after_number(self) -> bool:
    return self.place > 0 and self.tokens[self.place - 1].kind == 'number'

  def _is_product(self, token: Token) -> bool:
    """Whether a word is a product of letters: short, ASCII, in a formula, without spaces."""
    is_apart = token.spaced or (self.after().spaced and self.after().kind in ('number', 'word'))
    return (token.kind == 'word' and len(token.text) <= answer_tokens.MAX_LETTERS
            and token.text.isascii() and not token.is_text and not is_apart
            and answer_units.read(self.tokens[self.place:])[0] is None)

  def _mixed(self) -> Node | None:
    """Reads a whole number and a proper fraction, `1 1/2` or `1\\frac{1}{2}`, or returns None."""
    whole = self.next
    if whole.kind != 'number' or whole.value.denominator != 1:
      return None
    place = self.place
    self.place += 1
    top = self.next
    if top.kind == 'number' and top.spaced and self.after().text == '/' \
        and self.after(2).kind == 'number':
      bottom = self.after(2)
      self.place += 3
      return self._checked_mixed(whole, top.value, bottom.value)
    if self.is_next('frac'):
      fraction = self.primary()
      if isinstance(fraction, Call) and all(isinstance(a, Number) for a in fraction.args):
        values = [a.value for a in fraction.args if isinstance(a, Number)]
        return self._checked_mixed(whole, values[0], values[1])
    self.place = place
    return None

  def _checked_mixed(self, whole: Token, top: fractions.Fraction, bottom: fractions.Fraction
                     ) -> Node:
    if not 0 < top < bottom or top.denominator * bottom.denominator != 1 or self.is_next('^', '!'):
      raise NotUnderstood('a mixed number')
    return Call('mixed', (Number(whole.value), Number(top), Number(bottom)))

  def factor(self) -> Node:
    """Reads a primary with its index, exponent, factorial or percent sign.

    Each stands once at most: in 2^3^4 and 5!! the second is left, and nothing else reads it.
    """
    value = self.primary()
    while self.is_next('_'):
      value = self._index(value)
    if self._accept_degree():
      value = Call('degree', (value,))
    elif self.accept('^'):
      value = Call('pow', (value, self._argument(is_power=True)))
    if self.accept('!'):
      value = Call('factorial', (value,))
    if self.accept('%'):
      value = Call('percent', (value,))
    return value

  def _accept_degree(self) -> bool:
    texts = [self.after(i).text for i in range(1, 4)]
    if not self.is_next('^'):
      return False
    if texts[0] == 'circ':
      self.place += 2
    elif texts == ['{', 'circ', '}']:
      self.place += 4
    else:
      return False
    return True

  def _index(self, value: Node) -> Node:
    self.place += 1
    index = self._argument(is_power=True)
    name = index.name if isinstance(index, Symbol) else (
        str(index.value) if isinstance(index, Number) else None)
    if name is None:
      raise NotUnderstood('an index')
    if isinstance(value, Symbol):
      return Symbol(f'{value.name}_{name}')
    if isinstance(value, Number) and value.is_digits and isinstance(index, Number):
      return Unit(value, f'base {name}')
    raise NotUnderstood('an index')

  def _argument(self, is_power: bool = False) -> Node:
    r"""Reads the argument of a command or ^: a group in braces, or one token.

    A number of several digits is such a token only behind ^, since \sqrt23 may mean two things.
    """
    if self.accept('{'):
      value = self.sum()
      self.take('}')
      return value
    if is_power and self.accept('-'):
      return Call('neg', (self._argument(),))
    if self.next.kind == 'number' and not is_power and len(self.next.text) > 1:
      raise NotUnderstood('several digits without braces')
    if self.is_next('frac', 'sqrt', 'pi', 'infty') or self.next.kind in ('number', 'symbol') or (
        self.is_next('(')):
      return self.primary()
    raise NotUnderstood(self.next.text)

  # --- Primaries --------------------------------------------------------------------

  def primary(self) -> Node:
    """Reads a number, a letter, a bracket, or a command with its arguments."""
    self.depth += 1
    if self.depth > MAX_DEPTH:
      raise TooLarge('brackets')
    value = self._primary()
    self.depth -= 1
    return value

  def _primary(self) -> Node:
    token = self.next
    self.place += 1
    if token.kind == 'number':
      return Number(token.value, token.text.isdigit())
    if token.kind == 'symbol':
      return Symbol(token.text)
    if token.kind == 'word':
      self.place -= 1
      if not self._is_product(token):
        raise NotUnderstood(token.text)
      self.place += 1
      letters: list[Node] = [Symbol(letter) for letter in token.text]
      return product(letters)
    if token.text in _CLOSING or token.text == ']':
      return self._bracket(token.text)
    if token.text == '|':
      return self._bars()
    return self._command(token.text)

  def _bars(self) -> Node:
    if self.in_bars:
      raise NotUnderstood('|')
    self.in_bars = 1
    value = self.sum()
    self.take('|')
    self.in_bars = 0
    return Call('abs', (value,))

  def _bracket(self, opening: str) -> Node:
    if opening == ']':
      raise NotUnderstood(opening)
    outer, self.in_bars = self.in_bars, 0
    if opening == r'\{' and self.accept(r'\}'):
      return Symbol('∅')
    closings = (')', ']') if opening in '([' else (_CLOSING[opening],)
    inner = self.row(closings)
    closing = self.next.text
    self.take(closing)
    self.in_bars = outer
    if opening == r'\{':
      return Row('set', inner.items if isinstance(inner, Row) and inner.kind == 'list'
                 else (inner,))
    if isinstance(inner, Row) and inner.kind == 'list':
      return Row('set' if opening == '{' else opening + closing, inner.items)
    if closing != _CLOSING[opening] or isinstance(inner, (Relation, Unit, Row)):
      raise NotUnderstood('a bracket')
    return inner

  def _command(self, name: str) -> Node:
    if name in FUNCTIONS:
      return self._function(name)
    if name in GREEK:
      return Symbol(name)
    match name:
      case 'pi' | 'infty':
        return Symbol({'pi': 'π', 'infty': '∞'}[name])
      case 'angle':
        name = self.next.text
        self.place += 1
        return Symbol(f'∠{name}')
      case 'emptyset':
        return Symbol('∅')
      case 'frac':
        return Call('div', (self._argument(), self._argument()))
      case 'binom':
        return Call('binom', (self._argument(), self._argument()))
      case 'sqrt' | 'surd':
        return self._root(name)
      case 'lfloor' | 'lceil':
        value = self.sum()
        self.take('r' + name[1:])
        return Call(name[1:], (value,))
      case 'begin':
        return self._matrix()
    raise NotUnderstood(name)

  def _root(self, name: str) -> Node:
    degree: Node = Number(fractions.Fraction(2))
    if name == 'sqrt' and self.accept('['):
      degree = self.sum()
      self.take(']')
    if self.is_next('(') or name == 'surd' and self.next.kind == 'number':
      return Call('root', (self.primary(), degree))
    return Call('root', (self._argument(), degree))

  def _function(self, name: str) -> Node:
    base: Node | None = None
    power: Node | None = None
    while self.is_next('_', '^'):
      is_base = self.next.text == '_'
      self.place += 1
      if is_base:
        base = self._argument(is_power=True)
      else:
        power = self._argument(is_power=True)
    if base is not None and name != 'log':
      raise NotUnderstood(f'{name} with an index')
    args = self._function_arguments(name)
    value: Node = Call('log', (args[0], base)) if base is not None else Call(name, tuple(args))
    if power is None:
      return value
    if power == Call('neg', (Number(fractions.Fraction(1), True),)):
      if name not in ('sin', 'cos', 'tan'):
        raise NotUnderstood('an inverse')
      return Call('arc' + name, tuple(args))
    return Call('pow', (value, power))

  def _function_arguments(self, name: str) -> list[Node]:
    if self.is_next('(', '['):
      opening = self.next.text
      self.place += 1
      inner = self.row((_CLOSING[opening],))
      self.take(_CLOSING[opening])
      args = list(inner.items) if isinstance(inner, Row) and inner.kind == 'list' else [inner]
      if len(args) > 1 and name not in ('min', 'max', 'gcd', 'lcm'):
        raise NotUnderstood(name)
      return args
    if not (self._starts_factor() or self.next.kind == 'number'):
      raise NotUnderstood(name)
    value = self._mixed() or self.factor()
    while self._starts_factor() and not (self.next.kind == 'command'
                                         and self.next.text in FUNCTIONS):
      value = Call('mul', (value, self.factor()))
    if self.is_next('/'):
      raise NotUnderstood('a function of a/b')
    return [value]

  def _matrix(self) -> Node:
    name = self._environment()
    rows: list[list[Node]] = [[]]
    while True:
      rows[-1].append(self.sum())
      if self.accept(r'\\'):
        if self.is_next('end'):
          break
        rows.append([])
      elif not self.accept('&'):
        break
    self.take('end')
    if self._environment() != name or len({len(r) for r in rows}) != 1:
      raise NotUnderstood('a matrix')
    return Row('matrix', tuple(Row('()', tuple(r)) for r in rows))

  def _environment(self) -> str:
    self.take('{')
    name = self.next.text
    self.place += 1
    self.take('}')
    if name not in ('matrix', 'pmatrix', 'bmatrix'):
      raise NotUnderstood(name)
    return name
