"""Takes the fields of a JSON body one by one, and refuses those that are wrong or unknown."""

from collections.abc import Callable, Iterable
import json
import math
from typing import Any, NoReturn


class ApiError(Exception):
  """An error that is answered in the shape of OpenAI's errors."""

  def __init__(self, status: int, message: str, *, param: str | None = None,
               code: str | None = None, headers: dict[str, str] | None = None) -> None:
    super().__init__(message)
    self.status, self.headers = status, headers or {}
    kind = {401: 'authentication_error', 429: 'rate_limit_error'}.get(
        status, 'invalid_request_error' if status < 500 else 'server_error')
    # The name of a field may hold a lone surrogate, which no answer can be encoded with.
    written = None if param is None else param.encode(errors='backslashreplace').decode()
    self.body = {'error': {'message': message, 'type': kind, 'param': written, 'code': code}}


def read_json(body: bytes) -> dict[str, Any]:
  """The object that a body holds.

  Raises:
    ApiError: the body is not UTF-8, not JSON or not an object.
  """
  def refuse(constant: str) -> NoReturn:
    raise ValueError(f'{constant} is no number')

  try:
    value = json.loads(body.decode('utf-8'), parse_constant=refuse)
  except UnicodeDecodeError as e:
    raise ApiError(400, f'The body is not UTF-8 text (byte {e.start}).') from e
  except (ValueError, RecursionError) as e:
    what = 'it is nested too deeply' if isinstance(e, RecursionError) else e
    raise ApiError(400, f'The body is not JSON: {what}.') from e
  if not isinstance(value, dict):
    raise ApiError(400, 'The body must be a JSON object.')
  return value


class Fields:
  """An object whose fields are taken one by one; `finish` refuses those that nobody has taken."""

  def __init__(self, body: dict[str, Any], where: str = '') -> None:
    """Starts with all fields that are not null.

    Args:
      body: the object.
      where: the name of the field that holds the object, '' for the body itself.
    """
    self._left = {k: v for k, v in body.items() if v is not None}
    self._where = f'{where}.' if where else ''

  def take(self, name: str, expected: str, is_valid: Callable[[Any], bool],
           default: Any = None) -> Any:
    """The field's value, or `default` where it is missing or null.

    Raises:
      ApiError: `is_valid` is false of the value; the message says what is `expected`.
    """
    value = self._left.pop(name, None)
    if value is None:
      return default
    if not is_valid(value):
      raise ApiError(400, f'{self._where}{name} = {short(value)}: expected {expected}.',
                     param=self._where + name)
    return value

  def need(self, name: str, expected: str, is_valid: Callable[[Any], bool]) -> Any:
    """`take` for a field that has to be there."""
    value = self.take(name, expected, is_valid)
    if value is None:
      raise ApiError(400, f'{self._where}{name} is missing: expected {expected}.',
                     param=self._where + name)
    return value

  def integer(self, name: str, default: int | None, low: int, high: int) -> Any:
    return self.take(name, f'a whole number from {low} to {high}',
                     lambda x: is_integer(x) and low <= x <= high, default)

  def number(self, name: str, default: float, expected: str,
             is_valid: Callable[[float], bool]) -> float:
    return self.take(name, expected, lambda x: (is_integer(x) or isinstance(x, float)) and
                     abs(x) < 1e30 and math.isfinite(x) and is_valid(x), default)

  def flag(self, name: str, default: bool = False) -> bool:
    return self.take(name, 'true or false', lambda x: isinstance(x, bool), default)

  def texts(self, name: str, most: int) -> tuple[str, ...]:
    value = self.take(name, 'a text or a list of texts, none of them empty', lambda x: (
        is_text(x) if isinstance(x, str) else isinstance(x, list) and all(map(is_text, x))), ())
    if not isinstance(value, str) and len(value) > most:
      raise ApiError(400, f'{name} holds {len(value)} texts: expected at most {most}.', param=name)
    return (value,) if isinstance(value, str) else tuple(value)

  def refuse(self, name: str, *harmless: Any) -> None:
    """Takes a field that this server does not support; only the `harmless` values pass."""
    value = self._left.pop(name, None)
    if value is not None and value not in harmless:
      raise ApiError(400, f'{self._where}{name} = {short(value)}: this server does not support it.',
                     param=self._where + name)

  def ignore(self, names: Iterable[str]) -> None:
    """Drops fields that change nothing, whatever their values."""
    for name in names:
      self._left.pop(name, None)

  def finish(self) -> None:
    """Refuses the fields that have not been taken."""
    for name in self._left:
      raise ApiError(400, f'Unknown field {short(self._where + name)}.', param=self._where + name)


def is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def is_object(value: Any) -> bool:
  return isinstance(value, dict)


def is_text(value: Any) -> bool:
  """Whether it is a text that is not empty and, having no lone surrogates, can be UTF-8."""
  try:
    return isinstance(value, str) and bool(value.encode())
  except UnicodeEncodeError:
    return False


def short(value: Any) -> str:
  """The value in at most 60 characters of ASCII, for a message."""
  try:
    text = ascii(value)
  except RecursionError:
    return '[...]'
  return text if len(text) <= 60 else text[:57] + '...'
