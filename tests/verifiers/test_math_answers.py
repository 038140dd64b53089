r"""Kinds of answers, right and wrong, and hostile ones: understood whole or not at all.

Without sympy only the cases that need no proof run.
"""

import importlib.util
import json
from pathlib import Path
import random
import time

import pytest

from jaxrl_pt.verifiers import math as m
from jaxrl_pt.verifiers.response_verdict import Outcome
from tests.verifiers import math_cases

DATA = Path(__file__).resolve().parents[2] / '../shared/data'
CASES = Path(__file__).resolve().parents[2] / '../shared/cases/from_public_reports.jsonl'
SYMBOLIC = importlib.util.find_spec('sympy') is not None
needs_sympy = pytest.mark.skipif(not SYMBOLIC, reason='sympy is not here: make verifiers')


def _verified(form, symbolic, response, reference):
  return m.verifier(form, symbolic)(response, reference).outcome


@needs_sympy
@pytest.mark.parametrize('kind', math_cases.ALL)
def test_boxed_answers_of_each_kind(kind):
  for stated, reference, is_right in math_cases.ALL[kind]:
    outcome = _verified('boxed', True, rf'so \boxed{{{stated}}}', reference)
    assert (outcome is Outcome.CORRECT) == is_right, (stated, reference, outcome)


@needs_sympy
@pytest.mark.parametrize('form, rows', [
    ('last_number', math_cases.LAST_NUMBER), ('gsm8k', math_cases.GSM8K),
    ('boxed', math_cases.BOXED)])
def test_whole_responses(form, rows):
  for response, reference, is_right in rows:
    for symbolic in (False, True):
      outcome = _verified(form, symbolic, response, reference)
      assert (outcome is Outcome.CORRECT) == is_right, (response, reference, outcome)


@needs_sympy
@pytest.mark.skipif(not CASES.is_file(), reason='../shared/cases is not here')
def test_cases_from_public_reports():
  count = 0
  for row in map(json.loads, CASES.read_text(encoding='utf-8').splitlines()):
    case = row['input']
    if not isinstance(case, dict) or not str(case.get('verifier')).startswith('math.'):
      continue
    form, symbolic = case['verifier'].removeprefix("math.verifier('").removesuffix(')').split("', ")
    found = _verified(form, symbolic == 'True', case['response'], case['reference'])
    assert found.value == row['expected'], (case, found)
    count += 1
  assert count > 30


def test_without_symbolic_nothing_is_worked_out():
  for stated, reference in (('2^{10}', '1024'), ('5!', '120'), ('2+3', '5'), (r'\sqrt{4}', '2'),
                            ('x + 1', '1 + x'), ('2+3=5', '5')):
    assert _verified('boxed', False, rf'\boxed{{{stated}}}', reference) is Outcome.WRONG
  for stated, reference in (('1 1/2', '1.5'), ('x = 5', '5'), ('2, 1', '1, 2'), ('50%', '50'),
                            ('5 cm', '5'), ('-1/2', '-0.5'), ('Yes', 'yes'), ('(1, 2)', '(1,2)')):
    assert _verified('boxed', False, rf'\boxed{{{stated}}}', reference) is Outcome.CORRECT


def test_what_is_not_understood_is_unparsed_and_what_is_too_large_is_wrong():
  for stated in ('7 mod 10', '7?', r'1, \ldots', '3 + ', r'\foo{7}', 'about 7', '\\frac{7}{'):
    assert _verified('boxed', False, rf'#### \boxed{{{stated}', '7') is Outcome.UNPARSED
    assert _verified('gsm8k', False, f'#### {stated}', '7') is Outcome.UNPARSED
  for stated in ('9^{9^{9^9}}', '2^{99999999}', '99999!', '((9!)!)!', '(' * 400 + '7' + ')' * 400,
                 '1e99999', '+'.join(['(a+b+c)^{16}'] * 70), r'\sqrt{1+' * 60 + '7' + '}' * 60):
    assert m._outcome(stated, '7', lambda a, b: True) is Outcome.WRONG


