"""The formats that a client may ask an answer to have: `response_format`, `guided_json`, …"""

from collections.abc import Callable
import json
from typing import Any, NamedTuple

from jaxrl_pt.serving import constraint
from jaxrl_pt.serving.fields import ApiError, Fields, is_object, is_text

_TYPES = ('text', 'json_object', 'json_schema', 'regex')


class Format(NamedTuple):
  """What an answer has to look like, and the field that says so."""

  field: str
  grammar: str


def take(fields: Fields) -> Format | None:
  """The format that a body asks for; None where it asks for none.

  Raises:
    ApiError: 400 where a field is malformed, or two of them ask for a format.
  """
  found = [f for f in (_response_format(fields), _guided_json(fields), _guided_regex(fields)) if f]
  if len(found) > 1:
    raise ApiError(400, f'{found[1].field} cannot be combined with {found[0].field}: expected one '
                   'of them.', param=found[1].field)
  return found[0] if found else None


def _response_format(fields: Fields) -> Format | None:
  field = 'response_format'
  value = fields.take(field, 'an object', is_object)
  if value is None:
    return None
  inner = Fields(value, field)
  kind = inner.need('type', f'one of {", ".join(_TYPES)}', lambda x: x in _TYPES)
  found = None
  match kind:
    case 'json_object':
      found = _of_schema(field, {'type': 'object'})
    case 'json_schema':
      said = inner.need('json_schema', 'an object', is_object)
      found = _json_schema(said, f'{field}.json_schema')
    case 'regex':
      pattern = inner.need('pattern', 'a regular expression', is_text)
      found = _made(f'{field}.pattern', constraint.regex_grammar, pattern)
  inner.finish()
  return found


def _json_schema(value: dict[str, Any], where: str) -> Format:
  fields = Fields(value, where)
  schema = fields.need('schema', 'a JSON schema', is_object)
  # OpenAI wants a name; every answer keeps to the schema here, whether `strict` or not.
  fields.take('name', 'a text', is_text)
  fields.take('description', 'a text', lambda x: x == '' or is_text(x))
  fields.flag('strict')
  fields.finish()
  return _of_schema(f'{where}.schema', schema)


def _guided_json(fields: Fields) -> Format | None:
  field = 'guided_json'
  value = fields.take(field, 'a JSON schema, or the text of one', lambda x: (
      is_object(x) or (isinstance(x, str) and is_object(_read(x)))))
  if value is None:
    return None
  return _of_schema(field, _read(value) if isinstance(value, str) else value)


def _guided_regex(fields: Fields) -> Format | None:
  field = 'guided_regex'
  value = fields.take(field, 'a regular expression', is_text)
  return None if value is None else _made(field, constraint.regex_grammar, value)


def _read(text: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return None


def _of_schema(field: str, schema: dict[str, Any]) -> Format:
  return _made(field, constraint.json_grammar, schema)


def _made(field: str, grammar: Callable[[Any], str], said: Any) -> Format:
  """The format whose grammar is made of what the field says."""
  try:
    return Format(field, grammar(said))
  except ValueError as e:
    raise ApiError(400, f'{field} cannot be met: {e}.', param=field) from e
