"""How the maths verifier verifies real answers: `python tools/measure_answers.py DATA`.

DATA holds math-gsm8k, math-svamp and math-olymmath. Every response is built from data alone:

    gsm8k labels   5,276 solutions of language models, each labelled right or wrong
    gsm8k, svamp,  the right answer as models write it, of which all should be paid, and answers
    olymmath       that differ from it, of which none should
"""

import gzip
import json
from pathlib import Path
import sys

from jaxrl_pt.verifiers import math
from jaxrl_pt.verifiers.response_verdict import Outcome

_SOLUTIONS = ('6b_finetuning', '6b_verification', '175b_finetuning', '175b_verification')
_RIGHT = ('{}', '**{}**', '${}$', '{}.', '{},', 'x = {}', '= {}', '{} dollars')
_WRONG = ('{}1', '-1 + {}', '{} 5', '5 {}', 'not {}', r'\neq {}', '{} or 5', '3.75 = {}', '1/{}',
          '({})^2', '> {}', '{}?')


def _labels(folder: Path) -> str:
  verify = math.verifier('last_number', True)
  agree = total = 0
  with gzip.open(folder / 'example_model_solutions.jsonl.gz', 'rt', encoding='utf-8') as rows:
    for row in map(json.loads, rows):
      reference = row['ground_truth'].rpartition('A:')[2]
      for model in _SOLUTIONS:
        outcome = verify(row[model]['solution'], reference).outcome
        agree += (outcome is Outcome.CORRECT) == row[model]['is_correct']
        total += 1
  return f'labels agreed with: {agree} of {total}'


def _paid(answers: list[str], forms: tuple[str, ...]) -> str:
  verify = math.verifier('boxed', True)
  paid = sum(verify(r'so \boxed{' + form.format(answer) + '}', answer).outcome is Outcome.CORRECT
             for answer in answers for form in forms)
  return f'{paid} of {len(answers) * len(forms)} paid'


def main(data: Path) -> None:
  """Prints the counts."""
  gsm8k = [json.loads(line)['answer'].rpartition('####')[2].strip() for line in
           (data / 'math-gsm8k/test.jsonl').read_text(encoding='utf-8').splitlines()]
  svamp = [f'{row["Answer"]:.0f}' for row in
           json.loads((data / 'math-svamp/SVAMP.json').read_text(encoding='utf-8'))]
  olymmath = [json.loads(line)['answer']
              for path in sorted((data / 'math-olymmath').glob('*.jsonl'))
              for line in path.read_text(encoding='utf-8').splitlines()]
  print('gsm8k,', _labels(data / 'math-gsm8k'), flush=True)
  for name, answers, right in (('gsm8k', gsm8k, _RIGHT), ('svamp', svamp, _RIGHT),
                               ('olymmath', olymmath, _RIGHT[:5])):
    distinct = sorted({a for a in answers if a not in ('0', '1', '5')})
    print(f'{name}, {len(distinct)} answers: right ones, {_paid(distinct, right)};', end=' ',
          flush=True)
    print(f'wrong ones, {_paid(distinct, _WRONG)}', flush=True)


if __name__ == '__main__':
  main(Path(sys.argv[1]))
