"""Knights and Knaves: puzzles with exactly one solution, found by trying all of them.

Each of n people is a knight, all of whose statements are true, or a knave, all of whose
statements are false. Person i makes one statement; with k_i true where i is a knight, an
assignment is a solution iff k_i = truth of statement i for every i.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxrl_pt import config
from jaxrl_pt.data.generated import Problem

_NAMES = ('Alice', 'Bob', 'Carol', 'David', 'Emma', 'Frank', 'Grace', 'Henry', 'Iris', 'Jack')
_INTRODUCTION = ('On an island every person is either a knight, who always tells the truth, or a '
                 'knave, who always lies. You meet {names}. ')
_QUESTION = 'So who is a knight and who is a knave?'
# How the claims a and b of a statement are joined: its text, and its truth on bool arrays.
_JOINS: tuple[tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]], ...] = (
    ('{a}', lambda a, b: a),
    ('{a} and {b}', lambda a, b: a & b),
    ('{a} or {b}', lambda a, b: a | b),
    ('if {a} then {b}', lambda a, b: ~a | b),
    ('{a} if and only if {b}', lambda a, b: a == b),
)


@dataclass(frozen=True)
class Claim:
  """The claim that `person` is a knight, or that `person` is a knave."""

  person: int
  is_knight: bool

  def truth(self, knights_AP: np.ndarray) -> np.ndarray:
    """Whether the claim holds under each assignment, bool[A]."""
    return knights_AP[:, self.person] == self.is_knight


@dataclass(frozen=True)
class Statement:
  """A statement of two claims that `_JOINS[join]` joins."""

  join: int
  first: Claim
  second: Claim

  def truth(self, knights_AP: np.ndarray) -> np.ndarray:
    """Whether the statement holds under each assignment, bool[A]."""
    return _JOINS[self.join][1](self.first.truth(knights_AP), self.second.truth(knights_AP))


def assignments(num_people: int) -> np.ndarray:
  """Every way in which P people are knights (True) and knaves, bool[2ᴾ, P]."""
  numbers = np.arange(2**num_people)
  return (numbers[:, None] >> np.arange(num_people)) & 1 == 1


def solutions(statements: list[Statement]) -> np.ndarray:
  """All assignments under which exactly the knights' statements hold, bool[X, P]."""
  knights_AP = assignments(len(statements))
  consistent = [s.truth(knights_AP) == knights_AP[:, i] for i, s in enumerate(statements)]
  return knights_AP[np.logical_and.reduce(consistent)]


def puzzle(source: config.KnightsAndKnaves, index: int) -> Problem:
  """Puzzle `index`: statements are drawn until there is exactly one solution."""
  rng = np.random.default_rng([source.seed, index])
  num_people = int(rng.integers(source.min_people, source.max_people + 1))
  names = [str(name) for name in rng.choice(_NAMES, num_people, replace=False)]
  while True:
    statements = [_statement(rng, num_people, speaker) for speaker in range(num_people)]
    found = solutions(statements)
    if len(found) == 1:
      break
  said = ' '.join(f'{name} says: "{_text(s, names)}."'
                  for name, s in zip(names, statements, strict=True))
  prompt = _INTRODUCTION.format(names=_list(names)) + said + ' ' + _QUESTION
  answer = ', '.join(_role(name, bool(k)) for name, k in zip(names, found[0], strict=True))
  return Problem(index, prompt, answer, f'puzzle {index} of KnightsAndKnaves')


def _statement(rng: np.random.Generator, num_people: int, speaker: int) -> Statement:
  """Draws a statement whose first claim is about another person than the speaker.

  The second claim, if there is one, may be about anyone but that person. Two people who make plain
  claims of each other never have exactly one solution, so joined claims are needed.
  """
  first = int(rng.choice([p for p in range(num_people) if p != speaker]))
  second = int(rng.choice([p for p in range(num_people) if p != first]))
  knight = rng.integers(0, 2, 2) == 1
  return Statement(int(rng.integers(len(_JOINS))), Claim(first, bool(knight[0])),
                   Claim(second, bool(knight[1])))


def _text(statement: Statement, names: list[str]) -> str:
  a, b = (_role(names[c.person], c.is_knight) for c in (statement.first, statement.second))
  return _JOINS[statement.join][0].format(a=a, b=b)


def _role(name: str, is_knight: bool) -> str:
  return f'{name} is a {"knight" if is_knight else "knave"}'


def _list(names: list[str]) -> str:
  return ', '.join(names[:-1]) + ' and ' + names[-1]
