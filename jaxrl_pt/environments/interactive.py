"""What an environment of several turns is: it opens with messages, and answers text with text.

A user's environment is a class with `reset` and `step` (`Environment`). It runs in a process that
may be killed at any moment, and whose place another takes. An episode therefore lives in no
process: it is the problem and a JSON state, from which any process goes on (`Game`). The package's
own environments write down what they need. `replayed` makes such a game of a class, whose state is
the texts so far: a step makes a new environment, plays these texts again, and refuses to go on
where an answer differs from what it was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
import zlib


@dataclass(frozen=True)
class Message:
  """A message of a conversation: its role ('system' or 'user') and its text."""

  role: str
  content: str


@dataclass(frozen=True)
class Problem:
  """What an episode is about.

  prompt: the problem's text, as a file or a generator has it.
  reference: what the environment compares with, or whatever else it needs to know.
  """

  prompt: str
  reference: str = ''


@dataclass(frozen=True)
class Step:
  """What an environment answers to a text.

  observation: the text that the policy reads next; where the episode is done nobody reads it.
  reward: of this step; an episode's reward is the sum.
  done: whether the episode has ended.
  counts: numbers for the log, such as {'tool_calls': 1.0}.
  """

  observation: str
  reward: float
  done: bool
  counts: Mapping[str, float] = field(default_factory=dict)


class Environment(Protocol):
  """One episode at a time. Equal problems and texts must give equal answers."""

  def reset(self, problem: Problem) -> Sequence[Message]:
    """Begins an episode and returns the messages that the policy reads first."""

  def step(self, text: str) -> Step:
    """Answers the policy's text."""


class NotDeterministicError(Exception):
  """An environment answers the same texts otherwise than before."""


def no_programs(text: str) -> Sequence[str]:
  """The programs that a text asks to run, in an environment that runs none."""
  del text
  return ()


@dataclass(frozen=True)
class Game:
  """An environment as functions, whose episodes live in no process.

  start: (problem) → the first messages.
  advance: (problem, state, text, outputs) → (step, next state). The state is JSON, None at first.
  programs: (text) → the programs that it asks to run. They run in another process, in isolation,
    and `advance` is given their outputs.
  """

  start: Callable[[Problem], Sequence[Message]]
  advance: Callable[[Problem, Any, str, Sequence[str]], tuple[Step, Any]]
  programs: Callable[[str], Sequence[str]] = no_programs


def replayed(make: Callable[[], Environment]) -> Game:
  """The game of a class, whose state is [[text, checksum of the answer], …].

  A step costs as much as all steps before it together.
  """
  def advance(problem: Problem, state: Any, text: str, outputs: Sequence[str]
              ) -> tuple[Step, Any]:
    del outputs
    environment = make()
    environment.reset(problem)
    for turn, (earlier, checksum) in enumerate(state or ()):
      if _checksum(_stepped(environment, earlier)) != checksum:
        raise NotDeterministicError(
            f'the environment answers the text of turn {turn + 1} otherwise than before: its '
            'answers must depend on the problem and the texts alone')
    step = _stepped(environment, text)
    return step, [*(state or ()), [text, _checksum(step)]]

  return Game(lambda problem: make().reset(problem), advance)


def _stepped(environment: Environment, text: str) -> Step:
  step: object = environment.step(text)
  if not isinstance(step, Step):
    raise TypeError(f'step must return a Step, not {type(step).__name__}')
  return step


def _checksum(step: Step) -> int:
  said = f'{step.observation!r} {step.reward!r} {step.done!r}'
  return zlib.crc32(said.encode(errors='backslashreplace'))
