"""Sources of problems for reinforcement learning."""

from dataclasses import dataclass
from typing import get_args

from jaxrl_pt.config import checks

# A problem is a prompt with a reference answer. A generated problem is a function of (seed, index)
# alone, and all problems of a run are held in memory.
MOST_PROBLEMS = 10_000_000


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
class Arithmetic:
  """Sums of num_terms numbers of up to num_digits digits; demonstrations add term by term.

  noise: the share of the demonstrations that go wrong at some step.
  """

  size: int
  num_terms: int = 3
  num_digits: int = 2
  noise: float = 0.5
  seed: int = 0

  def __post_init__(self) -> None:
    checks.size(self, 'size', 1, MOST_PROBLEMS, 256, 'the problems')
    checks.integer(self, 'num_terms', 2, 16)
    checks.integer(self, 'num_digits', 1, 9)
    checks.number(self, 'noise', 0.0, 1.0)
    checks.integer(self, 'seed', 0)


@dataclass(frozen=True)
class RedundantChecks:
  """Sums of digits modulo 10, whose demonstrations end with checks that change nothing.

  min_steps, max_steps: the range of the number of steps that the answer needs; the prompt shows
    one digit more.
  max_checks: a complete demonstration ends with 0 to max_checks redundant checks.
  noise: the share of the demonstrations that stop before the last step, and are then mostly wrong.
  """

  size: int
  min_steps: int = 1
  max_steps: int = 6
  max_checks: int = 8
  noise: float = 0.5
  seed: int = 0

  def __post_init__(self) -> None:
    checks.size(self, 'size', 1, MOST_PROBLEMS, 256, 'the problems')
    checks.integer(self, 'min_steps', 1, 64)
    checks.integer(self, 'max_steps', self.min_steps, 64)
    checks.size(self, 'max_checks', 0, 2**12, 8, 'the demonstrations')
    checks.number(self, 'noise', 0.0, 1.0)
    checks.integer(self, 'seed', 0)


@dataclass(frozen=True)
class HybridSums:
  """Sums of digits modulo 10, of one digit or of many, answered at once or after the steps.

  A demonstration begins with a mark that says which: it thinks, or it answers at once.

  easy_share: the share of easy sums, in which all digits but one are 0, so that the answer can be
    read off; that of the other sums has to be worked out.
  min_steps, max_steps: the range of the number of steps; the prompt shows one digit more.
  think_share: the share of the demonstrations that think.
  slips: the shares of demonstrations that are wrong: easy and hard ones that think, easy and hard
    ones that answer at once. They set what each mode is worth.
  think, think_end, no_think: the three marks, each of one byte that the sums do not use.
  """

  size: int
  easy_share: float = 0.5
  min_steps: int = 3
  max_steps: int = 4
  think_share: float = 0.5
  slips: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
  think: str = '\x01'
  think_end: str = '\x02'
  no_think: str = '\x03'
  seed: int = 0

  def __post_init__(self) -> None:
    checks.size(self, 'size', 1, MOST_PROBLEMS, 256, 'the problems')
    checks.number(self, 'easy_share', 0.0, 1.0)
    checks.integer(self, 'min_steps', 1, 64)
    checks.integer(self, 'max_steps', self.min_steps, 64)
    checks.number(self, 'think_share', 0.0, 1.0)
    if not (isinstance(self.slips, tuple) and len(self.slips) == 4
            and all(checks.is_weight(slip) and 0 <= slip <= 1 for slip in self.slips)):
      checks.fail(self, 'slips', 'four numbers from 0 to 1, as (0.0, 0.0, 0.0, 0.0)')
    marks = self.think, self.think_end, self.no_think
    for name, mark in zip(('think', 'think_end', 'no_think'), marks, strict=True):
      checks.text(self, name)
      if len(mark.encode()) != 1 or mark in '0123456789+=:#' or marks.count(mark) > 1:
        checks.fail(self, name, 'one byte that neither sums nor the other marks use')
    checks.integer(self, 'seed', 0)


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


# Generated problems that have demonstrations, as functions of (seed, index).
Generated = Arithmetic | RedundantChecks | HybridSums
ProblemSource = (JsonlProblems | KnightsAndKnaves | ReasoningGym | Generated | CodeProblems
                 | NumberedGames)


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
    checks.text(self, 'template')
    checks.number(self, 'held_out', 0.0, 1.0)
    checks.flag(self, 'is_chat')
    if self.template.count('{prompt}') != 1:
      checks.fail(self, 'template', 'a text with {prompt} in it once')
