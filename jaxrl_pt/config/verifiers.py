"""Verifiers of responses, and the processes that they run in."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.pairs import BoxedVerdict, MarkedVerdict, Verdicts

AnswerFormat = Literal['boxed', 'gsm8k', 'last_number']
GymAnswer = Literal['tags', 'text']
CodeAnswer = Literal['fence', 'text']


@dataclass(frozen=True)
class AnswerMatch:
  """A verifier on the device: the answer is the text between the last marker and the end.

  It is compared with the reference answer byte by byte, and earns 1 where it is right.

  marker: the text before an answer; it need not be a token of its own.
  wrong: the reward of every other response; a judge's is −1.
  """

  marker: str = '#'
  wrong: float = 0.0

  def __post_init__(self) -> None:
    checks.text(self, 'marker')
    checks.number(self, 'wrong', -1.0, 0.0)


@dataclass(frozen=True)
class MathVerifier:
  r"""The answer equals the reference answer as a number or an expression (docs/answers.md).

  answer: where a response states its answer: 'boxed' in the last balanced \boxed{…}, 'gsm8k' after
    the last ####, 'last_number' in the last number of the response.
  symbolic: whether expressions are worked out, which needs sympy.
  """

  answer: AnswerFormat = 'boxed'
  symbolic: bool = True

  def __post_init__(self) -> None:
    checks.choice(self, 'answer', AnswerFormat)
    checks.flag(self, 'symbolic')


@dataclass(frozen=True)
class LogicVerifier:
  """Knights and Knaves: ±1 for the think and answer tags, and +2, −1.5 or −2 for the roles.

  docs/methods/short_rl.md has the table of rewards.
  """


@dataclass(frozen=True)
class JudgeVerifier:
  """A judge's verdict (`JudgePairs`): 1 where it names the better response, −1 where the other one.

  verdict: how it is stated.
  unparsed: the reward where no verdict is found. −1, since RRM (2505.14674) knows no third reward.
  """

  verdict: Verdicts = field(default_factory=BoxedVerdict)
  unparsed: float = -1.0

  def __post_init__(self) -> None:
    checks.instance(self, 'verdict', BoxedVerdict, MarkedVerdict)
    checks.number(self, 'unparsed', -1.0, 0.0)


@dataclass(frozen=True)
class GymVerifier:
  """The scorer that reasoning-gym has for the problem's task.

  answer: 'tags' scores the text between answer tags, 'text' the whole response.
  partial_credit: whether an answer that is not right earns the scorer's score, as the part
    `partial`. Many scorers give some where the right answer is a piece of the stated one, such as
    0.67 for −40 where −4 is right.
  """

  answer: GymAnswer = 'tags'
  partial_credit: bool = False

  def __post_init__(self) -> None:
    checks.choice(self, 'answer', GymAnswer)
    checks.flag(self, 'partial_credit')


@dataclass(frozen=True)
class WordVerifier:
  """Free text: a third of the reward each for the reference word, the length and distinct n-grams.

  A response is correct where all three are full.

  min_words, max_words: the range of the length in words.
  ngram: the words of an n-gram.
  """

  min_words: int
  max_words: int
  ngram: int = 4

  def __post_init__(self) -> None:
    checks.integer(self, 'min_words', 0)
    checks.integer(self, 'max_words', max(1, self.min_words))
    checks.integer(self, 'ngram', 1)


@dataclass(frozen=True)
class FormatVerifier:
  """1 where each pair of tags occurs in the response once, in this order, else 0."""

  tags: tuple[str, ...] = ('think', 'answer')

  def __post_init__(self) -> None:
    checks.texts(self, 'tags', "a list of names such as ['think', 'answer']", low=1)


@dataclass(frozen=True)
class LengthVerifier:
  """1 up to min_chars characters of text, falling linearly to 0 at max_chars."""

  min_chars: int
  max_chars: int

  def __post_init__(self) -> None:
    checks.integer(self, 'min_chars', 0)
    checks.integer(self, 'max_chars', self.min_chars + 1)


@dataclass(frozen=True)
class PythonVerifier:
  """The user's function (response, reference answer) → verifiers.response_verdict.ResponseVerdict.

  target: 'module:function', which must be importable where the run starts.
  parts: the names of the parts of its verdicts.
  min_score, max_score: the range of each part; a verdict with a part outside is a crash.
  """

  target: str
  parts: tuple[str, ...] = ('answer',)
  min_score: float = -1e9
  max_score: float = 1e9

  def __post_init__(self) -> None:
    checks.text(self, 'target')
    if self.target.count(':') != 1:
      checks.fail(self, 'target', "'module:function'")
    checks.texts(self, 'parts', 'a list of names')
    checks.number(self, 'min_score', -1e9)
    checks.number(self, 'max_score', self.min_score)


@dataclass(frozen=True)
class Interpreter:
  """A Python process in isolation, fresh for each program, and what a program may cost there.

  It has the standard library and an empty folder /tmp, and no network, no other file and no second
  process (docs/environments.md).

  cpu_seconds: processor time.
  wall_seconds: time of the clock, for a program that waits.
  memory_mib: address space; the interpreter itself takes about 30 MiB.
  disk_mib: the size of /tmp, which lies in memory.
  threads: threads that it may start.
  output_bytes: the first bytes of its output that are kept.
  """

  cpu_seconds: int = 2
  wall_seconds: float = 5.0
  memory_mib: int = 256
  disk_mib: int = 16
  threads: int = 8
  output_bytes: int = 8192

  def __post_init__(self) -> None:
    checks.integer(self, 'cpu_seconds', 1, 86_400)
    checks.number(self, 'wall_seconds', 0.1, 86_400)
    checks.integer(self, 'memory_mib', 64, 2**20)
    checks.integer(self, 'disk_mib', 1, 2**16)
    checks.integer(self, 'threads', 0, 1024)
    checks.integer(self, 'output_bytes', 1, 2**20)


@dataclass(frozen=True)
class CodeVerifier:
  """A Python program passes all asserts of its problem (`CodeProblems`), in isolation.

  answer: 'fence' runs the last block between ``` fences, 'text' the whole response.
  interpreter: what the program may cost.
  """

  answer: CodeAnswer = 'fence'
  interpreter: Interpreter = field(default_factory=Interpreter)

  def __post_init__(self) -> None:
    checks.choice(self, 'answer', CodeAnswer)
    checks.instance(self, 'interpreter', Interpreter)


Part = (MathVerifier | LogicVerifier | JudgeVerifier | GymVerifier | WordVerifier
        | FormatVerifier | LengthVerifier | CodeVerifier | PythonVerifier)


@dataclass(frozen=True)
class Composite:
  """Σ weight · score of several verifiers; the first one says whether a response is correct."""

  verifiers: tuple[Part, ...]
  weights: tuple[float, ...]

  def __post_init__(self) -> None:
    for name in ('verifiers', 'weights'):
      if not isinstance(getattr(self, name), (list, tuple)):
        checks.fail(self, name, 'a list')
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if not self.verifiers or not all(isinstance(v, get_args(Part)) for v in self.verifiers):
      checks.fail(self, 'verifiers', 'a list such as [@cfg.MathVerifier(), @cfg.FormatVerifier()]')
    is_numbers = all(checks.is_weight(w) for w in self.weights)
    if len(self.weights) != len(self.verifiers) or not is_numbers:
      checks.fail(self, 'weights', f'{len(self.verifiers)} numbers, one for each verifier')


HostVerifier = Part | Composite
Verifier = AnswerMatch | HostVerifier


def programs_of(verifier: Verifier) -> tuple[Interpreter, ...]:
  """The limits of the programs that a verifier runs."""
  parts = verifier.verifiers if isinstance(verifier, Composite) else (verifier,)
  return tuple(part.interpreter for part in parts if isinstance(part, CodeVerifier))


@dataclass(frozen=True)
class VerifierPool:
  """Child processes that verify text, and what one response may cost before they are killed.

  num_workers: the number of processes.
  cpu_seconds: processor time of one response, which does not depend on how busy the machine is.
  wall_seconds: time of one response, after which a process that waits is killed, too.
  memory_mib: memory of one process.
  """

  num_workers: int = 2
  cpu_seconds: float = 5.0
  wall_seconds: float = 30.0
  memory_mib: int = 2048

  def __post_init__(self) -> None:
    checks.size(self, 'num_workers', 1, 1024, 2**26, 'so many processes')
    checks.number(self, 'cpu_seconds', 0.01, 86_400)
    checks.number(self, 'wall_seconds', 0.01, 86_400)
    checks.integer(self, 'memory_mib', 64)
