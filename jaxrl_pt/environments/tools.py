"""A question that the policy may answer with tools.

A text calls a tool as Hermes and Qwen models do, with JSON between two tags:

    <tool_call>
    {"name": "calculator", "arguments": {"expression": "3*4"}}
    </tool_call>

Each call of a text is answered in order, with JSON between two other tags:

    <tool_response>
    {"name": "calculator", "content": "12"}
    </tool_response>

What is no call is answered with {"error": {"type": …, "message": …}} (`ErrorType`), and the episode
goes on. A text without `<tool_call>` is the answer: the verifier rewards it, and the episode ends.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
import json
import re
from typing import Any, Literal, get_args

from jaxrl_pt import config as cfg
from jaxrl_pt.environments import calculator
from jaxrl_pt.environments.interactive import Game, Message, Problem, Step
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import build, interpreter
from jaxrl_pt.verifiers.response_verdict import UNVERIFIED, Outcome

ErrorType = Literal['not_closed', 'not_json', 'not_a_call', 'unknown_tool', 'wrong_arguments',
                    'too_many', 'failed']
ERROR_TYPES: tuple[ErrorType, ...] = get_args(ErrorType)
_OPENING, _CLOSING = '<tool_call>', '</tool_call>'
_CALL = re.compile(f'{_OPENING}(.*?)(?:({_CLOSING})|(?={_OPENING})|\\Z)', re.DOTALL)


@dataclass(frozen=True)
class _Signature:
  """What the policy is told of a tool, and its only argument, a text."""

  name: str
  description: str
  argument: str
  meaning: str

  @property
  def schema(self) -> dict[str, Any]:
    """The tool as a function in the JSON schema of chat templates."""
    properties = {self.argument: {'type': 'string', 'description': self.meaning}}
    parameters = {'type': 'object', 'properties': properties, 'required': [self.argument]}
    return {'type': 'function', 'function': {
        'name': self.name, 'description': self.description, 'parameters': parameters}}


def _signature(tool: cfg.Tool) -> _Signature:
  match tool:
    case cfg.Calculator():
      return _Signature('calculator', 'Works out an expression of numbers.', 'expression',
                        r'such as (3+4)*5/2 or \sqrt{2}')
    case cfg.PythonTool():
      return _Signature('python', 'Runs a Python program and returns what it prints. It has the '
                        'standard library, and neither network nor files.', 'code',
                        'the whole program')


@dataclass(frozen=True)
class Call:
  """A call of a tool, or what is wrong with it.

  name, argument: the tool and its text, where `error` is None.
  error: the type of the mistake and a sentence.
  """

  name: str = ''
  argument: str = ''
  error: tuple[ErrorType, str] | None = None


def calls(text: str, settings: cfg.ToolUse) -> list[Call]:
  """The calls in a text, in order; the first `settings.max_calls` alone can be good ones."""
  signatures = {s.name: s for s in map(_signature, settings.tools)}
  found = []
  for number, match in enumerate(_CALL.finditer(text)):
    if number >= settings.max_calls:
      found.append(Call(error=('too_many', f'a text may call at most {settings.max_calls} times')))
    elif match[2] is None:
      found.append(Call(error=('not_closed', f'{_OPENING} without {_CLOSING}')))
    else:
      found.append(_call(match[1], signatures))
    if number >= settings.max_calls:
      break  # One error says it of all that follow.
  return found


def _call(text: str, signatures: dict[str, _Signature]) -> Call:
  try:
    data = json.loads(text)
  except (ValueError, RecursionError) as error:
    return Call(error=('not_json', f'between the tags is no JSON ({str(error)[:100]})'))
  if not isinstance(data, dict) or not isinstance(data.get('name'), str) or (
      not isinstance(data.get('arguments'), dict)):
    return Call(error=('not_a_call', 'write {"name": …, "arguments": {…}}'))
  signature = signatures.get(data['name'])
  if signature is None:
    return Call(error=('unknown_tool', f'the tools are {", ".join(signatures)}'))
  argument = data['arguments'].get(signature.argument)
  if set(data['arguments']) != {signature.argument} or not isinstance(argument, str):
    return Call(error=('wrong_arguments', f'{signature.name} takes one text, {signature.argument}'))
  return Call(signature.name, argument)


# --- The game -------------------------------------------------------------------------


class NotVerifiedError(Exception):
  """The verifier ran out of time or failed, which says nothing about the answer."""


def game(settings: cfg.ToolUse) -> Game:
  """The game, which has no state: a turn does not depend on those before.

  Raises:
    UserError: the verifier lacks an extra or cannot be imported.
  """
  verify = build.host_verifier(settings.verifier)

  def start(problem: Problem) -> Sequence[Message]:
    return [Message('system', _introduction(settings)), Message('user', problem.prompt)]

  def programs(text: str) -> Sequence[str]:
    return [call.argument for call in calls(text, settings) if call.name == 'python']

  def advance(problem: Problem, state: Any, text: str, outputs: Sequence[str]
              ) -> tuple[Step, Any]:
    del state
    asked = calls(text, settings)
    if not asked:
      verdict = verify(text, problem.reference)
      if verdict.outcome in UNVERIFIED:
        raise NotVerifiedError(verdict.detail or verdict.outcome.value)
      counts = {'correct': float(verdict.outcome is Outcome.CORRECT),
                'parsed': float(verdict.outcome is not Outcome.UNPARSED)}
      return Step('', verdict.score, True, counts), None
    responses = list(_responses(asked, iter(outputs)))
    counts = {'tool_calls': float(len(asked)),
              'tool_errors': float(sum('error' in response for response in responses))}
    said = '\n'.join(f'<tool_response>\n{json.dumps(response, ensure_ascii=False)}\n'
                     '</tool_response>' for response in responses)
    return Step(said, 0.0, False, counts), None

  return Game(start, advance, programs)


def _introduction(settings: cfg.ToolUse) -> str:
  """The system message, in the words of Qwen's chat template, which its models know."""
  schemas = '\n'.join(json.dumps(_signature(tool).schema) for tool in settings.tools)
  return ('# Tools\n\nYou may call one or more functions to assist with the user query.\n\n'
          'You are provided with function signatures within <tools></tools> XML tags:\n'
          f'<tools>\n{schemas}\n</tools>\n\n'
          'For each function call, return a json object with function name and arguments within '
          '<tool_call></tool_call> XML tags:\n<tool_call>\n'
          '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')


