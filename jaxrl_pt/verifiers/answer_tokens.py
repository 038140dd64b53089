r"""Splits answers into tokens. A text that has no token makes the whole answer not understood."""

from dataclasses import dataclass
import fractions
import re

from jaxrl_pt.verifiers import answer_text

MAX_EXPONENT = 10_000  # The largest exponent in a number such as 1e400.


class NotUnderstood(Exception):
  """The text, or a part of it, has no meaning in this grammar."""


class TooLarge(Exception):
  """A value, a depth or a number of terms is larger than any answer needs."""


@dataclass(frozen=True)
class Token:
  """A token of an answer.

  kind: 'number', 'symbol' (a letter), 'word', 'command' (without its backslash) or 'sign'.
  spaced: whether a space stands before it.
  is_text: whether it stood in \\text{…} or the like.
  value: the exact value of a number.
  """

  kind: str
  text: str
  spaced: bool = False
  is_text: bool = False
  value: fractions.Fraction = fractions.Fraction(0)


# Words that mean a command, and the command.
_NAMED = {'sqrt': 'sqrt', 'pi': 'pi', 'sin': 'sin', 'cos': 'cos', 'tan': 'tan', 'cot': 'cot',
          'log': 'log', 'ln': 'ln', 'lg': 'lg', 'exp': 'exp', 'arcsin': 'arcsin',
          'arccos': 'arccos', 'arctan': 'arctan', 'infinity': 'infty', 'infty': 'infty',
          'min': 'min', 'max': 'max', 'gcd': 'gcd', 'lcm': 'lcm'}
_ALIASES = {'dfrac': 'frac', 'tfrac': 'frac', 'cfrac': 'frac', 'leq': 'le', 'leqslant': 'le',
            'geq': 'ge', 'geqslant': 'ge', 'neq': 'ne', 'lbrace': '{', 'rbrace': '}',
            'lvert': '|', 'rvert': '|', 'vert': '|', 'mid': '|', 'degree': 'circ',
            'varnothing': 'emptyset', 'dbinom': 'binom', 'tbinom': 'binom', 'union': 'cup',
            'lbrack': '[', 'rbrack': ']', 'thickspace': ' ', 'ast': '*', 'dots': 'ldots',
            'cdots': 'ldots', 'tg': 'tan', 'ctg': 'cot', 'bar': 'overline', 'colon': ':'}
_FONTS = frozenset({'text', 'textbf', 'textit', 'textrm', 'textnormal', 'mathrm', 'mathbf', 'mbox',
                    'boldsymbol', 'operatorname', 'mathit', 'mathsf', 'mathbb', 'mathcal', 'bm',
                    'boxed', 'fbox', 'emph'})
GREEK = frozenset('alpha beta gamma delta epsilon varepsilon theta lambda mu nu rho sigma tau phi '
                  'varphi omega xi eta zeta kappa psi chi Delta Omega Gamma Lambda Phi Sigma '
                  'Theta Psi ell'.split())

_REPEAT = r'\\(?:overline|dot)\s*'
_NUMBER = re.compile(
    r'(?P<whole>[1-9]\d{0,2}(?:,\d{3})+(?![\d,]*\d)|[1-9]\d{0,2}(?: \d{3})+(?!\d)|\d+|(?=\.\d))'
    rf'(?P<decimals>\.\d+|\.(?={_REPEAT}\{{?\d))?'
    rf'(?(decimals)(?:{_REPEAT}(?:\{{(?P<repeat>\d+)\}}|(?P<repeated>\d)))?)'
    r'(?:[eE](?P<exponent>[+-]?\d+)(?![\d.]))?')
_PLAIN_NUMBER = re.compile(r'(?P<whole>\d+)(?P<decimals>\.\d+)?')
_TWO_DIGITS = re.compile(r'\s*(\d)(\d)(?!\d)')
_COMMAND = re.compile(r'\\([A-Za-z]+|.)', re.DOTALL)
_LETTERS = re.compile(r'[^\W\d_]+')
_SIGNS = re.compile(r'\*\*|!=|<=|>=|==|[-+*/^_=<>()\[\]{}|,;:!%&]')
_SIGN_ALIASES = {'**': '^', '!=': 'ne', '<=': 'le', '>=': 'ge', '==': '=', '%': '%'}
SEPARATORS = frozenset({'and', 'or', '和', '或', '或者'})  # words between values
MAX_LETTERS = 3  # A longer run of letters is a word and no product.


def tokens(text: str) -> list[Token]:
  """The tokens of an answer.

  Raises:
    NotUnderstood: a character or command has no meaning here.
    TooLarge: a number has an exponent above MAX_EXPONENT.
  """
  if text.startswith('~'):
    raise NotUnderstood('about')  # A ~ here means "about"; inside a text it is a space.
  return list(_Reader(answer_text.spaced(text)).read(False))


