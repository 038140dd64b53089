"""Tool calls: which tools a client offers, and the calls that an answer holds.

The form is that of Hermes, Qwen and others:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>
"""

from collections.abc import Sequence
import json
import re
from typing import Any, Literal, NamedTuple, NoReturn

from jaxrl_pt.serving.conversation import Call
from jaxrl_pt.serving.fields import ApiError, Fields, is_object, is_text, short
from jaxrl_pt.serving.text import CALLS, num_held

_NAME = re.compile(r'[a-zA-Z0-9_-]{1,64}')
_MOST_TOOLS = 128
_NO_PARAMETERS: dict[str, Any] = {'type': 'object', 'additionalProperties': False}
# A call's arguments may quote the end marker, which then does not end the call. Each further one
# costs another reading of the whole call.
_MOST_QUOTED = 16


class Tool(NamedTuple):
  """A function that the client offers."""

  name: str
  parameters: dict[str, Any]  # the JSON schema of its arguments
  is_strict: bool  # whether calls must keep to the schema
  text: str  # the client's own description of the tool, as JSON


class Tools(NamedTuple):
  """The tools of a request and how they may be used."""

  tools: tuple[Tool, ...] = ()  # those that the prompt describes
  choice: Literal['auto', 'required'] = 'auto'
  is_parallel: bool = True  # whether an answer may hold several calls

  @property
  def needs_grammar(self) -> bool:
    """Whether the answer has to be held to `grammar`."""
    return self.choice == 'required' or any(tool.is_strict for tool in self.tools)


# --- What a body says -----------------------------------------------------------------


def take(fields: Fields) -> Tools:
  """The tools of a body of /v1/chat/completions.

  Raises:
    ApiError: 400 for a field that is malformed.
  """
  offered = fields.take('tools', f'a list of at most {_MOST_TOOLS} tools',
                        lambda x: isinstance(x, list) and len(x) <= _MOST_TOOLS, [])
  tools = tuple(_tool(value, f'tools[{i}]') for i, value in enumerate(offered))
  names = [tool.name for tool in tools]
  for name in names:
    if names.count(name) > 1:
      raise ApiError(400, f'tools holds two functions {name!r}: expected different names.',
                     param='tools')
  is_parallel = fields.flag('parallel_tool_calls', True)
  choice = fields.take(
      'tool_choice', '"none", "auto", "required" or {"type": "function", "function": {"name": …}}',
      lambda x: x in ('none', 'auto', 'required') if isinstance(x, str) else is_object(x), 'auto')
  if is_object(choice):
    return Tools((_chosen(choice, tools),), 'required', is_parallel)
  if choice == 'required' and not tools:
    raise ApiError(400, 'tool_choice = \'required\': expected tools to choose from.',
                   param='tool_choice')
  return Tools() if choice == 'none' else Tools(tools, choice, is_parallel)


def _tool(value: Any, where: str) -> Tool:
  fields = Fields(_object(value, where), where)
  fields.need('type', '"function"', lambda x: x == 'function')
  inner = Fields(fields.need('function', 'an object', is_object), f'{where}.function')
  fields.finish()
  name = inner.need('name', 'up to 64 letters, digits, _ and -',
                    lambda x: isinstance(x, str) and _NAME.fullmatch(x) is not None)
  inner.take('description', 'a text', lambda x: x == '' or is_text(x))
  parameters = inner.take('parameters', 'a JSON schema', is_object, _NO_PARAMETERS)
  is_strict = inner.flag('strict')
  inner.finish()
  try:
    text = json.dumps(value, ensure_ascii=False)
  except RecursionError as e:
    raise ApiError(400, f'{where} is nested too deeply.', param=where) from e
  if not is_text(text):
    raise ApiError(400, f'{where} holds a text that is not Unicode.', param=where)
  return Tool(name, parameters, is_strict, text)


def _chosen(choice: dict[str, Any], tools: Sequence[Tool]) -> Tool:
  fields = Fields(choice, 'tool_choice')
  fields.need('type', '"function"', lambda x: x == 'function')
  inner = Fields(fields.need('function', 'an object', is_object), 'tool_choice.function')
  fields.finish()
  names = {tool.name: tool for tool in tools}
  name = inner.need('name', 'the name of one of the tools',
                    lambda x: isinstance(x, str) and x in names)
  inner.finish()
  return names[name]


def take_calls(value: Any, where: str) -> list[dict[str, Any]]:
  """The calls that an assistant's message of the client's conversation holds, as it gave them.

  Raises:
    ApiError: 400 for a call that is malformed.
  """
  calls = []
  for i, one in enumerate(value):
    fields = Fields(_object(one, f'{where}[{i}]'), f'{where}[{i}]')
    fields.take('type', '"function"', lambda x: x == 'function')
    fields.take('id', 'a text', is_text)
    fields.ignore(('index',))
    inner = Fields(fields.need('function', 'an object', is_object), f'{where}[{i}].function')
    fields.finish()
    name = inner.need('name', 'the name of a function', is_text)
    arguments = inner.take('arguments', 'the text of a JSON object', _is_arguments, '{}')
    inner.finish()
    calls.append(one | {'function': {'name': name, 'arguments': arguments}})
  return calls


def _object(value: Any, where: str) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise ApiError(400, f'{where} = {short(value)}: expected an object.', param=where)
  return value


def _is_arguments(value: Any) -> bool:
  try:
    return is_text(value) and isinstance(json.loads(value), dict)
  except (ValueError, RecursionError):
    return False


# --- Grammars -------------------------------------------------------------------------


