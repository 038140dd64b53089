"""Rewards of plain text, by hand."""

import pytest

from jaxrl_pt.verifiers import text as t
from jaxrl_pt.verifiers.judgement import Outcome


@pytest.mark.parametrize('text, found', [
    ('<a>1</a><b>2</b>', ['1', '2']), ('x<a>1</a>y<b></b>z', ['1', '']),
    ('<b>2</b><a>1</a>', None), ('<a><b></b></a>', None), ('<a>1<b>2</b>', None),
    ('<a>1</a><b>2</b><b>3</b>', None), ('</a><a><b></b>', None), ('', None),
    ('<A>1</A><b>2</b>', None), ('<a>1</a></b><b>', None),
])
def test_between_tags(text, found):
  assert t.between_tags(text, ('a', 'b')) == found
  assert t.judge_format(text, ('a', 'b')).parts == {'format': float(found is not None)}


def test_length_falls_linearly():
  scores = [t.judge_length('x' * n, 10, 20).score for n in (0, 10, 11, 15, 19, 20, 1 << 20)]
  assert scores == [1, 1, 0.9, 0.5, 0.1, 0, 0]


def _words(response, ngram=2):
  judged = t.judge_words(response, 'Cat', 4, 6, ngram)
  return judged.outcome, [round(3 * v, 6) for v in judged.parts.values()]


def test_words_by_hand():
  assert _words('the cat sat down') == (Outcome.CORRECT, [1, 1, 1])
  assert _words("The CAT's gone, far away") == (Outcome.WRONG, [0, 1, 1])  # another word
  assert _words('a cat. a cat.') == (Outcome.WRONG, [1, 1, 0.666667])  # (a, cat) said twice
  assert _words('cat cat cat cat') == (Outcome.WRONG, [1, 1, 0.333333])
  assert _words('the cat sat') == (Outcome.WRONG, [1, 0.5, 1])  # 3 of 4 words
  assert _words('the cat') == (Outcome.WRONG, [1, 0, 1])
  assert _words('the cat sat on my own red mat now') == (Outcome.WRONG, [1, 0.5, 1])  # 9 of 6
  assert _words('cat') == (Outcome.WRONG, [1, 0, 0])  # no bigram at all
  assert _words('') == _words('... 🙂 --') == (Outcome.UNPARSED, [0, 0, 0])
  assert _words('cat ' * (1 << 18))[0] is Outcome.WRONG
