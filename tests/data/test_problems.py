"""Problems: what is asked when, refusals, and generated tasks by the meaning of their text."""

import dataclasses
import json
from pathlib import Path
import re

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data import generated, problems, sources
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import math, text

CASES = Path(__file__).resolve().parents[2] / '../shared/cases/from_public_reports.jsonl'
ARITHMETIC = cfg.Arithmetic(size=60, num_terms=3, num_digits=2, noise=0.5, seed=7)
CHECKS = cfg.RedundantChecks(size=300, min_steps=2, max_steps=5, max_checks=4, noise=0.5, seed=7)


def _jsonl(tmp_path, *rows):
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n'.join(json.dumps(row) if isinstance(row, dict) else row for row in rows),
                  encoding='utf-8')
  return cfg.JsonlProblems(str(path))


# --- Loading ------------------------------------------------------------------------


def test_held_out_problems_follow_from_the_text_alone():
  settings = cfg.Problems(ARITHMETIC, held_out=0.3)
  training, held_out = problems.load(settings)
  assert len(training) + len(held_out) == 60 and 5 < len(held_out) < 35
  assert not {p.prompt for p in training} & {p.prompt for p in held_out}
  more = problems.load(dataclasses.replace(
      settings, source=dataclasses.replace(ARITHMETIC, size=90)))
  assert [p for p in more[1] if p.id < 60] == held_out
  assert problems.load(dataclasses.replace(settings, held_out=0.0))[1] == []


def test_template_goes_round_the_prompt_and_braces_stay():
  training, _ = problems.load(cfg.Problems(ARITHMETIC, template='{Q} {prompt}\n{}', held_out=0.0))
  assert training[0].prompt == '{Q} ' + generated.problem(ARITHMETIC, 0).prompt + '\n{}'


def test_jsonl_rows_and_numbers_as_answers(tmp_path):
  source = _jsonl(tmp_path, {'question': 'a?', 'answer': 'b'}, '', {'question': 'c', 'answer': 7})
  training, _ = problems.load(cfg.Problems(source, held_out=0.0))
  assert [(p.id, p.prompt, p.answer) for p in training] == [(0, 'a?', 'b'), (1, 'c', '7')]
  assert training[1].place.endswith('rows.jsonl:3')


@pytest.mark.parametrize('row, message', [
    ('nonsense', 'rows.jsonl:2 is not JSON'), ('[1]', 'rows.jsonl:2 is not a JSON object'),
    ({'question': 'a'}, r"no text in the field 'answer': set JsonlProblems.answer_field to one of "
                        r"'question'"),
    ({'question': True, 'answer': 'b'}, "no text in the field 'question'"),
    ('{"question": "\\ud800", "answer": "b"}', 'half of a surrogate pair')])
def test_bad_rows_are_named(tmp_path, row, message):
  source = _jsonl(tmp_path, {'question': 'a', 'answer': 'b'}, row)
  with pytest.raises(UserError, match=message):
    problems.load(cfg.Problems(source, held_out=0.0))


@pytest.mark.parametrize('written, answer', [
    ('0.00001', '0.00001'), ('1e-5', '0.00001'), ('1e16', '10000000000000000'), ('51.0', '51.0'),
    ('1.50', '1.50'), ('0.1', '0.1'), ('-2.5e3', '-2500'), ('7', '7'), ('-0.0', '-0.0'),
    ('0.1000000000000000055511151231257827', '0.1000000000000000055511151231257827'),
    ('123456789012345678901234567890', '123456789012345678901234567890'), ('1E400', '1E+400')])
def test_json_numbers_keep_the_digits_of_their_file(tmp_path, written, answer):
  source = _jsonl(tmp_path, f'{{"question": {written}, "answer": {written}}}')
  training, _ = problems.load(cfg.Problems(source, held_out=0.0))
  assert (training[0].prompt, training[0].answer) == (answer, answer)
  assert math.equal(written, training[0].answer)


@pytest.mark.skipif(not CASES.is_file(), reason='../shared/cases is not here')
def test_references_from_public_reports(tmp_path):
  rows = [json.loads(line) for line in CASES.read_text(encoding='utf-8').splitlines()]
  numbers = [row for row in rows if row['fault'] == 'F10']
  words = [row['input'] for row in rows if row['fault'] == 'F19']
  assert len(numbers) >= 2 and len(words) >= 3
  for row in numbers:
    file = tmp_path / 'problems.jsonl'
    file.write_text(row['input']['problems'], encoding='utf-8')
    problem, = problems.load(cfg.Problems(cfg.JsonlProblems(str(file)), held_out=0.0))[0]
    found = math.verifier('boxed', False)(row['input']['response'], problem.answer)
    assert found.outcome.value == row['expected'] == 'correct', row
  for case in words:
    assert text.verify_words(case['response'], case['reference'], 1, 10, 2).parts['word'] == 1 / 3