def grammar(tools: Tools, is_special: bool) -> str:
  """The grammar, in llguidance's Lark, of answers whose calls keep to the tools' schemas.

  Where a call is required the answer is one call. Otherwise it is any text with calls in it, or one
  call at its end where only one is wanted.

  Args:
    tools: the tools that may be called.
    is_special: whether the start marker is a special token and not a text.
  """
  opening, closing = (m if is_special else json.dumps(m) for m in CALLS[:2])
  rules, is_auto = [], tools.choice == 'auto'
  for i, tool in enumerate(tools.tools):
    # Without `strict` the arguments may be any object, as they may without a grammar.
    holds = tool.is_strict or not is_auto
    schema = {'type': 'object'} | (tool.parameters if holds else {})
    schema['x-guidance'] = {'whitespace_pattern': r'\x20?'}
    head = json.dumps(f'\n{{"name": {json.dumps(tool.name)}, "arguments": ')
    start = f'start_{i}' if is_auto else opening
    if is_auto:
      rules.append(f'start_{i}[lazy]: TEXT {opening}' if not is_special else
                   f'start_{i}: TEXT {opening}')
    rules.append(f'call_{i}: {start} {head} %json {json.dumps(schema)} "}}\\n" {closing}')
  any_call = ' | '.join(f'call_{i}' for i in range(len(tools.tools)))
  if not is_auto:
    return '\n'.join([f'start: {any_call}', *rules])
  begin = f'start: ({any_call})* tail' if tools.is_parallel else f'start: {any_call} | tail'
  return '\n'.join([begin, 'tail: TEXT', r'TEXT: /(.|\n)*/', *rules])


# --- Answers --------------------------------------------------------------------------


class CallSplitter:
  """Splits streamed text into plain content and calls.

  What stands between the markers and is no call of one of the tools is content, markers included.
  White space beside a call belongs to neither.
  """

  def __init__(self, tools: Tools) -> None:
    self._names = frozenset(tool.name for tool in tools.tools)
    self._is_single = not tools.is_parallel
    self._held = ''
    self._num_quoted = 0  # end markers that stand in a quotation of the call that is held
    self._searched = 0  # its characters that hold no end marker but these
    self._num_calls = 0
    self._is_after_call = False

  def feed(self, text: str, *, last: bool = False) -> tuple[str, list[Call]]:
    """The next pieces of (content, calls); `last` is True where no more text comes."""
    self._held += text
    content: list[str] = []
    calls: list[Call] = []
    while (end := self._piece(last)) is not None:
      piece, call = end
      content.append(self._outside(piece))
      if call is not None:
        calls += [call] if not (self._is_single and self._num_calls) else []
        self._num_calls += 1
        self._is_after_call = True
    return ''.join(content), calls

  def _outside(self, text: str) -> str:
    if self._is_after_call:
      text = text.lstrip()
    self._is_after_call = self._is_after_call and not text
    return text

  def _piece(self, last: bool) -> tuple[str, Call | None] | None:
    """Takes the next certain piece of what is held: content, and the call that follows it."""
    start = self._held.find(CALLS.start)
    if start < 0:
      certain = self._held if last else (
          self._held[:len(self._held) - num_held(self._held, [CALLS.start])].rstrip())
      return self._take(len(certain))
    inside = start + len(CALLS.start)
    end = self._end(inside)
    if end < 0 and not last:
      # What comes before the call is certain, but for the white space beside it.
      return self._take(len(self._held[:start].rstrip()))
    is_closed = end >= 0
    end = end if is_closed else len(self._held)
    after = end + len(CALLS.end) * is_closed
    call = parse(self._held[inside:end], self._names)
    before = self._held[:start].rstrip() if call else self._held[:after]
    self._held, self._num_quoted, self._searched = self._held[after:], 0, 0
    return before, call

  def _take(self, num: int) -> tuple[str, None] | None:
    piece, self._held = self._held[:num], self._held[num:]
    return (piece, None) if piece else None

  def _end(self, inside: int) -> int:
    """Where the end marker of the call that is held starts; −1 where it has not come yet."""
    while (end := self._held.find(CALLS.end, inside + self._searched)) >= 0:
      is_quoted = self._num_quoted < _MOST_QUOTED and _ends_in_quotation(self._held[inside:end])
      if not is_quoted:
        return end
      self._num_quoted += 1
      self._searched = end + 1 - inside
    return -1


def _ends_in_quotation(text: str) -> bool:
  """Whether the text is the beginning of JSON that breaks off inside a string."""
  try:
    json.loads(text)
  except json.JSONDecodeError as e:
    return e.msg.startswith('Unterminated string')
  except (ValueError, RecursionError):
    return False
  return False


def parse(text: str, names: frozenset[str]) -> Call | None:
  """The call that stands between the markers; None where it is none of the named functions.

  Nothing that a model writes here raises an exception.
  """
  def refuse(constant: str) -> NoReturn:
    raise ValueError(f'{constant} is no JSON')

  try:
    value = json.loads(text, parse_constant=refuse)
    if (not isinstance(value, dict) or set(value) != {'name', 'arguments'}
        or value['name'] not in names or not isinstance(value['arguments'], dict)):
      return None
    arguments = json.dumps(value['arguments'], ensure_ascii=False)
    # An escape may be a lone surrogate, which no message may hold. U+FFFD stands in its place, so
    # that the call can come back.
    return Call(value['name'], arguments.encode('utf-16', 'surrogatepass').decode(
        'utf-16', 'replace'))
  except (ValueError, TypeError, RecursionError):
    return None
