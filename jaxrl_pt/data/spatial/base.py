"""What a task of spatial reasoning is, and how an answer to one is graded.

An item is a function of (seed, split, task, level, index) alone: its numbers come from a
counter-based generator of its own, so that item i does not depend on any other. A scene is a frozen
dataclass of tuples. Two scenes that look alike must be equal: a task keeps its things in an order
that the picture determines, because scenes are dealt out to the splits by what they hold.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
import hashlib
import re
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrl_pt.errors import UserError

Capability = Literal['relation', 'transformation', 'perspective', 'navigation', 'memory',
                     'quantity']
# The processes that 11Plus-Bench tells apart, arXiv 2508.20068.
Process = Literal['pattern_matching', 'spatial_relation', 'spatial_manipulation',
                  'logical_deduction']
Split = Literal['train', 'held_out', 'size', 'composition', 'appearance']
SPLITS: tuple[Split, ...] = ('train', 'held_out', 'size', 'composition', 'appearance')
NUM_TRAINED_LEVELS = 3
MAX_ANSWER_CHARS = 1000
_NUMBER = re.compile(r'[0-9]{1,6}(\.[0-9]{1,6})?', re.ASCII)
# The tolerances 1 - θ of mean relative accuracy, θ = 0.50, 0.55, … 0.95.
_TOLERANCES = tuple(Fraction(percent, 100) for percent in range(5, 55, 5))


class Grade(NamedTuple):
  """What an answer's text is worth.

  correct: right by the exact verifier.
  score: from 0 to 1: the progress rate of a path, the mean relative accuracy of a number, and
    otherwise 1.0 if correct.
  valid: the text has the form of an answer to this question.
  """

  correct: bool
  score: float
  valid: bool


WRONG = Grade(correct=False, score=0.0, valid=True)
INVALID = Grade(correct=False, score=0.0, valid=False)


class Look(NamedTuple):
  """What scenes are painted with: named colours (RGB), shapes that `canvas` draws, a background."""

  colours: tuple[tuple[str, tuple[int, int, int]], ...]
  shapes: tuple[str, ...]
  background: tuple[int, int, int]

  def __repr__(self) -> str:
    """The first colour says which look it is: looks share none."""
    return f'Look({self.colours[0][0]}, {len(self.colours)}, {len(self.shapes)})'

  def rgb(self, colour: str) -> tuple[int, int, int]:
    """The RGB of a colour's name."""
    return dict(self.colours)[colour]


# Training and the split `appearance` share neither a colour nor a shape.
TRAINED_LOOK = Look(
    (('red', (225, 45, 40)), ('green', (55, 175, 70)), ('blue', (60, 100, 245)),
     ('yellow', (245, 220, 50)), ('white', (245, 245, 245)), ('pink', (245, 130, 200)),
     ('cyan', (60, 210, 230))),
    ('square', 'disc', 'triangle', 'plus', 'diamond'), (24, 24, 28))
OTHER_LOOK = Look(
    (('orange', (240, 140, 30)), ('purple', (150, 60, 200)), ('brown', (125, 75, 35)),
     ('navy', (20, 30, 110)), ('olive', (130, 135, 30)), ('teal', (0, 140, 140)),
     ('crimson', (170, 0, 60))),
    ('ring', 'frame', 'hourglass', 'cross', 'chevron'), (236, 230, 214))