@needs_sympy
def test_answers_that_sympy_has_to_prove_are_built_from_our_tree_alone(monkeypatch):
  """Hostile text meets no parser but ours: those of sympy are gone, and nothing is evaluated."""
  import builtins

  import sympy
  from sympy.parsing import sympy_parser

  def refused(*_, **__):
    raise AssertionError('text was evaluated')

  for place, name in ((sympy, 'sympify'), (sympy_parser, 'parse_expr'), (builtins, 'eval')):
    monkeypatch.setattr(place, name, refused)
  for stated, reference, is_right in [*math_cases.WHOLE, *math_cases.FORMS[:30]]:
    outcome = _verified('boxed', True, rf'\boxed{{{stated}}}', reference)
    assert (outcome is Outcome.CORRECT) == is_right, (stated, reference)


_PIECES = [
    r'\frac', r'\frac{7}{2}', r'\sqrt', '7', '72', '0', 'x', 'e', '^', '{', '}', '(', ')', '[',
    ']', r'\{', r'\}', '+', '-', '*', '/', '=', ',', '!', ' ', '%', r'\pi', r'\sin', r'\cup',
    '<', r'\pm', '|', r'\text{cm}', 'and', 'not', r'\infty', '.', '1/2', '10^{9}', '_', ':',
    r'\begin{pmatrix}', r'\\', '&', '$', '**', '~', 'cm', '√', '½', '−', 'is', '#', '\u200b',
]


def test_no_random_text_pays_itself_and_none_takes_long():
  draw = random.Random(0)
  paid = set()
  start = time.process_time()
  for _ in range(6000):
    stated = ''.join(draw.choices(_PIECES, k=draw.choice([2, 3, 5, 8, 40])))
    if m._outcome(stated, '72', lambda a, b: False) is Outcome.CORRECT:
      paid.add(stated)
  for stated in paid:  # nothing but the number is left without its dressing and its unit
    rest = stated.replace(r'\text{cm}', '').replace('cm', '')
    assert rest.strip(" $*~+=%.,:\\\u200b") == '72', stated
  assert time.process_time() - start < 30


# --- Against the data ------------------------------------------------------------------


def _olymmath():
  folder = DATA / 'math-olymmath'
  if not folder.is_dir():
    pytest.skip('../shared/data/math-olymmath is not here')
  rows = [json.loads(line) for path in sorted(folder.glob('*.jsonl'))
          for line in path.read_text(encoding='utf-8').splitlines()]
  assert len(rows) == 400
  return sorted({row['answer'] for row in rows})


@needs_sympy
def test_every_answer_of_olymmath_is_understood_in_any_dressing_and_is_no_other():
  answers = _olymmath()
  trees = {a: m._tree(a) for a in answers}
  assert all(tree is not None for tree in trees.values())
  for a in answers:
    for stated in (a, a.replace(r'\frac', r'\dfrac'), f'$ {a} $', f'**{a}**', f'{a}。',
                   a.replace('-', '−').replace(r'\pi', 'π'),
                   a.replace(r'\left', '').replace(r'\right', '')):
      assert _verified('boxed', True, rf'答案是 \boxed{{{stated}}}', a) is Outcome.CORRECT, stated
  # The nearest texts: 20 neighbours of each in the order of their characters.
  pairs = [(a, b) for i, a in enumerate(answers) for b in (*answers[max(0, i - 10):i],
                                                           *answers[i + 1:i + 11])]
  same = {(a, b) for a, b in pairs if m._outcome(a, b, lambda left, right: False) is
          Outcome.CORRECT}
  degrees = {frozenset(pair) for pair in same}
  assert degrees == {frozenset(pair) for pair in (('126', r'126^{\circ}'), ('15', r'15^{\circ}'))}


def test_every_answer_of_svamp_is_understood_and_its_neighbours_are_not_right():
  path = DATA / 'math-svamp/SVAMP.json'
  if not path.is_file():
    pytest.skip('../shared/data/math-svamp is not here')
  for row in json.loads(path.read_text(encoding='utf-8'))[::4]:
    right = row['Answer']
    for form, frame in (('boxed', r'\boxed{{{}}}'), ('gsm8k', '#### {}'),
                        ('last_number', 'so it is {}, as said.')):
      verify = m.verifier(form, False)
      for text, is_right in ((f'{right:.0f}', True), (f'{right:.2f}', True), (f'**{right}**', True),
                             (f'{right + 1:.0f}', False), (f'{right:.0f}5', False),
                             (f'-{right:.0f}', right == 0), (f'1/{right:.0f}', right == 1)):
        outcome = verify(frame.format(text), str(right)).outcome
        assert (outcome is Outcome.CORRECT) == is_right, (form, text, right)
