"""Verifiers of plain text: for tags, for length, and for a word that a fluent text must say."""

from collections.abc import Sequence
import re
import unicodedata

from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# Scripts without spaces between words: Han with its extensions, kana, Thai, Lao, Khmer, Burmese.
_UNSPACED = re.compile('[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf'
                       '\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]')


def between_tags(text: str, tags: Sequence[str]) -> list[str] | None:
  """The text in `<tag>…</tag>` of each tag.

  It is None unless every opening and closing tag occurs exactly once and they follow each other in
  the order of `tags`, so that tags are neither nested nor repeated.
  """
  contents, place = [], 0
  for tag in tags:
    opening, closing = f'<{tag}>', f'</{tag}>'
    if text.count(opening) != 1 or text.count(closing) != 1:
      return None
    start, end = text.find(opening), text.find(closing)
    if not place <= start < start + len(opening) <= end:
      return None
    contents.append(text[start + len(opening):end])
    place = end + len(closing)
  return contents


def verify_format(response: str, tags: Sequence[str]) -> ResponseVerdict:
  """Part `format`: 1 where each pair of `tags` occurs once and in order, else 0."""
  is_right = between_tags(response, tags) is not None
  return ResponseVerdict(Outcome.CORRECT if is_right else Outcome.WRONG,
                         {'format': float(is_right)})


def verify_length(response: str, min_chars: int, max_chars: int) -> ResponseVerdict:
  """Part `length`: clip((max_chars − n) / (max_chars − min_chars), 0, 1) for n characters."""
  value = min(1.0, max(0.0, (max_chars - len(response)) / (max_chars - min_chars)))
  return ResponseVerdict(Outcome.CORRECT if value > 0 else Outcome.WRONG, {'length': value})


def verify_words(response: str, reference: str, min_words: int, max_words: int,
                 ngram: int) -> ResponseVerdict:
  """A third of the reward each for saying the reference's words, for the length and for novelty.

  word: 1 where the response says the words of `reference`, whatever they are made of
    (`well-known`, `3.14`, `猫`), and not as a part of a longer word or number: `cat's` does not say
    `cat`, nor `3.14` say `3`. Han and kana, which are written without spaces, may stand between
    others.
  length: 1 inside [min_words, max_words], falling linearly to 0 at min_words / 2 and at
    2 · max_words.
  novelty: the share of the response's n-grams of `ngram` words that are distinct, 0 where there are
    none.

  Upper and lower case are the same throughout.

  Returns:
    Parts word, length and novelty; CORRECT where all three are full, UNPARSED without any word.
  """
  words = [w.lower() for w in _WORD.findall(response)]
  if not words:
    return ResponseVerdict(Outcome.UNPARSED, {'word': 0.0, 'length': 0.0, 'novelty': 0.0})
  said = float(says(response, reference))
  grams = [tuple(words[i:i + ngram]) for i in range(len(words) - ngram + 1)]
  novelty = len(set(grams)) / len(grams) if grams else 0.0
  values = {'word': said, 'length': _window(len(words), min_words, max_words), 'novelty': novelty}
  is_right = min(values.values()) == 1.0
  return ResponseVerdict(Outcome.CORRECT if is_right else Outcome.WRONG,
                         {name: value / 3 for name, value in values.items()})


def says(response: str, reference: str) -> bool:
  """Whether the text says the words of `reference`, not as a part of longer words or numbers."""
  wanted = _folded(reference).split()
  if not wanted:
    return False
  first, last = wanted[0][0], wanted[-1][-1]
  before = '' if not first.isalnum() or _UNSPACED.match(first) else (
      r"(?<![^\W_])(?<![^\W_]['’])" + (r'(?<!\d[.,])' if first.isdecimal() else ''))
  after = '' if not last.isalnum() or _UNSPACED.match(last) else (
      r"(?![^\W_]|['’][^\W_])" + (r'(?![.,]\d)' if last.isdecimal() else ''))
  return re.search(before + r'\s+'.join(map(re.escape, wanted)) + after,
                   _folded(response)) is not None


def _folded(text: str) -> str:
  return unicodedata.normalize('NFC', text).lower()


def _window(num_words: int, low: int, high: int) -> float:
  if num_words < low:
    return max(0.0, 2 * num_words / low - 1)
  return min(1.0, max(0.0, 2 - num_words / high))