class Task(NamedTuple):
  """A task as pure functions of a scene, which is a frozen dataclass of the task's own.

  name: the task's name.
  capability, process: what it tries.
  num_levels: levels 1 to 3 are trained on, 4 and above are the split `size`.
  num_pictures: pictures of an item at most.
  draw: (rng, level, look, whether it must be a composition that is never trained on) → scene.
  twin: the same scene with one relation changed (one thing moved, one step or one cell changed),
    all else equal, and another answer; None if this scene has none, and then it is not used.
  pictures: (scene, side) → u8[N, side, side, 3].
  question: says how to answer, and never what the pictures show.
  answer: the canonical answer.
  options: every answer that could be right to such a question; () for numbers and paths.
  describe: the scene in words or symbols, from which the question can be answered.
  grade: the exact verifier of an answer's text.
  chance: the expected score of the best answer that does not look, e.g. 1 / len(options).
  """

  name: str
  capability: Capability
  process: Process
  num_levels: int
  num_pictures: int
  draw: Callable[[np.random.Generator, int, Look, bool], Any]
  twin: Callable[[np.random.Generator, Any], Any]
  pictures: Callable[[Any, int], np.ndarray]
  question: Callable[[Any], str]
  answer: Callable[[Any], str]
  options: Callable[[Any], tuple[str, ...]]
  describe: Callable[[Any], str]
  grade: Callable[[Any, str], Grade]
  chance: Callable[[Any], float]


def generator(seed: int, split: str, task: str, level: int, index: int) -> np.random.Generator:
  """The random numbers of one item: Philox with a key for all but the index, which it counts."""
  named = f'{seed} {split} {task} {level}'.encode()
  key = int.from_bytes(hashlib.blake2b(named, digest_size=16).digest(), 'little')
  return np.random.Generator(np.random.Philox(key=key, counter=index << 128))


def no_composition(task: str, is_unseen: bool) -> None:
  """Refuses unseen compositions for a task that has none.

  Raises:
    UserError: `is_unseen`.
  """
  if is_unseen:
    raise UserError(f'The task {task} has no split composition: only program composes operations; '
                    'choose train, held_out, size or appearance.')


def folded(text: str) -> str | None:
  """An answer's text without blanks at its ends and without case; None if it is too long."""
  return None if len(text) > MAX_ANSWER_CHARS else text.strip().casefold()


def grade_text(answer: str, options: Sequence[str], text: str) -> Grade:
  """Grades a text that must be one of the options, up to case and blanks at its ends."""
  given = folded(text)
  if given is None or given not in [option.casefold() for option in options]:
    return INVALID
  return Grade(True, 1.0, True) if given == answer.casefold() else WRONG


def choosing(name: str, capability: Capability, process: Process, num_levels: int,
             num_pictures: int, draw: Callable[[np.random.Generator, int, Look, bool], Any],
             twin: Callable[[np.random.Generator, Any], Any],
             pictures: Callable[[Any, int], np.ndarray], question: Callable[[Any], str],
             answer: Callable[[Any], str], options: Callable[[Any], tuple[str, ...]],
             describe: Callable[[Any], str]) -> Task:
  """A task whose answer is one of its options, each as likely as another; arguments of `Task`."""
  return Task(name, capability, process, num_levels, num_pictures, draw, twin, pictures, question,
              answer, options, describe,
              grade=lambda scene, text: grade_text(answer(scene), options(scene), text),
              chance=lambda scene: 1 / len(options(scene)))


def number(text: str) -> Fraction | None:
  """A text as a number: digits with or without decimals, at most six of each; else None."""
  given = folded(text)
  return None if given is None or _NUMBER.fullmatch(given) is None else Fraction(given)


def grade_number(answer: int, text: str) -> Grade:
  """Grades a number by its mean relative accuracy (VSI-Bench), compared exactly.

  MRA = 1/10 Σ_θ 1[|given - answer| / answer ≤ 1 - θ] for θ = 0.50, 0.55, … 0.95.
  """
  given = number(text)
  if given is None:
    return INVALID
  error = abs(given - answer) / answer
  return Grade(given == answer, sum(error <= t for t in _TOLERANCES) / len(_TOLERANCES), True)


def best_constant(answers: Sequence[int]) -> float:
  """The best mean score of one number against equally likely answers: the chance of a number."""
  candidates = range(min(answers), max(answers) + 1)
  return max(float(np.mean([grade_number(answer, str(guess)).score for answer in answers]))
             for guess in candidates)
