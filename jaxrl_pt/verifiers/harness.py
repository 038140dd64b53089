"""Runs a program in isolation and evaluates expressions with its names: no module imports this.

`interpreter.evaluate` shows this file to the isolated Python as /main.py, beside /input.json:

    {"program": text, "setup": text, "expressions": [text, …]}

It writes the JSON list of what became of each expression, as far as they were reached:
{"value": encoded} or {"error": text}. Nothing in this process is trusted. The program may change
all of it, and write the output itself.
"""

from collections.abc import Callable
import functools
import json
import os
import sys
import types
from typing import Any


def encoded(value: Any) -> Any:
  """The value as JSON that `interpreter.decoded` reads; plain types only."""
  if value is None or isinstance(value, bool):
    return value
  if isinstance(value, str):
    return str(value)
  if isinstance(value, int):
    return ['int', hex(int(value))]
  if isinstance(value, float):
    return ['float', float(value).hex()]
  if isinstance(value, complex):
    return ['complex', [value.real.hex(), value.imag.hex()]]
  if isinstance(value, bytes):
    return ['bytes', bytes(value).hex()]
  if isinstance(value, dict):
    return ['dict', [[encoded(k), encoded(v)] for k, v in value.items()]]
  for kind in (list, tuple, set, frozenset):
    if isinstance(value, kind):
      return [kind.__name__, [encoded(item) for item in value]]
  return ['other', type(value).__name__]


def attempted(action: Callable[[], Any]) -> dict[str, Any]:
  """What became of an action: its value or its exception, whichever that is."""
  try:
    return {'value': action()}
  except BaseException as error:
    return {'error': f'{type(error).__name__}: {error}'[:200]}


def evaluated(text: str, names: dict[str, Any]) -> Any:
  """The encoded value of an expression."""
  return encoded(eval(text, names))


def main() -> None:
  with open('/input.json', encoding='utf-8') as file:
    request = json.load(file)
  output = os.dup(1)
  os.dup2(0, 1)  # What the program prints goes nowhere.
  os.dup2(0, 2)
  module = types.ModuleType('program')
  sys.modules['program'] = module
  names = module.__dict__
  results = []
  for text in (request['program'], request['setup']):
    done = attempted(functools.partial(exec, text, names))
    if 'error' in done:
      results = [done] * len(request['expressions'])
      break
  else:
    results = [attempted(functools.partial(evaluated, text, names))
               for text in request['expressions']]
  data = json.dumps(results).encode()
  while data:
    data = data[os.write(output, data):]
  os._exit(0)


main()
