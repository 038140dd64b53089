"""Every task of reasoning-gym by its name: deterministic, and verified by its own scorer."""

import json
import os
import subprocess
import sys

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data import gym_questions, problems, sources
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import build, gym
from jaxrl_pt.verifiers.pool import Pool
from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict

reasoning_gym = pytest.importorskip('reasoning_gym')
from reasoning_gym.factory import DATASETS  # noqa: E402 only where the extra is there

# A mixture of other tasks, which needs settings of its own.
MIXTURE = 'composite'
# The library gives no solution, only a scorer.
NO_ANSWER = {'boxnet', 'graph_color', 'propositional_logic', 'rubiks_cube', 'rush_hour'}
# Scored right by the library whatever the answer says: `False` is what it reads.
ACCEPTS_ANYTHING = {'game_of_life_halting'}
TASKS = sorted(set(DATASETS) - {MIXTURE})


_SOLVE = """
import json, sys, reasoning_gym
made = {}
for task in sys.argv[1:]:
  entry = reasoning_gym.create_dataset(task, seed=1, size=1)[0]
  made[task] = [entry['question'], str(entry['answer'])]
print('\\n' + json.dumps(made))
"""


@pytest.fixture(scope='module')
def made():
  """Question and the library's own solution of the first problem of every task."""
  said = subprocess.run([sys.executable, '-c', _SOLVE, *TASKS], capture_output=True, text=True,
                        check=True, env={**os.environ, **gym_questions.HASH_SEED}).stdout
  return json.loads(said.splitlines()[-1])


def _reference(task: str, size: int = 1, index: int = 0) -> str:
  return json.dumps({'task': task, 'seed': 1, 'size': size, 'settings': [], 'index': index})


def test_there_are_the_tasks_that_the_library_promises():
  assert len(TASKS) > 100 and NO_ANSWER | ACCEPTS_ANYTHING < set(TASKS)


def test_every_task_makes_and_verifies_a_problem(made):
  items = []
  for task, (_, solution) in made.items():
    items += [(f'<think>…</think><answer>{solution}</answer>', _reference(task)),
              ('<answer>zzz</answer>', _reference(task)), (solution, _reference(task))]
  with Pool(cfg.GymVerifier(), cfg.VerifierPool(num_workers=2, cpu_seconds=30)) as pool:
    verified = pool.submit(items).result()
  for i, task in enumerate(TASKS):
    right, wrong, untagged = verified[3 * i:3 * i + 3]
    assert untagged.outcome is Outcome.UNPARSED, task
    if task not in NO_ANSWER:
      assert right.outcome is Outcome.CORRECT, (task, right)
    if task not in ACCEPTS_ANYTHING:
      assert wrong.outcome in (Outcome.WRONG, Outcome.UNPARSED), (task, wrong)
    assert 0 <= wrong.score <= 1 and 0 <= right.score <= 1, task


def test_every_task_pays_nothing_for_an_answer_that_holds_the_right_one(made):
  """Most scorers pay len(right) / len(stated) there; the tasks below take such text as right."""
  def verified(partial_credit: bool, stated: str) -> list[ResponseVerdict]:
    items = [(f'<answer>{stated.format(solution)}</answer>', _reference(task))
             for task, (_, solution) in made.items()]
    settings = cfg.GymVerifier(partial_credit=partial_credit)
    with Pool(settings, cfg.VerifierPool(num_workers=2, cpu_seconds=30)) as pool:
      return pool.submit(items).result()

  credited = 0
  for plain, paid in zip(verified(False, 'zzz {} zzz'), verified(True, 'zzz {} zzz'), strict=True):
    assert plain.outcome is paid.outcome and set(plain.parts) == {'answer'}
    assert plain.score == paid.parts['answer'] and (plain.score > 0) == (
        plain.outcome is Outcome.CORRECT)
    assert paid.parts['partial'] * paid.parts['answer'] == 0 <= paid.parts['partial'] < 1
    credited += paid.parts['partial'] > 0
  assert credited > 50


@pytest.mark.parametrize('task, size, index', [('chain_sum', 9, 4), ('gcd', 9, 2)])
def test_partial_credit_is_paid_only_on_request_and_apart(task, size, index):
  place = _reference(task, size, index)
  right = reasoning_gym.create_dataset(task, seed=1, size=size)[index]['answer']
  for partial_credit in (False, True):
    verify = gym.verifier('text', partial_credit)
    assert verify(right, place).score == 1.0
    longer = verify(f'{right}0', place)
    assert longer.outcome is Outcome.WRONG and longer.parts['answer'] == 0.0
    assert longer.score == (len(right) / (len(right) + 1) if partial_credit else 0.0)
  assert build.part_names(cfg.GymVerifier(partial_credit=True)) == ('answer', 'partial')


