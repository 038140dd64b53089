"""Runs a program in isolation and evaluates expressions with its names: no module imports this.

`interpreter.evaluate` shows this file to the isolated Python as /main.py, beside /input.json:

    {"program": text, "setup": text, "expressions": [text, …]}

It writes the JSON list of what became of each expression, as far as they were reached:
{"value": encoded} or {"error": text}. Nothing in this process is trusted. The program may change
all of it, and write the output itself.
"""

import json
import os
import sys
import types


def encoded(value):
  """The value as JSON that `interpreter.decoded` reads; plain types only."""
  if value is None or isinstance(value, (bool, str)):
    return value if value is None or isinstance(value, bool) else str.__str__(value)
  for kind, convert in (('int', lambda x: hex(int(x))), ('float', lambda x: float(x).hex()),
                        ('complex', lambda x: [float(x.real).hex(), float(x.imag).hex()]),
                        ('bytes', lambda x: bytes(x).hex())):
    if isinstance(value, __builtins__.__dict__[kind]):
      return [kind, convert(value)]
  if isinstance(value, dict):
    return ['dict', [[encoded(k), encoded(v)] for k, v in value.items()]]
  for kind in (list, tuple, set, frozenset):
    if isinstance(value, kind):
      return [kind.__name__, [encoded(item) for item in value]]
  return ['other', type(value).__name__]


def attempted(action):
  """What became of an action: its value or its exception, whichever that is."""
  try:
    return {'value': action()}
  except BaseException as error:
    return {'error': f'{type(error).__name__}: {error}'[:200]}


def main():
  with open('/input.json', encoding='utf-8') as file:
    request = json.load(file)
  output = os.dup(1)
  os.dup2(0, 1)  # What the program prints goes nowhere.
  os.dup2(0, 2)
  module = types.ModuleType('program')
  sys.modules['program'] = module
  names = module.__dict__
  sys.setrecursionlimit(10_000)
  results = []
  for title in ('program', 'setup'):
    done = attempted(lambda title=title: exec(compile(request[title], title, 'exec'), names))
    if 'error' in done:
      results = [done] * len(request['expressions'])
      break
  else:
    for text in request['expressions']:
      results.append(attempted(lambda text=text: encoded(eval(text, names))))
  data = json.dumps(results).encode()
  while data:
    data = data[os.write(output, data):]
  os._exit(0)


main()