@pytest.mark.parametrize('written, message', [
    ('NaN', "rows.jsonl:2 has nan in the field 'answer'"), ('-Infinity', 'rows.jsonl:2 has -inf'),
    ('""', r"rows.jsonl:2 has no answer in the field 'answer' \(it holds ''\)"),
    ('" \\n"', 'rows.jsonl:2 has no answer'), ('"NaN"', 'rows.jsonl:2 has no answer'),
    ('"nan "', 'leave the row out'), ('null', "rows.jsonl:2 has no text in the field 'answer'")])
def test_references_that_nothing_can_equal_are_refused(tmp_path, written, message):
  source = _jsonl(tmp_path, {'question': 'a', 'answer': 'b'},
                  f'{{"question": "q", "answer": {written}}}')
  with pytest.raises(UserError, match=message):
    problems.load(cfg.Problems(source, held_out=0.0))


def test_nothing_to_train_on_or_to_hold_out_is_said():
  with pytest.raises(UserError, match='no problem to train on'):
    problems.load(cfg.Problems(ARITHMETIC, held_out=1.0))
  with pytest.raises(UserError, match='None of the 1 problems of Arithmetic is held out'):
    problems.load(cfg.Problems(cfg.Arithmetic(1), held_out=1e-9))


# --- Encoding and order -------------------------------------------------------------


def test_prompts_hold_tokens_answers_ids_and_references():
  training, _ = problems.load(cfg.Problems(ARITHMETIC, held_out=0.0))
  encoded = problems.encode(training, ByteTokenizer(), prompt_len=12)
  prompts, references = encoded.prompts(np.array([3, 1]))
  decode = ByteTokenizer().decode
  for row, i in enumerate((3, 1)):
    assert decode(prompts.tokens[row, :prompts.lengths[row]]) == training[i].prompt
    assert not prompts.tokens[row, prompts.lengths[row]:].any()
    answer = prompts.extras['answer'][row, :prompts.extras['answer_lengths'][row]]
    assert bytes(answer.tolist()).decode() == training[i].answer == references[row]
    assert prompts.tokens[row, 0] == ByteTokenizer().bos_id  # As documents begin in training.
  assert prompts.tokens.shape == (2, 12) and prompts.ids.tolist() == [3, 1]
  assert set(prompts.extras) == {'answer', 'answer_lengths'}
  assert {a.dtype.name for a in jax.tree.leaves(prompts)} == {'int32'}


def test_each_epoch_asks_everything_once_in_a_new_order():
  training, _ = problems.load(cfg.Problems(ARITHMETIC, held_out=0.0))
  encoded = problems.encode(training, ByteTokenizer(), prompt_len=12)
  ids = np.concatenate([problems.step_prompts(encoded, 8, 0, step)[0].ids for step in range(15)])
  assert sorted(ids[:60]) == sorted(ids[60:]) == list(range(60))
  assert ids[:60].tolist() != ids[60:].tolist()
  again, _ = problems.step_prompts(encoded, 8, 0, 9)  # whatever came before
  np.testing.assert_array_equal(again.ids, ids[72:80])
  assert problems.step_prompts(encoded, 8, 1, 0)[0].ids.tolist() != ids[:8].tolist()


def test_digest_changes_with_any_text():
  training, _ = problems.load(cfg.Problems(ARITHMETIC, held_out=0.0))
  digest = lambda rows: problems.encode(rows, ByteTokenizer(), 12).digest
  other = [*training[:-1], dataclasses.replace(training[-1], answer='0')]
  assert digest(training) == digest(list(training)) != digest(other)
  assert digest(training) != digest(training[::-1])


def test_prompts_too_long_or_empty_are_named(tmp_path):
  source = _jsonl(tmp_path, {'question': 'ab', 'answer': '1'}, {'question': 'abc', 'answer': '2'})
  training, _ = problems.load(cfg.Problems(source, held_out=0.0))
  with pytest.raises(UserError, match=r'rows.jsonl:2 has 4 tokens, and Rollouts.prompt_len is 3'):
    problems.encode(training, ByteTokenizer(), 3)
  empty = dataclasses.replace(training[0], prompt='')
  with pytest.raises(UserError, match='has 0 tokens.*leave the row out'):
    problems.encode([empty], ByteTokenizer(), 2)


# --- Generated tasks ----------------------------------------------------------------


