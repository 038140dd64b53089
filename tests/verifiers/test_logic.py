"""Knights and Knaves: the generator against the meaning of its text, and the rewards by part."""

import itertools
import re

import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data import knights
from jaxrl_pt.verifiers import logic
from jaxrl_pt.verifiers.response_verdict import Outcome

REFERENCE = 'Alice is a knight, Bob is a knave'


def _response(answer: str, think: str = 'hm') -> str:
  return f'<think>{think}</think>\n<answer>{answer}</answer>'


@pytest.mark.parametrize('response, outcome, parts', [
    (_response('Alice is a knight, Bob is a knave'), Outcome.CORRECT, (1, 2)),
    (_response('(1) bob is a KNAVE\n(2) Alice is a knight'), Outcome.CORRECT, (1, 2)),
    (_response('Alice is a knave, Bob is a knave'), Outcome.WRONG, (1, -1.5)),
    (_response('Alice is a knight'), Outcome.UNPARSED, (1, -2)),  # a name is missing
    (_response('Alice is a knight, Bob is a knave, Eve is a knave'), Outcome.UNPARSED, (1, -2)),
    (_response('Alice is a knight or knave, Bob is a knave'), Outcome.UNPARSED, (1, -2)),
    (_response('Alice is a knight, Alice is a knave, Bob is a knave'), Outcome.UNPARSED, (1, -2)),
    (_response('Alice is a knight, Bob is a knave, the knights win'), Outcome.UNPARSED, (1, -2)),
    (_response(''), Outcome.UNPARSED, (1, -2)),
    (_response('Alice is not a knight, Bob is a knave'), Outcome.UNPARSED, (1, -2)),
    ('', Outcome.UNPARSED, (-1, -2)),
    ('Alice is a knight, Bob is a knave', Outcome.UNPARSED, (-1, -2)),
    (f'<answer>{REFERENCE}</answer><think></think>', Outcome.UNPARSED, (-1, -2)),
    (f'<think><answer>{REFERENCE}</answer></think>', Outcome.UNPARSED, (-1, -2)),
    (f'<think></think><answer>{REFERENCE}', Outcome.UNPARSED, (-1, -2)),
    (_response(REFERENCE) + _response(REFERENCE), Outcome.UNPARSED, (-1, -2)),
    (_response(REFERENCE, '</think><think>'), Outcome.UNPARSED, (-1, -2)),
])
def test_rewards_by_part(response, outcome, parts):
  verified = logic.verify(response, REFERENCE)
  assert verified.outcome is outcome
  assert (verified.parts['format'], verified.parts['answer']) == parts
  assert verified.score == sum(parts)  # 3, −0.5, −1 or −3 (docs/methods/short_rl.md)


def test_a_mebibyte_of_claims_is_read():
  for answer in ('Alice is a knight ' * 58_000, 'knave' * 200_000, '<answer>' * 100_000):
    assert logic.verify(_response(answer), REFERENCE).outcome is Outcome.UNPARSED


# --- The generator ------------------------------------------------------------------

SOURCE = cfg.KnightsAndKnaves(size=40, min_people=2, max_people=5, seed=3)


def _meaning(statement: str, roles: dict[str, bool]) -> bool:
  """Truth of a statement read from its text, independently of the generator."""
  def claim(text: str) -> bool:
    name, role = re.fullmatch(r'(\w+) is a (knight|knave)', text).groups()
    return roles[name] == (role == 'knight')

  for joined, truth in ((' if and only if ', lambda a, b: a == b), (' and ', lambda a, b: a and b),
                        (' or ', lambda a, b: a or b)):
    if joined in statement:
      return truth(*map(claim, statement.split(joined)))
  if statement.startswith('if '):
    a, b = statement[3:].split(' then ')
    return not claim(a) or claim(b)
  return claim(statement)


def test_every_puzzle_has_the_reference_as_its_only_solution_by_the_meaning_of_its_text():
  kinds = set()
  for index in range(SOURCE.size):
    puzzle = knights.puzzle(SOURCE, index)
    said = re.findall(r'(\w+) says: "([^"]*)\."', puzzle.prompt)
    names = [name for name, _ in said]
    assert SOURCE.min_people <= len(names) == len(set(names)) <= SOURCE.max_people
    kinds |= {w for _, text in said for w in ('and only', 'if ', ' or ', ' and ') if w in text}
    solved = []
    for values in itertools.product([True, False], repeat=len(names)):
      roles = dict(zip(names, values, strict=True))
      if all(_meaning(text, roles) == roles[name] for name, text in said):
        solved.append(roles)
    reference = {n: r == 'knight' for n, r in re.findall(r'(\w+) is a (\w+)', puzzle.answer)}
    assert solved == [reference]
    assert logic.verify(_response(puzzle.answer), puzzle.answer).score == 3
  assert kinds == {'and only', 'if ', ' or ', ' and '}


def test_puzzles_depend_on_seed_and_index_alone():
  assert knights.puzzle(SOURCE, 5) == knights.puzzle(cfg.KnightsAndKnaves(9, 2, 5, 3), 5)
  assert knights.puzzle(SOURCE, 5) != knights.puzzle(cfg.KnightsAndKnaves(40, 2, 5, 4), 5)
  assert len({knights.puzzle(SOURCE, i).prompt for i in range(40)}) == 40


def test_solutions_by_hand():
  # Ann: "Bob is a knave"; Bob: "Ann is a knave": one of the two lies, either may.
  liars = [knights.Statement(0, knights.Claim(1 - i, False), knights.Claim(1 - i, False))
           for i in range(2)]
  np.testing.assert_array_equal(knights.solutions(liars), [[True, False], [False, True]])
  # Both call the other a knight, Carl says "Ann is a knave and Bob is a knave".
  said = [knights.Statement(0, knights.Claim(1, True), knights.Claim(1, True)),
          knights.Statement(0, knights.Claim(0, True), knights.Claim(0, True)),
          knights.Statement(1, knights.Claim(0, False), knights.Claim(1, False))]
  np.testing.assert_array_equal(knights.solutions(said),
                                [[True, True, False], [False, False, True]])
