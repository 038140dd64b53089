"""Sources of problems for reinforcement learning."""

from dataclasses import dataclass
from typing import get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.generated import MOST_PROBLEMS, Generated
from jaxrl_pt.config.pairs import JudgePairs, check_better_is_right


@dataclass(frozen=True)
class JsonlProblems:
  """JSON-lines files (plain or .gz), whose rows have a prompt and a reference answer.

  Numbers count as texts of the digits that the file has. The reference answer must not be blank.
  """

  glob: str
  prompt_field: str = 'question'
  answer_field: str = 'answer'

  def __post_init__(self) -> None:
    for name in ('glob', 'prompt_field', 'answer_field'):
      checks.text(self, name)


@dataclass(frozen=True)
class KnightsAndKnaves:
  """Puzzles of knights, who tell the truth, and knaves, who lie; each has exactly one solution."""

  size: int
  min_people: int = 3
  max_people: int = 7
  seed: int = 0

  def __post_init__(self) -> None:
    checks.size(self, 'size', 1, MOST_PROBLEMS, 256, 'the problems')
    checks.integer(self, 'min_people', 2, 8)
    checks.integer(self, 'max_people', self.min_people, 8)
    checks.integer(self, 'seed', 0)


@dataclass(frozen=True)
class ReasoningGym:
  """A task of the reasoning-gym library by its name, which needs the `gym` extra.

  settings: the task's settings as pairs of name and value: (('max_terms', 3), ('max_digits', 1)).
  """

  task: str
  size: int
  seed: int = 0
  settings: tuple[tuple[str, int | float | str], ...] = ()

  def __post_init__(self) -> None:
    checks.text(self, 'task')
    checks.size(self, 'size', 1, MOST_PROBLEMS, 256, 'the problems')
    checks.integer(self, 'seed', 0)
    is_pair = lambda x: (isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str)
                         and checks.is_plain(x[1]))
    if not isinstance(self.settings, tuple) or not all(map(is_pair, self.settings)):
      checks.fail(self, 'settings',
                  "pairs of a setting's name and its value, as (('max_terms', 3),)")


@dataclass(frozen=True)
class CodeProblems:
  """Programming problems in JSON-lines files of MBPP's format, whose asserts a program must pass.

  shown_tests: how many of a problem's asserts the prompt shows; the first one names the function.
    The others are hidden, so that a policy cannot answer their inputs one by one.
  """

  glob: str
  shown_tests: int = 1

  def __post_init__(self) -> None:
    checks.text(self, 'glob')
    checks.integer(self, 'shown_tests', 0)


@dataclass(frozen=True)
class NumberedGames:
  """Games whose environment draws from the problem all that there is to know of it.

  Problem i is called `game seed.i`.
  """

  size: int
  seed: int = 0

  def __post_init__(self) -> None:
    checks.size(self, 'size', 1, MOST_PROBLEMS, 256, 'the problems')
    checks.integer(self, 'seed', 0)


ProblemSource = (JsonlProblems | KnightsAndKnaves | ReasoningGym | Generated | CodeProblems
                 | NumberedGames | JudgePairs)


@dataclass(frozen=True)
class Problems:
  """The problems to train on, and those that are held out to measure the policy.

  template: the prompt template, with {prompt} where the problem's own text goes.
  is_chat: whether this text is put to the policy as a user's message, in the chat template of the
    model that the run starts from.
  held_out: the share of the prompts, chosen by a hash of their text, that training never sees; each
    of them is measured once.
  """

  source: ProblemSource
  template: str = '{prompt}'
  held_out: float = 0.05
  is_chat: bool = False

  def __post_init__(self) -> None:
    checks.instance(self, 'source', *get_args(ProblemSource))
    if isinstance(self.source, JudgePairs):
      check_better_is_right(self.source.source, 'Problems.source')
    checks.text(self, 'template')
    checks.number(self, 'held_out', 0.0, 1.0)
    checks.flag(self, 'is_chat')
    if self.template.count('{prompt}') != 1:
      checks.fail(self, 'template', 'a text with {prompt} in it once')
