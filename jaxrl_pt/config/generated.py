"""Generated problems, which have demonstrations of the work that leads to the answer."""

from dataclasses import dataclass

from jaxrl_pt.config import checks

# A problem is a prompt with a reference answer. A generated problem is a function of (seed, index)
# alone, and all problems of a run are held in memory.
MOST_PROBLEMS = 10_000_000


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


# Generated problems that have demonstrations, as functions of (seed, index).
Generated = Arithmetic | RedundantChecks | HybridSums
