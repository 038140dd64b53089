r"""The text of an answer: one spelling for each character, without dressing that changes no value.

Nothing here reads a value, and nothing joins two numbers: where they were apart, a space stays.
"""

import re
import unicodedata

# Typographic characters → the spelling that the grammar reads.
_CHARACTERS = {
    '\u2212': '-', '\u2010': '-', '\u2011': '-', '\u2012': '-', '\u2013': '-', '\ufe63': '-',
    '×': r'\times ', '∗': '*', '·': r'\cdot ', '⋅': r'\cdot ', '∙': r'\cdot ', '÷': r'\div ',
    '∕': '/', '⁄': '/', '√': r'\surd ', 'π': r'\pi ', '∞': r'\infty ', '≤': r'\le ',
    '≥': r'\ge ', '⩽': r'\le ', '⩾': r'\ge ', '≠': r'\ne ', '≈': r'\approx ', '≡': r'\equiv ',
    '∈': r'\in ', '∪': r'\cup ', '∅': r'\emptyset ', '°': r'^{\circ}', '±': r'\pm ',
    '∓': r'\mp ', '、': ', ', '。': '.', '“': '"', '”': '"', '‘': "'", '’': "'", '，': ', ',
    '；': '; ', '＄': '$', '∶': ':', '…': r'\ldots ', 'θ': r'\theta ',
    'α': r'\alpha ', 'β': r'\beta ',
}
_SUPERSCRIPTS = dict(zip('⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ', '0123456789+-n', strict=True))
_SUBSCRIPTS = dict(zip('₀₁₂₃₄₅₆₇₈₉', '0123456789', strict=True))
_VULGAR = {c: unicodedata.normalize('NFKC', c).replace('⁄', '/')
           for c in '½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞'}
_SUPER = re.compile(f'[{"".join(_SUPERSCRIPTS)}]+')
_SUB = re.compile(f'[{"".join(_SUBSCRIPTS)}]+')

# Matches dressing at both ends of the whole; it is removed until none is left.
_ENDS = re.compile(
    r'\A(?:\s|\*\*|__|`|"|\$|\\\(|\\\[|\\[,;:!\s]|:)+|'
    r'(?:\s|\*\*|__|`|"|\$|\\\)|\\\]|\\[,;:!\s]|\\\\|[.,;:])+\Z')
_PAIRED = re.compile(r"\A(?:\*(?P<a>[^*]+)\*|_(?P<b>[^_]+)_|'(?P<c>[^']+)')\Z", re.DOTALL)
_PREFIX = re.compile(r'\A(?:(?:the\s+)?(?:final\s+)?(?:answer|ans)\b\s*(?:is\b)?|答案?(?:是|为)?)'
                     r'\s*[:=]?\s*', re.IGNORECASE)
# Matches commands of spacing and size, which become a space.
_SPACING = re.compile(
    r'(?<!\\)\\(?:left|right|[bB]ig+[lrm]?|displaystyle|textstyle|limits|quad|qquad|thinspace)(?![A-Za-z])'
    r'|(?<!\\)\\[,;:!\s]|\\?\$|\s+|(?<=.)~')
_GROUPED = re.compile(r'(?<=\d)(?:\{,\}|,\\!)(?=\d{3}(?!\d))')
_FONT = re.compile(r'\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox|boldsymbol|operatorname)\s*'
                   r'\{([^{}]*)\}')
# Matches spaces; the group matches those between two words or numbers, which stay.
_GAP = re.compile(r'((?<=\w) (?=[\w.])|(?<=\.) (?=\w)|(?<=,) (?=\d{3}(?!\d)))| ')


def unified(text: str) -> str:
  """`text` with every digit ASCII, one minus sign, LaTeX for signs, `^{…}` for superscripts."""
  if text.isascii():
    return text
  text = _SUPER.sub(lambda m: '^{' + ''.join(map(_SUPERSCRIPTS.__getitem__, m[0])) + '}', text)
  text = _SUB.sub(lambda m: '_{' + ''.join(map(_SUBSCRIPTS.__getitem__, m[0])) + '}', text)
  return ''.join(map(_character, text))


def _character(c: str) -> str:
  if c.isascii():
    return c
  if c in _CHARACTERS:
    return _CHARACTERS[c]
  if c in _VULGAR:
    return f' {_VULGAR[c]}'
  digit = unicodedata.decimal(c, -1)
  if digit >= 0:
    return str(digit)
  if 0xff01 <= ord(c) <= 0xff5e:  # full-width ASCII
    return chr(ord(c) - 0xfee0)
  # Every kind of space, and a zero-width character between two others, becomes a space.
  return ' ' if c.isspace() or unicodedata.category(c) in ('Cf', 'Zs') else c


def undressed(text: str) -> str:
  """An answer without the dressing round it: **…**, $…$, quotes, `answer:`, a full stop."""
  text = unified(text)
  for _ in range(8):  # No answer has more layers of dressing.
    before = text
    text = _ENDS.sub('', text)
    if pair := _PAIRED.match(text):
      text = pair['a'] or pair['b'] or pair['c']
    text = _PREFIX.sub('', text)
    if text == before:
      break
  return text


def spaced(text: str) -> str:
  """The text with single spaces for commands of spacing and size, and `1{,}234` as one number."""
  return re.sub(' +', ' ', _SPACING.sub(' ', _GROUPED.sub('', text))).strip()


def plain(text: str) -> str:
  """The form in which answers are compared as texts.

  It has no dressing and no fonts, and spaces only between words and numbers.
  """
  text = spaced(_FONT.sub(r' \1 ', undressed(text)))
  return undressed(_GAP.sub(lambda m: m[1] or '', text))
