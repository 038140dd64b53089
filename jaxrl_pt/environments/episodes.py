"""Episodes of an environment, on the host and as text, in killable processes.

    with EpisodePool(settings, limits) as pool:
      starts = pool.start([Problem(prompt, reference), …])
      seen = pool.step([(start.episode, text), …])       # one text for each episode
      seen = pool.step([(o.episode, text) for o in seen if not o.done])

`submit_start` and `submit_step` return at once; the future of each row is in `Pending.futures`.

An `Episode` is a value: it holds all that a process needs to go on, so that it can be saved, taken
twice, or go on in another process after a crash, and nothing has to be closed. A row whose
environment fails in any way has an outcome that says which, and ends; no other row is affected.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from dataclasses import dataclass, field
import enum
import functools
import json
from types import TracebackType
from typing import Any, Self

from jaxrl_pt import config as cfg
from jaxrl_pt.environments import playing, tools
from jaxrl_pt.environments.interactive import Message, Problem
from jaxrl_pt.verifiers.processes import Asked, Pending, ProcessPool


class Outcome(enum.Enum):
  """What became of one row of `start` or `step`, or of an episode as a whole."""

  OK = 'ok'
  TURN_LIMIT = 'turn_limit'  # The last turn that is allowed did not end the episode.
  OUT_OF_TOKENS = 'out_of_tokens'  # `Rollouts.response_tokens` left no room for another turn.
  LONG_PROMPT = 'long_prompt'  # Its first messages are longer than `Rollouts.prompt_len`.
  TIMEOUT = 'timeout'  # The environment used up its time.
  CRASH = 'crash'  # Its process died, or sent nonsense.
  RAISED = 'raised'  # It raised an exception, or returned what it must not.
  TOO_LARGE = 'too_large'  # It said more than `Interactive.max_observation_bytes`.
  NOT_TEXT = 'not_text'  # It said what is no valid UTF-8.

  @property
  def is_valid(self) -> bool:
    """Whether the reward says something about the policy, and not about the environment."""
    return self in (Outcome.OK, Outcome.TURN_LIMIT, Outcome.OUT_OF_TOKENS)


@dataclass(frozen=True)
class Episode:
  """An episode between two turns.

  problem: what it is about.
  state: the environment's state, as JSON text.
  num_turns: the texts that it has had.
  reward: the sum of its rewards.
  done: whether it has ended, however.
  """

  problem: Problem
  state: str = 'null'
  num_turns: int = 0
  reward: float = 0.0
  done: bool = False

  def to_json(self) -> dict[str, Any]:
    """The episode as JSON, for a checkpoint."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Self:
    """The episode that `to_json` has written."""
    return cls(**{**data, 'problem': Problem(**data['problem'])})


@dataclass(frozen=True)
class Start:
  """How an episode begins: the messages that the policy reads first; none where it failed."""

  episode: Episode
  messages: tuple[Message, ...] = ()
  outcome: Outcome = Outcome.OK
  detail: str = ''


@dataclass(frozen=True)
class Observation:
  """What the environment answers to a text.

  episode: the episode after this turn.
  text: what the policy reads next; empty where the environment failed.
  reward: of this turn.
  outcome, detail: what became of the turn, and why.
  counts: the environment's numbers for the log.
  """

  episode: Episode
  text: str = ''
  reward: float = 0.0
  outcome: Outcome = Outcome.OK
  detail: str = ''
  counts: Mapping[str, float] = field(default_factory=dict)

  @property
  def done(self) -> bool:
    """Whether the episode has ended."""
    return self.episode.done


class EpisodePool:
  """The processes in which episodes are played. Final."""

  def __init__(self, settings: cfg.Interactive, limits: cfg.VerifierPool) -> None:
    """Starts the processes and waits until they are ready.

    Args:
      settings: the environment and the bounds of an episode.
      limits: the number of processes, and what one turn may cost.

    Raises:
      UserError: the environment needs an extra, a class that cannot be imported, isolation that
        this machine does not give, or more time than there is.
      RuntimeError: a process does not start.
    """
    tools.check_time(settings.environment, limits)
    self._settings = settings
    self._processes = ProcessPool(playing.KIND, settings, limits, playing.max_answer(settings))

  def start(self, problems: Sequence[Problem]) -> list[Start]:
    """Begins an episode for each problem."""
    return self.submit_start(problems).result()

  def submit_start(self, problems: Sequence[Problem]) -> Pending[Start]:
    """Begins episodes, and returns at once."""
    requests = []
    for problem in problems:
      episode, request = Episode(problem), {'start': [problem.prompt, problem.reference]}
      requests.append(Asked(request, functools.partial(_started, episode, request),
                            functools.partial(_not_started, episode, Outcome.CRASH)))
    return self._processes.submit(requests)

  def step(self, texts: Sequence[tuple[Episode, str]]) -> list[Observation]:
    """Answers the policy's text in each episode."""
    return self.submit_step(texts).result()

  def submit_step(self, texts: Sequence[tuple[Episode, str]]) -> Pending[Observation]:
    """Takes a turn in episodes, and returns at once.

    Raises:
      ValueError: an episode has ended; nothing is submitted.
    """
    if any(episode.done for episode, _ in texts):
      raise ValueError('an episode that has ended takes no step')
    requests = []
    for episode, text in texts:
      problem = episode.problem
      request = {'step': [problem.prompt, problem.reference], 'state': json.loads(episode.state),
                 'text': text}
      requests.append(Asked(
          request, functools.partial(_observed, episode, self._settings.max_turns, request),
          functools.partial(_failed, episode, Outcome.CRASH)))
    return self._processes.submit(requests)

  def close(self) -> None:
    """Ends all processes at once and cancels what is not answered. It may be called again."""
    self._processes.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
               trace: TracebackType | None) -> None:
    self.close()


# --- From answers of hostile processes --------------------------------------------------


def _not_started(episode: Episode, outcome: Outcome, detail: str) -> Start:
  return Start(dataclasses.replace(episode, done=True), (), outcome, detail)


def _started(episode: Episode, request: Mapping[str, Any], data: Mapping[str, Any]) -> Start:
  """The start in an answer; raises ValueError where there is none."""
  answer = playing.checked(request, data)
  if 'failed' in answer:
    return _not_started(episode, Outcome(answer['failed']), answer['detail'])
  return Start(episode, tuple(Message(*m) for m in answer['messages']))


def _failed(episode: Episode, outcome: Outcome, detail: str) -> Observation:
  after = dataclasses.replace(episode, num_turns=episode.num_turns + 1, done=True)
  return Observation(after, outcome=outcome, detail=detail)


def _observed(episode: Episode, max_turns: int, request: Mapping[str, Any],
              data: Mapping[str, Any]) -> Observation:
  """The observation in an answer; raises ValueError where there is none."""
  answer = playing.checked(request, data)
  if 'failed' in answer:
    return _failed(episode, Outcome(answer['failed']), answer['detail'])
  num_turns, reward = episode.num_turns + 1, float(answer['reward'])
  is_last = not answer['done'] and num_turns >= max_turns
  after = Episode(episode.problem, json.dumps(answer['state']), num_turns,
                  episode.reward + reward, answer['done'] or is_last)
  outcome, detail = Outcome.OK, ''
  if is_last:
    outcome, detail = Outcome.TURN_LIMIT, f'the episode did not end in {max_turns} turns'
  return Observation(after, answer['observation'], reward, outcome, detail, answer['counts'])
