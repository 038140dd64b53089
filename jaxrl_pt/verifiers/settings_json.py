"""Settings as JSON, for processes that are started with them."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jaxrl_pt import config as cfg

_TYPES: Mapping[str, type] = {
    kind.__name__: kind for kind in vars(cfg).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)}


def encoded(value: Any) -> Any:
  """Settings as JSON: {"kind": type, "fields": …}, and what they hold likewise."""
  if dataclasses.is_dataclass(value):
    return {'kind': type(value).__name__,
            'fields': {f.name: encoded(getattr(value, f.name)) for f in dataclasses.fields(value)}}
  if isinstance(value, (list, tuple)):
    return [encoded(item) for item in value]
  return value


def decoded(data: Any) -> Any:
  """The settings that `encoded` has written."""
  if isinstance(data, dict):
    return _TYPES[data['kind']](**{name: decoded(x) for name, x in data['fields'].items()})
  if isinstance(data, list):
    return tuple(map(decoded, data))
  return data