class _Reader:
  """Reads tokens from left to right; `depth` counts the brackets in which a comma parts values."""

  def __init__(self, text: str) -> None:
    self.text, self.place, self.depth = text, 0, 0
    self.found: list[Token] = []

  def read(self, is_text: bool) -> list[Token]:
    spaced = False
    while self.place < len(self.text):
      c = self.text[self.place]
      if c == ' ':
        spaced, self.place = True, self.place + 1
        continue
      self._next(c, spaced, is_text)
      spaced = False
    return self.found

  def _next(self, c: str, spaced: bool, is_text: bool) -> None:
    if c.isdigit() or c == '.':
      self._number(spaced)
    elif c == '\\':
      self._command(spaced)
    elif c.isalpha():
      self._letters(spaced, is_text)
    elif match := _SIGNS.match(self.text, self.place):
      self.place = match.end()
      sign = _SIGN_ALIASES.get(match[0], match[0])
      kind = 'command' if sign.isalpha() else 'sign'
      self._brackets(sign)
      self.found.append(Token(kind, sign, spaced))
    elif c in '€£¥₹':
      self.place += 1
      self.found.append(Token('word', c, spaced, True))
    else:
      raise NotUnderstood(c)

  def _brackets(self, sign: str) -> None:
    self.depth += (sign in ('(', '[', r'\{')) - (sign in (')', ']', r'\}'))

  def _number(self, spaced: bool) -> None:
    match = (_PLAIN_NUMBER if self.depth > 0 and not self._has_no_comma() else _NUMBER).match(
        self.text, self.place)
    if match is None or (self.found and not spaced and self.found[-1].kind == 'number'):
      raise NotUnderstood(self.text[self.place:])
    self.place = match.end()
    self.found.append(Token('number', match[0], spaced, value=_value(match)))

  def _has_no_comma(self) -> bool:
    """Whether the number has no comma, which in brackets would part two values."""
    match = _NUMBER.match(self.text, self.place)
    return match is not None and ',' not in match[0]

  def _letters(self, spaced: bool, is_text: bool) -> None:
    match = _LETTERS.match(self.text, self.place)
    if match is None:
      raise NotUnderstood(self.text[self.place])
    run, self.place = match[0], match.end()
    if run.lower() in _NAMED and len(run) > 1:
      self.found.append(Token('command', _NAMED[run.lower()], spaced))
    elif len(run) == 1 and run.isascii():
      self.found.append(Token('symbol', run, spaced, is_text))
    else:
      self.found.append(Token('word', run, spaced, is_text))

  def _command(self, spaced: bool) -> None:
    match = _COMMAND.match(self.text, self.place)
    if match is None:
      raise NotUnderstood('\\')
    name, self.place = _ALIASES.get(match[1], match[1]), match.end()
    if name in _FONTS:
      self._font(spaced)
    elif name in ('{', '}'):
      self._brackets('\\' + name)
      self.found.append(Token('sign', '\\' + name, spaced))
    elif name == '\\':
      self.found.append(Token('sign', r'\\', spaced))
    elif name == ' ':
      pass
    elif not name.isalpha():
      self._brackets(name)
      self.found.append(Token('sign', name, spaced))
    else:
      self.found.append(Token('command', name, spaced))
      if name == 'frac' and (digits := _TWO_DIGITS.match(self.text, self.place)):  # \frac12
        self.place = digits.end()
        self.found += [Token('number', d, value=fractions.Fraction(d)) for d in digits.groups()]

  def _font(self, spaced: bool) -> None:
    r"""Reads `\text{…}` and the like: its content, as text; a sum in it stays a group."""
    while self.text[self.place:self.place + 1] == ' ':
      self.place += 1
    if self.text[self.place:self.place + 1] != '{':
      return  # In \mathbb R the font is that of the next letter.
    level, end = 0, self.place
    for end in range(self.place, len(self.text)):
      level += {'{': 1, '}': -1}.get(self.text[end], 0)
      if not level:
        break
    else:
      raise NotUnderstood('open braces')
    inner = _Reader(self.text[self.place + 1:end])
    inner.depth = self.depth
    content = inner.read(True)
    self.place = end + 1
    if len(content) > 1 and self.text[self.place:].lstrip()[:1] in ('^', '_'):
      raise NotUnderstood('a power of a text')
    if any(t.text in ('+', '-') for t in content):  # \mathbf{a+b}c is not a+bc.
      content = [Token('sign', '{', spaced), *content, Token('sign', '}')]
    self.found += content


def _value(match: re.Match[str]) -> fractions.Fraction:
  fields = match.groupdict()
  digits, decimals = re.sub('[ ,]', '', fields['whole']), (fields['decimals'] or '.')[1:]
  exponent = int(fields.get('exponent') or 0) if len(fields.get('exponent') or '') < 8 else 10 ** 8
  if abs(exponent) > MAX_EXPONENT:
    raise TooLarge(match[0])
  value = fractions.Fraction(int(digits + decimals or '0'), 10 ** len(decimals))
  if repeat := fields.get('repeat') or fields.get('repeated'):
    value += fractions.Fraction(int(repeat), (10 ** len(repeat) - 1) * 10 ** len(decimals))
  return value * fractions.Fraction(10) ** exponent
