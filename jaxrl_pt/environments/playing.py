"""Environments as a service (`verifiers/service.py`): a request starts an episode or takes a step.

    {"start": problem}                                 → {"messages": [[role, text], …]}
    {"step": problem, "state": JSON, "text": text}     → {"observation", "reward", "done", "counts",
                                                          "state"}
    either                                             → {"failed": one of FAILURES, "detail"}

The environment reads the policy's text in the tight sandbox, unless it is the user's own class. The
programs that a text asks to run go to a second worker, which starts isolated processes.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import importlib
import math
from typing import Any

from jaxrl_pt import config as cfg
from jaxrl_pt.environments import guess, text_arena, tools
from jaxrl_pt.environments.interactive import Game, Message, Problem, Step, replayed
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import build, interpreter
from jaxrl_pt.verifiers.service import Failure, Handle, Kind, Role

KIND = Kind('jaxrl_pt.environments.child', 'environment')
MAX_STATE = 1 << 23  # bytes of a state, which may hold all texts of an episode
MAX_REWARD = 1e9
MAX_DETAIL = 2000  # characters
FAILURES = ('timeout', 'crash', 'raised', 'too_large', 'not_text')
_PLAYER, _RUNNER = 0, 1  # roles


def max_answer(settings: cfg.Interactive) -> int:
  """Bytes of the longest answer; JSON may write a byte of text as six."""
  return 6 * settings.max_observation_bytes + MAX_STATE


def make_game(environment: cfg.Environment) -> Game:
  """The game that settings describe.

  Raises:
    UserError: an extra is missing, or a class cannot be imported.
  """
  match environment:
    case cfg.GuessNumber():
      return guess.game(environment)
    case cfg.ToolUse():
      return tools.game(environment)
    case cfg.TextArena():
      return text_arena.game(environment)
    case cfg.PythonEnvironment(target=target):
      module, _, name = target.partition(':')
      try:
        return replayed(getattr(importlib.import_module(module), name))
      except (ImportError, AttributeError) as error:
        raise UserError(f'PythonEnvironment.target = {target!r} cannot be imported ({error}): '
                        "write 'module:Class' of a module on the path.") from error


def _is_tight(environment: cfg.Environment) -> bool:
  if isinstance(environment, cfg.ToolUse):
    return all(map(build.is_tight, build.parts_of(environment.verifier)))
  return not isinstance(environment, cfg.PythonEnvironment)


def checked(request: Mapping[str, Any], answer: Any) -> dict[str, Any]:
  """The answer to a request, read as data of a hostile process.

  Raises:
    ValueError: it has not the form that this module's first lines describe.
  """
  if not isinstance(answer, dict):
    raise ValueError('a message that is not an answer')
  if 'failed' in answer:
    is_sound = set(answer) == {'failed', 'detail'} and answer['failed'] in FAILURES and isinstance(
        answer['detail'], str)
  elif 'start' in request:
    messages = answer.get('messages')
    is_sound = set(answer) == {'messages'} and isinstance(messages, list) and all(
        isinstance(m, list) and len(m) == 2 and all(isinstance(x, str) for x in m)
        for m in messages)
  else:
    counts = answer.get('counts')
    is_sound = set(answer) == {'observation', 'reward', 'done', 'counts', 'state'} and isinstance(
        answer['observation'], str) and isinstance(answer['done'], bool) and isinstance(
            counts, dict) and all(map(_is_number, (answer['reward'], *counts.values())))
  if not is_sound:
    raise ValueError('a message that is not an answer')
  return answer


def _is_number(value: Any) -> bool:
  return type(value) is float and abs(value) <= MAX_REWARD  # NaN is in no range.


class Playing:
  """The service of an environment: a player, and a runner where programs are run. Final."""

  kind = KIND

  def __init__(self, settings: cfg.Interactive) -> None:
    self._settings = settings
    self._game = settings.environment
    self.max_answer = max_answer(settings)

  def roles(self) -> Sequence[Role]:
    """The player's role, and the runner's."""
    player = Role(functools.partial(_player, self._settings), _is_tight(self._game))
    game = self._game
    if not isinstance(game, cfg.ToolUse) or not tools.runs_programs(game):
      return [player]
    return [player, Role(functools.partial(_runner, game), is_tight=False)]

  def preload(self) -> None:
    """Imports the libraries of the package's own environments."""
    if _is_tight(self._game):
      make_game(self._game)

  def serve(self, ask: Callable[[int, Any], Any], request: Any) -> dict[str, Any]:
    """The answer of the player, who may need outputs of the runner first."""
    answer = ask(_PLAYER, request)
    if isinstance(answer, dict) and 'programs' in answer:
      answer = ask(_PLAYER, {**request, 'outputs': ask(_RUNNER, answer['programs'])})
    return checked(request, answer)

  def failed(self, failure: Failure) -> dict[str, Any]:
    """The answer where a worker gave none."""
    return {'failed': failure.reason, 'detail': failure.detail[:MAX_DETAIL]}

  def is_spent(self, request: Any) -> bool:
    """Whether the verifier of an answer has evaluated it as an expression."""
    if not isinstance(self._game, cfg.ToolUse) or 'step' not in request:
      return False
    return build.evaluates(self._game.verifier, request['step'][1])


# --- In a worker ----------------------------------------------------------------------


def _runner(environment: cfg.ToolUse) -> Handle:
  interpreter.check('PythonTool')
  return functools.partial(tools.run_programs, environment)


def _player(settings: cfg.Interactive) -> Handle:
  game = make_game(settings.environment)

  def handle(request: Mapping[str, Any]) -> dict[str, Any]:
    if 'start' in request:
      messages = game.start(Problem(*request['start']))
      return _opening(messages, settings.max_observation_bytes)
    text, outputs = request['text'], request.get('outputs')
    if outputs is None and (programs := game.programs(text)):
      return {'programs': list(programs)}
    step, state = game.advance(Problem(*request['step']), request['state'], text, outputs or ())
    return _observed(step, state, settings.max_observation_bytes)

  return handle


def _opening(messages: Any, most: int) -> dict[str, Any]:
  if not isinstance(messages, (list, tuple)) or not messages or not all(
      isinstance(m, Message) for m in messages):
    raise TypeError('reset must return a list of Message')
  texts = [text for m in messages for text in (m.role, m.content)]
  return _unfit(texts, most) or {'messages': [[m.role, m.content] for m in messages]}


def _observed(step: Step, state: Any, most: int) -> dict[str, Any]:
  reward = float(step.reward)
  if not math.isfinite(reward) or abs(reward) > MAX_REWARD:
    raise ValueError(f'the reward {reward!r} is no number from {-MAX_REWARD:g} to {MAX_REWARD:g}')
  return _unfit([step.observation], most) or {
      'observation': step.observation, 'reward': reward, 'done': bool(step.done),
      'counts': {str(name): float(value) for name, value in step.counts.items()}, 'state': state}


def _unfit(texts: Sequence[Any], most: int) -> dict[str, Any] | None:
  """Why texts cannot be shown to the policy; None where they can."""
  num_bytes = 0
  for text in texts:
    if not isinstance(text, str):
      return {'failed': 'not_text',
              'detail': f'the environment said {type(text).__name__}, which is no text'}
    try:
      num_bytes += len(text.encode())
    except UnicodeEncodeError as error:
      return {'failed': 'not_text',
              'detail': f'character {error.start} of the environment\'s text is no UTF-8'}
  if num_bytes > most:
    return {'failed': 'too_large', 'detail': f'the environment said {num_bytes:,} bytes, where '
                                             f'{most:,} are the most'}
  return None
