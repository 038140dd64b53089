"""Checks that the dataclasses of settings make of their own fields."""

from collections.abc import Iterable
import math
from typing import Any, get_args

from jaxrl_pt.errors import UserError, shown

INT32 = 2**31 - 1  # Steps, ids and sizes are 32-bit integers on the device.
# Eight powers of ten below the largest float32, so that sums of such numbers stay finite.
LARGEST = 1e30
# A factor below float32's precision changes nothing, which nobody can want.
SMALLEST = 1e-12
_SHOWN = 300  # characters of a wrong value in a message


def fail(owner: Any, name: str, expected: str) -> None:
  value = getattr(owner, name)
  raise UserError(f'{type(owner).__name__}.{name} = {shown(value, _SHOWN)}: expected {expected}.')


def integer(owner: Any, name: str, low: int, high: int | None = None) -> None:
  """Asks for a whole number from `low` to `high`, or to the largest that 32 bits hold."""
  value = getattr(owner, name)
  if not _is_integer(value) or value < low or (high is not None and value > high):
    fail(owner, name, f'a whole number of at least {low}'
          if high is None else f'a whole number from {low} to {high}')
  if value > INT32 and high is None:
    fail(owner, name, f'a whole number of at most {INT32}')


def size(owner: Any, name: str, low: int, high: int, num_bytes: float, what: str) -> None:
  """Asks for a whole number that is a size of arrays; no machine holds those of more than `high`.

  Args:
    owner: the settings.
    name: the field.
    low: the smallest value.
    high: the largest value.
    num_bytes: the least bytes of the arrays for each unit of the size, for the message.
    what: the arrays, for the message.
  """
  value = getattr(owner, name)
  if not _is_integer(value) or value < low:
    fail(owner, name, f'a whole number of at least {low}')
  if value > high:
    fail(owner, name, f'a whole number of at most {high}, since {what} would take at least '
         f'{memory(value * num_bytes)}')


def memory(num_bytes: float) -> str:
  """A number of bytes as a person reads it."""
  if num_bytes > LARGEST:
    return f'{LARGEST:g} bytes'
  names = ('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')
  power = min(max(0, int(num_bytes).bit_length() - 1) // 10, len(names) - 1)
  return f'{num_bytes / 1024**power:.3g} {names[power]}'


def number(owner: Any, name: str, low: float, high: float = LARGEST) -> None:
  """Asks for a finite number from `low` to `high`."""
  value = getattr(owner, name)
  if not _is_number(value) or not value >= low or (high < LARGEST and value > high):
    fail(owner, name, f'a number of at least {low:g}'
          if high == LARGEST else f'a number from {low:g} to {high:g}')
  if value > high:
    fail(owner, name, f'a number of at most {high:g}, which float32 can still hold')


def positive(owner: Any, name: str, low: float = SMALLEST) -> None:
  """Asks for a finite number of at least `low`, which float32 does not round to 0."""
  if not _is_number(getattr(owner, name)) or not getattr(owner, name) >= low:
    fail(owner, name, f'a number above 0, of at least {low:g}')
  number(owner, name, low)


def units(owner: Any, *names: str) -> int:
  """The product of these fields, of which those that are no valid sizes count as 1."""
  values = [getattr(owner, name) for name in names]
  return math.prod(max(1, v) if _is_integer(v) else 1 for v in values)


def below_one(owner: Any, name: str) -> None:
  """Asks for the decay of a running average, which at 1 would never move."""
  value = getattr(owner, name)
  number(owner, name, 0.0, 1.0)
  if value > 1 - 1e-7:
    fail(owner, name, 'a number from 0 to 0.9999999, since an average that decays by 1 never '
         'learns')


def is_weight(value: Any) -> bool:
  """Whether it is a finite number of any sign."""
  return _is_number(value) and abs(value) <= LARGEST


def is_plain(value: Any) -> bool:
  """Whether it is a flag, a finite number or a text, which gin can write and read again."""
  return isinstance(value, bool) or is_text(value) or is_weight(value)


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  return _is_integer(value) or isinstance(value, float)


def rising(owner: Any, name: str, length: int) -> None:
  """Asks for numbers in rising order, and turns a list of them into a hashable tuple."""
  value = getattr(owner, name)
  is_numbers = isinstance(value, (list, tuple)) and all(
      is_weight(x) for x in value)
  if not is_numbers or len(value) != length or list(value) != sorted(value):
    fail(owner, name, f'{length} numbers that rise')
  object.__setattr__(owner, name, tuple(value))


def counts(owner: Any, name: str, most: int) -> None:
  """Asks for 1 to `most` whole numbers above 0, and turns a list of them into a tuple."""
  value = getattr(owner, name)
  is_counts = isinstance(value, (list, tuple)) and 1 <= len(value) <= most and all(
      _is_integer(x) and 1 <= x <= 2**10 for x in value)
  if not is_counts:
    fail(owner, name, f'a list of 1 to {most} whole numbers from 1 to 1024')
  object.__setattr__(owner, name, tuple(value))


def weight(owner: Any, name: str) -> None:
  """Asks for a finite number of any sign."""
  if not is_weight(getattr(owner, name)):
    fail(owner, name, f'a number from {-LARGEST:g} to {LARGEST:g}')


def token_ids(owner: Any, name: str) -> None:
  """Asks for token ids, and turns a list of them into a hashable tuple."""
  value = getattr(owner, name)
  is_ids = isinstance(value, (list, tuple)) and all(
      _is_integer(x) and 0 <= x <= INT32 for x in value)
  if not is_ids:
    fail(owner, name, f'a list of token ids, each from 0 to {INT32}')
  object.__setattr__(owner, name, tuple(value))


def texts(owner: Any, name: str, expected: str, low: int = 0) -> None:
  """Asks for at least `low` texts, none of them empty, and turns a list into a tuple."""
  value = getattr(owner, name)
  is_list = isinstance(value, (list, tuple)) and len(value) >= low
  if not is_list or not all(x and is_text(x) for x in value):
    fail(owner, name, expected)
  object.__setattr__(owner, name, tuple(value))


def is_text(value: Any) -> bool:
  """Whether it is a string without NUL and lone surrogates, which files and paths can hold."""
  try:
    return isinstance(value, str) and '\0' not in value and bool(value.encode() or True)
  except UnicodeEncodeError:
    return False


def choice(owner: Any, name: str, literal: Any) -> None:
  options = get_args(literal)
  if getattr(owner, name) not in options:
    fail(owner, name, 'one of ' + ', '.join(repr(o) for o in options))


def flag(owner: Any, name: str) -> None:
  if not isinstance(getattr(owner, name), bool):
    fail(owner, name, 'True or False')


def text(owner: Any, name: str, *, empty: bool = False) -> None:
  value = getattr(owner, name)
  if not isinstance(value, str) or (not value and not empty):
    fail(owner, name, 'a string' if empty else 'a non-empty string')
  if not is_text(value):
    fail(owner, name, 'a string of UTF-8 without NUL')


def instance(owner: Any, name: str, *types: type) -> None:
  if not isinstance(getattr(owner, name), types):
    fail(owner, name, one_of(types))


def one_of(types: Iterable[type]) -> str:
  """How a gin file chooses among config types, for messages."""
  return 'one of ' + ', '.join(f'@cfg.{kind.__name__}()' for kind in types)