def test_arithmetic_demonstrations_are_right_but_for_one_slip():
  right = 0
  for i in range(ARITHMETIC.size):
    problem = generated.problem(ARITHMETIC, i)
    terms = [int(n) for n in problem.prompt[:-1].split('+')]
    assert len(terms) == 3 and sum(terms) == int(problem.answer)
    steps, _, answer = problem.demonstration.rpartition('#')
    equations = re.findall(r'(\d+)\+(\d+)=(\d+);', steps)
    assert ''.join(f'{a}+{b}={c};' for a, b, c in equations) == steps
    assert [int(equations[0][0]), *(int(b) for _, b, _ in equations)] == terms
    assert equations[1][0] == equations[0][2] and equations[1][2] == answer
    slips = [int(c) - int(a) - int(b) for a, b, c in equations]
    assert sum(s != 0 for s in slips) <= 1 and all(0 <= s <= 9 for s in slips)
    assert (answer == problem.answer) == (sum(slips) == 0)
    right += answer == problem.answer
  assert 15 < right < 45


def test_redundant_checks_need_their_steps_and_checks_change_nothing():
  complete, num_checks = 0, set()
  for i in range(CHECKS.size):
    problem = generated.problem(CHECKS, i)
    digits = [int(d) for d in problem.prompt[:-1]]
    assert 3 <= len(digits) <= 6 and sum(digits) % 10 == int(problem.answer)
    steps, checks, answer = re.fullmatch(r'((?:\+\d=\d)*)((?:\?\d)*)#(\d)',
                                         problem.demonstration).groups()
    total = digits[0]
    for place, (digit, result) in enumerate(re.findall(r'\+(\d)=(\d)', steps), 1):
      total = (total + digits[place]) % 10
      assert (int(digit), int(result)) == (digits[place], total)
    assert set(checks[1::2]) <= {str(total)} and answer == str(total)
    num_checks.add(len(checks) // 2)
    complete += len(steps) == 4 * (len(digits) - 1)
  assert 110 < complete < 190 and num_checks == {0, 1, 2, 3, 4}


@pytest.mark.parametrize('source', [ARITHMETIC, CHECKS])
def test_generated_problems_depend_on_seed_and_index_alone(source):
  assert generated.problem(source, 4) == generated.problem(
      dataclasses.replace(source, size=5), 4)
  assert generated.problem(source, 4) != generated.problem(
      dataclasses.replace(source, seed=8), 4)
  for noise, wrong in ((0.0, 0), (1.0, source.size)):
    noisy = dataclasses.replace(source, noise=noise)
    found = [generated.problem(noisy, i) for i in range(source.size)]
    num_wrong = sum(p.demonstration.rpartition('#')[2] != p.answer for p in found)
    assert num_wrong == wrong if source is ARITHMETIC or not wrong else num_wrong > 0.8 * wrong


def test_demonstrations_are_documents_to_pretrain_on():
  texts = list(sources.documents(cfg.Demonstrations(ARITHMETIC)))
  first = generated.problem(ARITHMETIC, 0)
  assert len(texts) == 60 and texts[0] == first.prompt + first.demonstration
  assert sources.files(cfg.Demonstrations(ARITHMETIC)) == []


# --- What is held out ---------------------------------------------------------------

SMALL = cfg.Arithmetic(size=400, num_terms=2, num_digits=1, seed=3)  # of 100 sums


def test_held_out_problems_are_distinct_and_never_trained_on():
  settings = cfg.Problems(SMALL, held_out=0.3)
  training, held_out = problems.load(settings)
  trained_on, measured = [p.prompt for p in training], [p.prompt for p in held_out]
  everything = {generated.problem(SMALL, i).prompt for i in range(SMALL.size)}
  assert len(everything) > 90 and len(trained_on) > 200  # Training repeats its prompts.
  assert len(measured) == len(set(measured)) > 15
  assert not set(measured) & set(trained_on) and set(measured) | set(trained_on) == everything
  # What a step asks comes from the training side alone, epoch after epoch.
  encoded = problems.encode(training, ByteTokenizer(), prompt_len=8)
  asked = set()
  for step in range(2 * len(training) // 16):
    tokens = problems.step_prompts(encoded, 16, seed=0, step=step)[0]
    asked |= {ByteTokenizer().decode([t for t in row[:n].tolist() if t < 256])
              for row, n in zip(tokens.tokens, tokens.lengths, strict=True)}
  assert asked == set(trained_on)
  assert list(problems.prompts(settings, held_out=False)) == trained_on
  assert set(problems.prompts(settings, held_out=True)) == set(measured)


def test_a_prompt_that_the_source_repeats_is_measured_once_by_its_first_reference(tmp_path):
  rows = [{'question': f'q{i % 30}', 'answer': str(i)} for i in range(90)]
  settings = cfg.Problems(_jsonl(tmp_path, *rows), held_out=0.4, template='Q: {prompt}')
  training, held_out = problems.load(settings)
  assert len(held_out) == len({p.prompt for p in held_out}) == 30 - len(training) // 3
  assert all(p.prompt == f'Q: q{p.answer}' for p in held_out)
