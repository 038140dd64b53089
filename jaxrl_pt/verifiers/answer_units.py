"""Units and counted things behind a number: `5 cm`, `12 km/h`, `9平方米`, `18 dollars`.

Only listed units and plural nouns, which say what is counted, are read. A word that changes the
value (dozens, thousands, thirds) is neither.
"""

from collections.abc import Sequence
import re

from jaxrl_pt.verifiers.answer_tokens import SEPARATORS, Token

# The canonical spelling of each unit, and after the colon its other spellings.
_SPELLINGS = """
mm: millimeter millimetre 毫米; cm: centimeter centimetre 厘米; m: meter metre 米;
km: kilometer kilometre 千米 公里; in: inch inches; ft: foot feet; yd: yard; mi: mile;
g: gram 克; kg: kilogram 千克 公斤; mg: milligram; lb: lbs pound; oz: ounce; ton: tonne 吨;
s: sec second 秒; min: minute 分钟; h: hr hrs hour 小时; day: 天; week: 周; month: 个月;
year: 年 岁;
L: liter litre 升; mL: ml milliliter millilitre 毫升; gal: gallon; N: newton; J: joule; W: watt;
V: volt; A: ampere amp; K: kelvin; Pa: pascal; Hz: hertz; mph: ; rad: radian 弧度;
degree: degrees deg 度; %: percent pct; dollar: dollars 美元; cent: ¢; euro: ; yuan: 元 块;
person: people persons 人 名; unit: 个; piece: 件 张 本 只 条 种; child: children; man: men;
woman: women; foot²: sqft; mouse: mice; time: 次; point: 分
"""


def _canonical() -> dict[str, str]:
  """The canonical spelling of every spelling, plurals included."""
  spellings = {}
  for entry in _SPELLINGS.split(';'):
    name, _, others = entry.strip().partition(':')
    for other in (name, *others.split()):
      spellings[other] = name
      if len(other) > 2 and other.isascii():
        spellings[other + 's'] = name
  return spellings


UNITS = _canonical()
CURRENCIES = {'€': 'euro', '£': 'pound sterling', '¥': 'yuan', '₹': 'rupee'}
_POWERS = {'square': '2', 'sq': '2', 'cubic': '3', '平方': '2', '立方': '3'}
_CHINESE_POWER = re.compile('(平方|立方)(.+)')
# Words that end like plural nouns and do not say what is counted.
_NO_NOUNS = frozenset(
    'tens dozens scores hundreds thousands millions billions trillions halves thirds quarters '
    'fourths fifths sixths sevenths eighths ninths tenths elevenths twelfths hundredths '
    'thousandths millionths times minus plus less pairs couples is was has does as this thus '
    'digits powers sets percents radians factorials multiples perhaps always '
    'sometimes unless guess besides'.split())
_ENDS = frozenset({',', ';', ')', ']', r'\}', '=', '<', '>', 'le', 'ge', 'approx', 'cup', ':'})
_NOUN = re.compile(r'[a-z]{2,}s')


def read(tokens: Sequence[Token]) -> tuple[str | None, int]:
  """The unit at the start of `tokens`: its canonical spelling and its number of tokens.

  It is (None, 0) unless the unit ends where a part of the answer ends: before a comma, a closing
  bracket, a relation or the end.
  """
  place, written = 0, ''
  while True:
    name, count = _single(tokens[place:], place > 0)
    if name is None:
      return None, 0
    written, place = written + name, place + count
    joint = tokens[place].text if place < len(tokens) else ''
    if joint not in ('/', 'per'):
      break
    written, place = written + '/', place + 1
  is_over = place == len(tokens) or tokens[place].text in _ENDS | SEPARATORS
  return (written, place) if is_over else (None, 0)


def _single(tokens: Sequence[Token], is_joined: bool) -> tuple[str | None, int]:
  """`read` for a unit without a slash, which may follow one if `is_joined`."""
  power, place = '', 0
  if tokens and tokens[0].text in _POWERS:
    power, place = _POWERS[tokens[0].text], 1
  if place >= len(tokens):
    return None, 0
  token = tokens[place]
  if token.kind not in ('word', 'symbol') and (token.kind, token.text) != ('command', 'min'):
    return None, 0
  text = token.text
  if match := _CHINESE_POWER.fullmatch(text):
    power, text = _POWERS[match[1]], match[2]
  name = UNITS.get(text) or (UNITS.get(text.lower()) if len(text) > 2 else None)
  if name is None and _NOUN.fullmatch(text.lower()) and text.lower() not in _NO_NOUNS and (
      len(text) > 3):
    name = text.lower()
  # A letter alone is a unit only as a text, behind a space or behind a slash: 5m is a product.
  is_letter = len(text) == 1 and text.isascii()
  if name is None or (is_letter and not (token.is_text or token.spaced or is_joined)):
    return None, 0
  place += 1
  if place + 1 < len(tokens) and tokens[place].text == '^':
    count, digit = _exponent(tokens[place + 1:])
    if not digit:
      return None, 0
    power, place = digit, place + 1 + count
  return name + power, place


def _exponent(tokens: Sequence[Token]) -> tuple[int, str]:
  texts = [t.text for t in tokens[:3]]
  if texts and texts[0] in ('2', '3'):
    return 1, texts[0]
  if len(texts) == 3 and texts[0] == '{' and texts[1] in ('2', '3') and texts[2] == '}':
    return 3, texts[1]
  return 0, ''
