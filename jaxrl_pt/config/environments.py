"""Environments of several turns, and what an episode may cost."""

from dataclasses import dataclass, field
from typing import get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.rollouts import MOST_TOKENS
from jaxrl_pt.config.verifiers import HostVerifier, Interpreter
from jaxrl_pt.errors import UserError


@dataclass(frozen=True)
class Calculator:
  """The tool `calculator`: it works out an expression exactly, or to 12 digits."""


@dataclass(frozen=True)
class PythonTool:
  """The tool `python`: it runs a program in isolation and gives back what it prints."""

  interpreter: Interpreter = field(default_factory=Interpreter)

  def __post_init__(self) -> None:
    checks.instance(self, 'interpreter', Interpreter)


Tool = Calculator | PythonTool


@dataclass(frozen=True)
class ToolUse:
  """A question that may be answered with tools; a text without a tool call is the answer.

  tools: the tools, each of another kind.
  verifier: rewards the answer, in the last text, by the problem's reference answer.
  max_calls: how many calls of one text are answered; more get an error each.
  """

  tools: tuple[Tool, ...]
  verifier: HostVerifier
  max_calls: int = 4

  def __post_init__(self) -> None:
    if not isinstance(self.tools, (list, tuple)):
      checks.fail(self, 'tools', 'a list such as [@cfg.Calculator(), @cfg.PythonTool()]')
    object.__setattr__(self, 'tools', tuple(self.tools))
    kinds = [type(tool) for tool in self.tools]
    if not kinds or not set(kinds) <= set(get_args(Tool)) or len(set(kinds)) < len(kinds):
      checks.fail(self, 'tools', 'a list of tools, none of them twice, such as '
                  '[@cfg.Calculator(), @cfg.PythonTool()]')
    checks.instance(self, 'verifier', *get_args(HostVerifier))
    checks.integer(self, 'max_calls', 1, 64)


@dataclass(frozen=True)
class GuessNumber:
  """Guess a whole number from low to high, which a hash of the problem chooses.

  Each guess is answered with `higher` or `lower`; a right one earns 1.
  """

  low: int = 1
  high: int = 100
  max_guesses: int = 7

  def __post_init__(self) -> None:
    checks.integer(self, 'low', 0)
    checks.integer(self, 'high', self.low + 1)
    checks.integer(self, 'max_guesses', 1, 1024)


@dataclass(frozen=True)
class TextArena:
  """A game of one player of the textarena library by its name, which needs the `textarena` extra.
  """

  game: str

  def __post_init__(self) -> None:
    checks.text(self, 'game')


@dataclass(frozen=True)
class PythonEnvironment:
  """The user's class with reset and step (environments.interactive.Environment).

  target: 'module:Class', which must be importable where the run starts and needs no arguments.
  """

  target: str

  def __post_init__(self) -> None:
    checks.text(self, 'target')
    if self.target.count(':') != 1:
      checks.fail(self, 'target', "'module:Class'")


@dataclass(frozen=True)
class ChatTemplate:
  """How the messages of an episode are written as text.

  system, user: a message of that role; `{content}` stands for what it says. Observations are the
    user's.
  opening, ending: what stands before and after a text of the policy. What the policy itself has
    drawn of the ending is not written again.
  stop: texts that end a text of the policy, beside the end of text; at most three.

  Special tokens that are written here are those tokens; in what is said they are text.
  """

  system: str = '{content}\n\n'
  user: str = 'User: {content}\n\n'
  opening: str = 'Assistant:'
  ending: str = '\n\n'
  stop: tuple[str, ...] = ('\nUser:',)

  def __post_init__(self) -> None:
    for name in ('system', 'user'):
      checks.text(self, name)
      if getattr(self, name).count('{content}') != 1:
        checks.fail(self, name, 'a text with {content} in it once')
    checks.text(self, 'opening', empty=True)
    checks.text(self, 'ending', empty=True)
    if not isinstance(self.stop, (list, tuple)) or len(self.stop) > 3 or not all(
        checks.is_text(s) and 1 <= len(s.encode()) <= 32 for s in self.stop):
      checks.fail(self, 'stop', 'a list of at most three texts of 1 to 32 bytes each')
    object.__setattr__(self, 'stop', tuple(self.stop))


Environment = ToolUse | GuessNumber | TextArena | PythonEnvironment


@dataclass(frozen=True)
class Interactive:
  """Episodes of several turns: the policy writes a text, the environment observes and rewards it.

  environment: what answers.
  max_turns: the texts of an episode; one that has not ended by then is ended.
  turn_tokens: tokens that the policy draws in a turn.
  observation_tokens: tokens of an observation that the policy reads; a longer one is cut.
  max_observation_bytes: bytes of an observation; a longer one ends the episode unrewarded.
  template: how messages and observations are written for the policy.
  """

  environment: Environment
  max_turns: int = 8
  turn_tokens: int = 256
  observation_tokens: int = 256
  max_observation_bytes: int = 65_536
  template: ChatTemplate = field(default_factory=ChatTemplate)

  def __post_init__(self) -> None:
    checks.instance(self, 'environment', *get_args(Environment))
    checks.instance(self, 'template', ChatTemplate)
    checks.size(self, 'max_turns', 1, 4096, 4, 'the turns of an episode')
    checks.size(self, 'turn_tokens', 1, MOST_TOKENS, 4, 'so many tokens of a row')
    checks.size(self, 'observation_tokens', 1, MOST_TOKENS, 4, 'so many tokens of a row')
    checks.size(self, 'max_observation_bytes', 1, 2**24, 8, 'the bytes of one observation')
    game = self.environment
    if isinstance(game, GuessNumber) and game.max_guesses > self.max_turns:
      raise UserError(f'GuessNumber.max_guesses = {game.max_guesses} needs as many turns, and '
                      f'Interactive.max_turns is {self.max_turns}: change one of them.')