def _responses(asked: Sequence[Call], outputs: Iterator[str]) -> Iterator[dict[str, Any]]:
  for call in asked:
    if call.error is not None:
      kind, message = call.error
      yield {'error': {'type': kind, 'message': message}}
    elif call.name == 'python':
      yield {'name': call.name, 'content': next(outputs)}
    else:
      try:
        yield {'name': call.name, 'content': calculator.calculate(call.argument)}
      except calculator.CalculatorError as error:
        yield {'name': call.name, 'error': {'type': 'failed', 'message': str(error)}}


def runs_programs(settings: cfg.ToolUse) -> bool:
  """Whether there is a tool that runs programs."""
  return any(isinstance(tool, cfg.PythonTool) for tool in settings.tools)


def check_time(environment: cfg.Environment, limits: cfg.VerifierPool) -> None:
  """Refuses programs that may take longer than the whole turn.

  Raises:
    UserError: they may.
  """
  for tool in environment.tools if isinstance(environment, cfg.ToolUse) else ():
    if isinstance(tool, cfg.PythonTool):
      assert isinstance(environment, cfg.ToolUse)
      seconds = tool.interpreter.wall_seconds * environment.max_calls
      if seconds >= limits.wall_seconds:
        raise UserError(
            f'The programs of a turn may take {seconds:g} s (Interpreter.wall_seconds times '
            f'ToolUse.max_calls), and VerifierPool.wall_seconds = {limits.wall_seconds:g} ends the '
            'turn: raise it, or lower one of the others.')


def run_programs(settings: cfg.ToolUse, programs: Sequence[str]) -> list[str]:
  """The outputs of programs, each run in isolation; for a process that may start others."""
  limits = next(t.interpreter for t in settings.tools if isinstance(t, cfg.PythonTool))
  return [interpreter.run(program, limits) for program in programs]
