"""Rewards of plain text, by hand."""

import pytest

from jaxrl_pt.verifiers import text as t
from jaxrl_pt.verifiers.response_verdict import Outcome


@pytest.mark.parametrize('text, found', [
    ('<a>1</a><b>2</b>', ['1', '2']), ('x<a>1</a>y<b></b>z', ['1', '']),
    ('<b>2</b><a>1</a>', None), ('<a><b></b></a>', None), ('<a>1<b>2</b>', None),
    ('<a>1</a><b>2</b><b>3</b>', None), ('</a><a><b></b>', None), ('', None),
    ('<A>1</A><b>2</b>', None), ('<a>1<a>2</a><b></b>', None),
    ('<a>1</a>2</a><b></b>', None), ('<a>1</a></b><b>', None),
])
def test_between_tags(text, found):
  assert t.between_tags(text, ('a', 'b')) == found
  assert t.verify_format(text, ('a', 'b')).parts == {'format': float(found is not None)}


def test_length_falls_linearly():
  scores = [t.verify_length('x' * n, 10, 20).score for n in (0, 10, 11, 15, 19, 20, 1 << 20)]
  assert scores == [1, 1, 0.9, 0.5, 0.1, 0, 0]


def _words(response, ngram=2):
  verified = t.verify_words(response, 'Cat', 4, 6, ngram)
  return verified.outcome, [round(3 * v, 6) for v in verified.parts.values()]


@pytest.mark.parametrize('reference, response, is_said', [
    ('well-known', 'A well-known fact.', True), ('Well-Known', 'so WELL-KNOWN!', True),
    ('well-known', 'well known', False), ('well-known', 'unwell-known', False),
    ('3.14', 'pi is 3.14 here', True), ('3.14', 'pi is 3.141', False), ('3.14', '13.14', False),
    ('3', 'pi is 3.14', False), ('14', 'pi is 3.14', False), ('3', 'it is 3.', True),
    ('1,000', 'about 1,000 of them', True), ('1', '1,000', False), ('-5', 'it is -5.', True),
    ('猫', '我喜欢猫', True), ('猫', '我喜欢猫。', True), ('猫', '我喜欢狗', False),
    ('ねこ', 'ねこです', True),
    ('New York', 'in New\n  york today', True), ('New York', 'new, York', False),
    ("cat's", "the CAT'S gone", True), ('cat', "the cat's gone", False), ('cat', 'cat-like', True),
    ('cat', 'concatenate', False), ('C++', 'in C++ or C', True), ('C', 'in C.', True),
    ('caf\u00e9', 'cafe\u0301 au lait', True), ('École', 'école', True), ('🙂', 'yes 🙂', True),
    ('a_b', 'so a_b it is', True), ('.*', 'anything', False), (' ', 'a b', False),
    ('', 'a', False)])
def test_any_reference_can_be_said_and_a_part_of_a_word_is_not(reference, response, is_said):
  assert t.says(response, reference) == is_said
  verified = t.verify_words(response, reference, 1, 10, 2)
  assert verified.parts['word'] == (1 / 3 if is_said else 0)


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
