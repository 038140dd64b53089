"""Checks that the settings' dataclasses make of their own fields."""

import math
from typing import Any, get_args

from jaxrl_pt.errors import UserError


def fail(owner: Any, name: str, expected: str) -> None:
  value = getattr(owner, name)
  raise UserError(f'{type(owner).__name__}.{name} = {value!r}: expected {expected}.')


def integer(owner: Any, name: str, low: int, high: int | None = None) -> None:
  value = getattr(owner, name)
  is_integer = isinstance(value, int) and not isinstance(value, bool)
  if not is_integer or value < low or (high is not None and value > high):
    fail(owner, name, f'a whole number of at least {low}'
          if high is None else f'a whole number from {low} to {high}')


def number(owner: Any, name: str, low: float, high: float = math.inf) -> None:
  value = getattr(owner, name)
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not is_number or not low <= value <= high or math.isnan(value):
    fail(owner, name, f'a number of at least {low:g}'
          if high == math.inf else f'a number from {low:g} to {high:g}')


def rising(owner: Any, name: str, length: int) -> None:
  """Also turns a list, as gin files write one, into the tuple that can be hashed."""
  value = getattr(owner, name)
  is_numbers = isinstance(value, (list, tuple)) and all(
      isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
  if not is_numbers or len(value) != length or list(value) != sorted(value):
    fail(owner, name, f'{length} numbers that rise')
  object.__setattr__(owner, name, tuple(value))


def token_ids(owner: Any, name: str) -> None:
  """Also turns a list, as gin files write one, into the tuple that can be hashed."""
  value = getattr(owner, name)
  is_ids = isinstance(value, (list, tuple)) and all(
      isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value)
  if not is_ids:
    fail(owner, name, 'a list of token ids')
  object.__setattr__(owner, name, tuple(value))


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


def instance(owner: Any, name: str, *types: type) -> None:
  if not isinstance(getattr(owner, name), types):
    fail(owner, name, 'one of ' + ', '.join(f'@cfg.{t.__name__}()' for t in types))
