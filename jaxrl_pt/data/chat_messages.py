"""Checks the messages of conversations, and brings them into the one form that templates read.

A message is an object with a `role` and a `content`, as in OpenAI's API and in rows of fine-tuning
data; that of an assistant may have `tool_calls`, and other fields go to the template as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import json
from typing import Any

from jaxrl_pt.errors import UserError, shown

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
# The fields in which servers and data keep what an assistant thought.
_REASONING = ('reasoning_content', 'thinking', 'reasoning')
_DEEPEST = 100  # levels of lists and objects, which templates and their filters walk recursively


def checked(messages: Any, where: str = 'messages') -> list[dict[str, Any]]:
  """The messages as templates read them; the given ones are left as they are.

  Text parts become one text, a tool call is {'type': 'function', 'function': {'name': …,
  'arguments': an object}} whatever form it had, and what was thought is in `reasoning_content`.

  Args:
    messages: a list of objects.
    where: what they are, for errors.

  Raises:
    UserError: the first message that is none, by its place.
  """
  if not isinstance(messages, (list, tuple)) or not messages:
    raise UserError(f'{where} = {shown(messages)}: expected a list of at least one message.')
  return [_message(message, f'{where}[{i}]') for i, message in enumerate(messages)]


def strings(value: Any) -> Iterator[str]:
  """All texts in a value of JSON, the names of fields among them."""
  left = [value]
  while left:
    one = left.pop()
    if isinstance(one, str):
      yield one
    elif isinstance(one, Mapping):
      left += [*one.keys(), *one.values()]
    elif isinstance(one, (list, tuple)):
      left += one


def mapped(change: Callable[[str], str], value: Any) -> Any:
  """A value of JSON in which texts are changed, but not the names of fields."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, Mapping):
    return {name: mapped(change, one) for name, one in value.items()}
  if isinstance(value, (list, tuple)):
    return [mapped(change, one) for one in value]
  return value


def other_forms(messages: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
  """The messages with their tool calls as other templates expect them; none where there are none.

  These are: arguments as texts of JSON, and an empty text as the content of a turn without one.
  """
  if not any('tool_calls' in message for message in messages):
    return []
  texts = [message | {'tool_calls': [call | {'function': call['function'] | {
      'arguments': json.dumps(call['function']['arguments'], ensure_ascii=False)}}
      for call in message['tool_calls']]} if 'tool_calls' in message else message
      for message in messages]
  empty = [message | {'content': message['content'] or ''} for message in messages]
  return [texts, empty]


def _message(message: Any, where: str) -> dict[str, Any]:
  if not isinstance(message, Mapping):
    raise UserError(f'{where} = {shown(message)}: expected an object with a role and a content.')
  role = message.get('role')
  if role not in ROLES:
    raise UserError(f'{where}.role = {shown(role)}: expected one of {", ".join(ROLES)}.')
  _check_json(message, where)
  calls = message.get('tool_calls') or ()
  if calls and role != 'assistant':
    raise UserError(f'{where}.tool_calls: a {role} message has none; expected them of an assistant '
                    'alone.')
  new = {name: value for name, value in message.items() if name != 'tool_calls'}
  new['content'] = _content(message.get('content'), f'{where}.content', is_free=bool(calls))
  if calls:
    if not isinstance(calls, (list, tuple)):
      raise UserError(f'{where}.tool_calls = {shown(calls)}: expected a list of calls.')
    new['tool_calls'] = [_call(call, f'{where}.tool_calls[{i}]') for i, call in enumerate(calls)]
  thought = next((new[name] for name in _REASONING if new.get(name) is not None), None)
  return new if thought is None else {'thinking': thought, **new, 'reasoning_content': thought}


def _content(content: Any, where: str, *, is_free: bool) -> str | None:
  if isinstance(content, str) or (content is None and is_free):
    return content
  if isinstance(content, (list, tuple)) and all(
      isinstance(part, Mapping) and part.get('type') == 'text'
      and isinstance(part.get('text'), str) for part in content):
    return ''.join(part['text'] for part in content)
  raise UserError(f'{where} = {shown(content)}: expected a text, or a list of text parts.')


def _call(call: Any, where: str) -> dict[str, Any]:
  # Some data has the function itself in the list.
  function = call.get('function', call) if isinstance(call, Mapping) else None
  name = function.get('name') if isinstance(function, Mapping) else None
  if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
    raise UserError(f'{where} = {shown(call)}: expected {{"type": "function", "function": '
                    '{"name": …, "arguments": …}}.')
  given = function.get('arguments', {})
  arguments = given
  if isinstance(given, str):
    try:
      arguments = json.loads(given)
    except (ValueError, RecursionError):
      arguments = None
    _check_json(arguments, f'{where}.function.arguments')  # An escape may be a lone surrogate.
  if not isinstance(arguments, Mapping):
    raise UserError(f'{where}.function.arguments = {shown(given)}: expected a JSON object, or '
                    'the text of one.')
  outer = {name: value for name, value in call.items() if name not in ('name', 'arguments')}
  return outer | {'type': 'function', 'function': {**function, 'arguments': dict(arguments)}}


def _check_json(value: Any, where: str) -> None:
  """Checks that a value is one of JSON, of Unicode text, so that no template reads an object."""
  left: list[tuple[Any, int]] = [(value, 0)]
  while left:
    one, depth = left.pop()
    if depth > _DEEPEST:
      raise UserError(f'{where} is nested more than {_DEEPEST} levels deep: leave some out.')
    if isinstance(one, Mapping):
      left += [(inner, depth + 1) for inner in (*one.keys(), *one.values())]
    elif isinstance(one, (list, tuple)):
      left += [(inner, depth + 1) for inner in one]
    elif isinstance(one, str):
      _check_text(one, where)
    elif not isinstance(one, (int, float, type(None))):
      raise UserError(f'{where} holds {shown(one)}, which is no JSON: write a text.')


def _check_text(text: str, where: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise UserError(f'{where} holds a text that is not Unicode (a lone surrogate at character '
                    f'{e.start}): leave it out.') from e


def check_tools(tools: Sequence[Any], where: str = 'tools') -> list[dict[str, Any]]:
  """The descriptions of tools as templates read them.

  Raises:
    UserError: one of them is no object.
  """
  if not isinstance(tools, (list, tuple)):
    raise UserError(f'{where} = {shown(tools)}: expected a list of tools.')
  for i, tool in enumerate(tools):
    if not isinstance(tool, Mapping):
      raise UserError(f'{where}[{i}] = {shown(tool)}: expected an object that describes a tool.')
    _check_json(tool, f'{where}[{i}]')
  return [dict(tool) for tool in tools]
