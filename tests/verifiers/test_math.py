r"""Mathematical answers: every format, equality, and answers made to game or to hang."""

import fractions
import gzip
import json
from pathlib import Path
import time

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.verifiers import math as m
from jaxrl_pt.verifiers.pool import Pool
from jaxrl_pt.verifiers.response_verdict import Outcome

GSM8K = Path(__file__).resolve().parents[2] / '../shared/data/math-gsm8k'
CORRECT, WRONG, UNPARSED = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSED


# --- Where the answer stands ------------------------------------------------------


@pytest.mark.parametrize('text, found', [
    (r'so \boxed{42}.', '42'),
    (r'\boxed{1} no, \boxed{2}', '2'),  # several: the last
    (r'\boxed{1} and \boxed{2', '1'),  # that is balanced
    (r'\boxed{\boxed{3}}', '3'),  # and opens last
    (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
    (r'\boxed {7}', '7'),
    (r'\boxed{\{1, 2\}}', r'\{1, 2\}'),  # escaped braces are text
    (r'}}}{ \boxed{5} }{{{', '5'),
    (r'a } \boxed{x{y}z}', 'x{y}z'),
    (r'\\boxed{5}', None),  # a line break and the word
    (r'\boxed{}', ''),
    (r'\boxed', None), (r'\boxed{', None), ('boxed{5}', None), ('', None),
])
def test_boxed(text, found):
  assert m.boxed(text) == found


@pytest.mark.parametrize('form, text, found', [
    ('boxed', r'\boxed{ 4 }', '4'), ('boxed', r'\boxed{ }', None), ('boxed', '4', None),
    ('gsm8k', 'so 3\n#### 72', '72'), ('gsm8k', '#### 1\n#### 2\nbye 3', '2'),
    ('gsm8k', '72', None), ('gsm8k', '####\n72', None), ('gsm8k', '####', None),
    ('last_number', 'from 3 to -1,234.5 apples', '-1,234.5'), ('last_number', 'none', None),
    ('last_number', r'\boxed{4} or 5', '5'),
])
def test_extract(form, text, found):
  assert m.extract(text, form) == found


def test_reference_answer():
  assert m.reference_answer('2+2=4\n#### 4') == '4'
  assert m.reference_answer(r'thus \boxed{4}') == '4'
  assert m.reference_answer(' x+1 ') == 'x+1'


# --- Equality ---------------------------------------------------------------------


@pytest.mark.parametrize('text, value', [
    ('12', 12), ('-3', -3), ('+3', 3), ('1,234,567', 1234567), ('$5$', 5), (r'\$5.50', 5.5),
    ('50%', 50), ('.5', 0.5), ('7.', 7), ('2/4', 0.5), (r'\frac{1}{4}', 0.25), (r'\dfrac12', 0.5),
    (r'-\frac{1}{2}', -0.5), (r'\text{ 8 }', 8), ('1 000', 1000), ('1e5', 100000),
])
def test_number(text, value):
  assert m.number(text) == fractions.Fraction(value)


@pytest.mark.parametrize('text', ['nan', 'inf', '-Infinity', '1e', '1/0', r'\frac{1}{0}', '', '-',
                                  'x', '1,2,3,4', '1/2/3', '٣x', '--1', '0x10'])
def test_no_number(text):
  assert m.number(text) is None


def test_equal():
  assert m.equal('0.50', r'\frac{1}{2}') and m.equal(r'\left( 1, 2 \right)', '(1,2)')
  assert m.equal(r'\text{Monday}.', 'Monday') and m.equal('0.1', '1/10')
  assert not m.equal('0.3333333333333333', '1/3') and not m.equal('nan', '0')
  assert not m.equal('12', '1 or 2') and not m.equal('1,2', '12')


# --- Whole responses, without and with sympy ----------------------------------

_LISTED = ', '.join(map(str, range(100)))
_CASES = [
    (r'thus \boxed{72}', '#### 72', CORRECT),
    (r'thus \boxed{71}', '#### 72', WRONG),
    ('72', '72', UNPARSED),
    ('', '72', UNPARSED), (r'\boxed{}', '72', UNPARSED), (r'\boxed{ ~ }', '', WRONG),
    (rf'\boxed{{{_LISTED}}}', '72', WRONG),  # all options listed
    (r'\boxed{1 or 72}', '72', WRONG), (r'\boxed{71,72}', '72', WRONG),
    (r'\boxed{72} \boxed{71}', '72', WRONG), (r'\boxed{71} \boxed{72}', '72', CORRECT),
    (r'\boxed{72', '72', UNPARSED), (r'\boxed{{72}', '72', UNPARSED), ('}' * 1000, '72', UNPARSED),
    (r'\boxed{nan}', '72', WRONG), (r'\boxed{inf}', '72', WRONG), (r'\boxed{-\infty}', '72', WRONG),
    (r'\boxed{1e400}', '72', WRONG), (r'\boxed{0/0}', '72', WRONG),
    (r'\boxed{9^{9^{9^9}}}', '72', WRONG), (r'\boxed{2^{99999999}}', '72', WRONG),
    (r'\boxed{99999!}', '72', WRONG), (r'\boxed{((9!)!)!}', '72', WRONG),
    (rf'\boxed{{{"9" * 900}}}', '72', WRONG),
    (rf'\boxed{{{"0" * 900}72}}', '72', CORRECT), (rf'\boxed{{{"0" * 1000}72}}', '72', WRONG),
    (rf'\boxed{{{"(" * 400}72{")" * 400}}}', '71', WRONG),
    (rf'\boxed{{{"1+" * 499}1}}', '72', WRONG),
]
_MEBIBYTE = [
    (rf'\boxed{{{"7" * (1 << 20)}}}', '72', WRONG), ('\\boxed{' * (1 << 17), '72', UNPARSED),
    ('{' * (1 << 20), '72', UNPARSED), ('\\' * (1 << 20), '72', UNPARSED),
    ('\\boxed{72}' * (1 << 17), '72', CORRECT), (' ' * (1 << 20), '72', UNPARSED),
]


@pytest.mark.parametrize('response, reference, outcome', _CASES)
def test_scores_by_number_and_text(response, reference, outcome):
  assert m.verifier('boxed', False)(response, reference).outcome is outcome


@pytest.mark.parametrize('form', ['boxed', 'gsm8k', 'last_number'])
@pytest.mark.parametrize('character', ['1', ',', '#', '{', '}', '\\', ' ', '$', '.', '-', '!', '/'])
def test_a_mebibyte_of_anything_is_read_in_linear_time(form, character):
  start = time.process_time()
  for text in (character * (1 << 20), r'\boxed{' + character * (1 << 20), '#### ' * (1 << 18)):
    m.verifier(form, False)(text, '72')
  assert time.process_time() - start < 5


def test_a_mebibyte_scores_as_specified():
  for response, reference, outcome in _MEBIBYTE:
    assert m.verifier('boxed', False)(response, reference).outcome is outcome


@pytest.mark.parametrize('text', [
    '1' * 1000, '1,' * 500, '9^' * 500, '^{' * 500, '(' * 1000, '^' + '(' * 900, '!' * 1000,
    r'\text{' * 166, '^' + '-' * 900, '1 ' * 500, '^ ' * 500, '12345' * 199])
def test_nothing_backtracks_on_an_answer_that_is_read(text):
  start = time.process_time()
  m.number(text), m.plain(text), m.equal(text, '1'), m.equal('1', text)
  m.extract(text, 'last_number'), m.extract(text + r'\boxed 5', 'boxed')
  assert time.process_time() - start < 0.5


def test_scores_with_sympy_on_time():
  pytest.importorskip('sympy')
  symbolic = [
      (r'\boxed{x+1}', '1+x', CORRECT), (r'\boxed{\sqrt{8}}', r'2\sqrt{2}', CORRECT),
      (r'\boxed{x+2}', '1+x', WRONG), (r'\boxed{\{2, 1\}}', r'\{1, 2\}', CORRECT),
      (r'\boxed{2^{10}}', '1024', CORRECT), (r'\boxed{5!}', '120', CORRECT),
      (r'\boxed{\{1, 2, 3\}}', r'\{1, 2\}', WRONG), (r'\boxed{\frac{\pi}{2}}', r'\pi/2', CORRECT)]
  cases = [*_CASES, *_MEBIBYTE, *symbolic]
  start = time.monotonic()
  with Pool(cfg.MathVerifier(), cfg.VerifierPool(num_workers=2, cpu_seconds=20)) as pool:
    verified = pool.submit([case[:2] for case in cases]).result()
  for (response, reference, outcome), verdict in zip(cases, verified, strict=True):
    assert verdict.outcome is outcome, (response[:60], reference, verdict)
    assert verdict.score == (outcome is CORRECT)
  assert time.monotonic() - start < 120


# --- Against labels of others -------------------------------------------------------


@pytest.mark.skipif(not GSM8K.is_dir(), reason='../shared/data/math-gsm8k is not here')
def test_agrees_with_the_labels_of_gsm8k_solutions():
  """5,276 solutions labelled right or wrong; their answer is the number at the end."""
  verify = m.verifier('last_number', False)
  agree = total = 0
  with gzip.open(GSM8K / 'example_model_solutions.jsonl.gz', 'rt', encoding='utf-8') as rows:
    for row in map(json.loads, rows):
      reference = row['ground_truth'].rpartition('A:')[2]
      for model in ('6b_finetuning', '6b_verification', '175b_finetuning', '175b_verification'):
        outcome = verify(row[model]['solution'], reference).outcome
        agree += (outcome is CORRECT) == row[model]['is_correct']
        total += 1
  assert (agree, total) == (5276, 5276)
