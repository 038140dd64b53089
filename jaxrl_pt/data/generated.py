"""Problems that are a function of (seed, index), with demonstrations for a warm start.

They are so small that a model of a million parameters learns them from bytes in minutes. Every
response ends with `#` and the answer.
"""

from collections.abc import Iterator
import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxrl_pt import config

MARKER = '#'


@dataclass(frozen=True)
class Problem:
  """What the policy is asked and what the verifier compares with.

  id: its number within its source.
  place: where it stands, for messages.
  demonstration: a worked response, right or wrong; empty where the source has none.
  level: how difficult it is called; empty where the source does not say.
  key: by what problems are held out together; empty for the prompt.
  system: the system message of a chat with this prompt; empty for none.
  """

  id: int
  prompt: str
  answer: str
  place: str
  demonstration: str = ''
  level: str = ''
  key: str = ''
  system: str = ''


class Pair(NamedTuple):
  """Two responses to a query.

  place: where they stand, for messages.
  worked: how the query's answer is worked out, right or wrong; empty where nobody knows.
  """

  place: str
  query: str
  better: str
  worse: str
  worked: str = ''


def arithmetic(source: config.Arithmetic, index: int) -> Problem:
  """A sum such as `47+5+38=`, with the response `47+5=52;52+38=90;#90`.

  A noisy demonstration is off by 1 to 9 at one step and goes on from there.
  """
  rng = np.random.default_rng([source.seed, index])
  terms = [int(n) for n in rng.integers(0, 10**source.num_digits, source.num_terms)]
  slip = _slip(rng, source.noise, source.num_terms - 1)
  error = int(rng.integers(1, 10))
  steps, total = [], terms[0]
  for step, term in enumerate(terms[1:]):
    reached = total + term + (error if step == slip else 0)
    steps.append(f'{total}+{term}={reached};')
    total = reached
  return Problem(index, '+'.join(map(str, terms)) + '=', str(sum(terms)),
                 f'problem {index} of Arithmetic', ''.join(steps) + MARKER + str(total))


def redundant_checks(source: config.RedundantChecks, index: int) -> Problem:
  """Digits such as `7402:`, with the response `+4=1+0=1+2=3?3?3#3`: steps modulo 10, then checks.

  An answer needs one step less than there are digits. A check repeats the last result and changes
  nothing. A noisy demonstration stops before its last step and answers with what it has; it may
  check that too.

  Source: our own; docs/methods/short_rl.md says what it measures.
  """
  rng = np.random.default_rng([source.seed, index])
  num_steps = int(rng.integers(source.min_steps, source.max_steps + 1))
  digits = rng.integers(0, 10, num_steps + 1)
  sums = np.cumsum(digits) % 10
  num_checks = int(rng.integers(0, source.max_checks + 1))
  slip = _slip(rng, source.noise, num_steps)
  taken = num_steps if slip is None else slip
  steps = ''.join(f'+{digits[i]}={sums[i]}' for i in range(1, taken + 1))
  return Problem(index, ''.join(map(str, digits)) + ':', str(sums[-1]),
                 f'problem {index} of RedundantChecks',
                 f'{steps}{f"?{sums[taken]}" * num_checks}{MARKER}{sums[taken]}')


def hybrid_sum(source: config.HybridSums, index: int) -> Problem:
  """Digits such as `0070:` or `7402:`, with the response `T+4=1+0=1+2=3E#3` or `N#3`: modulo 10.

  T, E and N stand for the marks of thinking, its end, and answering at once. A wrong demonstration
  is off by 1 to 9 at one of its steps and goes on from there.

  Source: our own, after the two types of query in docs/methods/lhrm.md.
  """
  rng = np.random.default_rng([source.seed, index])
  is_easy, thinks = rng.random() < source.easy_share, rng.random() < source.think_share
  num_steps = int(rng.integers(source.min_steps, source.max_steps + 1))
  digits = rng.integers(0, 10, num_steps + 1)
  if is_easy:
    digits[rng.permutation(num_steps + 1)[1:]] = 0
  slip = _slip(rng, source.slips[2 * (not thinks) + (not is_easy)], num_steps)
  errors = np.zeros(num_steps + 1, int)
  if slip is not None:
    errors[slip + 1] = rng.integers(1, 10)
  sums = np.cumsum(digits + errors) % 10
  answer = f'{MARKER}{sums[-1]}'
  if thinks:
    steps = ''.join(f'+{digits[i]}={sums[i]}' for i in range(1, num_steps + 1))
    response = f'{source.think}{steps}{source.think_end}{answer}'
  else:
    response = source.no_think + answer
  return Problem(index, ''.join(map(str, digits)) + ':', str(digits.sum() % 10),
                 f'problem {index} of HybridSums', response, 'easy' if is_easy else 'hard')


def preference(source: config.Arithmetic | config.RedundantChecks, index: int
               ) -> tuple[str, str, str]:
  """The prompt of problem `index`, a demonstration without a slip, and one with a slip."""
  right, wrong = (problem(dataclasses.replace(source, noise=noise), index) for noise in (0.0, 1.0))
  return right.prompt, right.demonstration, wrong.demonstration


def pairs(source: config.SlipPreferences | config.ResultPreferences) -> Iterator[Pair]:
  """Yields the pair of each problem, in order."""
  problems = source.source
  for number in range(problems.size):
    place, found = f'preference {number} of {problems}', problem(problems, number)
    match source:
      case config.SlipPreferences():
        yield Pair(place, *preference(problems, number), found.demonstration)
      case config.ResultPreferences():
        better, worse = _results(source, number, int(found.answer))
        yield Pair(place, found.prompt, better, worse, found.demonstration)


def _results(source: config.ResultPreferences, index: int, answer: int) -> tuple[str, str]:
  """The answer and a wrong result; or two wrong ones that differ, where no answer is shown.

  A wrong result is another digit, or a sum that is off by 1 to 9.
  """
  rng = np.random.default_rng([source.source.seed, index, 1])
  errors = rng.permutation(np.arange(1, 10))[:2].tolist()
  signs = [1 if up else -1 for up in rng.random(2) < 0.5]
  match source.source:
    case config.RedundantChecks():
      wrong = [str((answer + error) % 10) for error in errors]
    case config.Arithmetic():
      wrong = [str(answer + sign * error if answer + sign * error >= 0 else answer + error)
               for error, sign in zip(errors, signs, strict=True)]
  return wrong[1] if rng.random() < source.both_wrong else str(answer), wrong[0]


def _slip(rng: np.random.Generator, noise: float, num_steps: int) -> int | None:
  """The step at which a demonstration goes wrong, or None."""
  wrong, step = rng.random() < noise, int(rng.integers(num_steps))
  return step if wrong else None


def problem(source: config.Generated, index: int) -> Problem:
  """Problem `index` of a source that has demonstrations."""
  match source:
    case config.Arithmetic():
      return arithmetic(source, index)
    case config.RedundantChecks():
      return redundant_checks(source, index)
    case config.HybridSums():
      return hybrid_sum(source, index)