def test_a_long_answer_with_a_character_too_many_is_not_right():
  """0.995 by the library, whose credit for a piece of the answer is its share of characters."""
  assert gym.parts(200 / 201, False) == {'answer': 0.0}
  assert gym.parts(200 / 201, True) == {'answer': 0.0, 'partial': 200 / 201}


def test_problems_depend_on_seed_and_index_alone(made):
  task = 'polynomial_multiplication'  # follows the order of sets
  again, other = (problems.load(cfg.Problems(cfg.ReasoningGym(task, 3, seed=seed),
                                             held_out=0.0))[0] for seed in (1, 2))
  assert again[0].prompt == made[task][0] != other[0].prompt
  reference = json.loads(again[2].answer)
  entry = gym.restored(reference.pop('entry'))
  assert reference == json.loads(_reference(task, 3, 2)) and entry['question'] == again[2].prompt


_JUDGE = """
import json, sys
from jaxrl_pt.verifiers import gym
verify = gym.verifier('text', False)
for response, reference in json.load(sys.stdin):
  print(verify(response, reference).outcome.value)
"""
# They follow the order of sets, and so the hashes of strings.
HASHED = ('isomorphic_strings', 'knight_swap', 'polynomial_multiplication', 'ransom_note',
          'word_ladder')


@pytest.mark.slow
def test_the_problem_that_was_asked_is_verified_whatever_strings_hash_to():
  items = [(p.demonstration, p.answer) for task in HASHED for p in problems.load(
      cfg.Problems(cfg.ReasoningGym(task, 6, seed=1), held_out=0.0))[0]]
  for seed in ('1', '2'):
    said = subprocess.run([sys.executable, '-c', _JUDGE], input=json.dumps(items), text=True,
                          stdout=subprocess.PIPE, check=True,
                          env={**os.environ, 'PYTHONHASHSEED': seed}).stdout
    assert said.split() == ['correct'] * len(items)


@pytest.mark.parametrize('entry', [
    {'a': (1, (2.5, None)), 'b': [True, 'x'], 'c': {1: {'d'}, (2, 3): frozenset()}},
    {'~tuple': [1]}, {}, {'~dict': ({'~set': []},)}])
def test_what_the_library_knows_of_a_problem_travels_whole(entry):
  assert gym.restored(json.loads(json.dumps(gym_questions.plain(entry)))) == entry


def test_every_tasks_problem_travels_whole():
  for task in TASKS:
    entry = reasoning_gym.create_dataset(task, seed=1, size=1)[0]
    assert gym.restored(json.loads(json.dumps(gym_questions.plain(entry)))) == entry, task


def test_a_task_that_does_not_exist_is_the_users_mistake():
  with pytest.raises(UserError, match="ReasoningGym.task = 'chain_sums'"):
    problems.load(cfg.Problems(cfg.ReasoningGym('chain_sums', 1)))


def test_settings_reach_the_task_its_demonstrations_and_its_scorer():
  source = cfg.ReasoningGym('chain_sum', 20, settings=(('max_terms', 2), ('max_digits', 1)))
  found = problems.load(cfg.Problems(source, held_out=0.0))[0]
  for problem in found:
    first, sign, second = problem.prompt.split(': ')[1].removesuffix(' =').split()
    right = int(first) + int(second) * (1 if sign == '+' else -1)
    assert max(int(first), int(second)) < 10 and problem.demonstration == str(right)
  verify = gym.verifier('text', False)
  assert verify(found[7].demonstration, found[7].answer).outcome is Outcome.CORRECT
  assert verify('77', found[7].answer).outcome is Outcome.WRONG
  texts = list(sources.documents(cfg.Demonstrations(source)))
  assert texts == [p.prompt + p.demonstration for p in found]


def test_a_setting_that_the_task_does_not_have_is_the_users_mistake():
  source = cfg.ReasoningGym('chain_sum', 1, settings=(('max_trems', 2),))
  with pytest.raises(UserError, match=r"ReasoningGym.settings = .*'max_trems'.* 'chain_sum'"):
    problems.load(cfg.Problems(source))


@pytest.mark.parametrize('text, found', [
    ('<answer> 4 </answer>', '4'), ('<answer>1</answer><answer>2</answer>', '2'),
    ('<answer>1', None), ('1</answer>', None), ('<answer></answer>', None), ('', None)])
def test_answer_between_tags(text, found):
  assert gym.extract(text, 'tags') == found
  assert gym.extract(' 4 ', 'text') == '4' and gym.extract(' ', 'text') is None
