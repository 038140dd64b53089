"""Questions of a reasoning-gym task: `python -m jaxrl_pt.data.gym_questions SOURCE`.

This module runs as a process of its own, because some of the library's tasks follow the order of
sets and so of string hashes. `questions` starts it with the hash seed that the verifiers' processes
have, so that (source, index) names the same problem everywhere. It imports no JAX.
"""

import json
import numbers
import os
import subprocess
import sys
from typing import Any, NamedTuple

from jaxrl_pt import config
from jaxrl_pt.errors import UserError

HASH_SEED = {'PYTHONHASHSEED': '0'}


class Question(NamedTuple):
  """A problem as the library words it.

  answer: one that the library accepts, empty where it has none.
  entry: all that the library knows of the problem, as `plain` writes it; None where `plain` cannot.
  """

  text: str
  answer: str
  entry: dict[str, Any] | None


def reference(source: config.ReasoningGym) -> dict[str, Any]:
  """The settings that name a task's problems, as values for JSON."""
  return {'task': source.task, 'seed': source.seed, 'size': source.size,
          'settings': [list(pair) for pair in source.settings]}


def plain(value: Any) -> Any:
  """Turns a problem's data into JSON; tuples, sets and keys that are no text are marked.

  `verifiers.gym.restored` undoes it.

  Raises:
    TypeError: the data holds objects of other types.
  """
  if isinstance(value, dict):
    if all(isinstance(key, str) and not key.startswith('~') for key in value):
      return {str(key): plain(each) for key, each in value.items()}
    return {'~dict': [[plain(key), plain(each)] for key, each in value.items()]}
  if isinstance(value, tuple):
    return {'~tuple': [plain(each) for each in value]}
  if isinstance(value, (set, frozenset)):
    return {'~set': sorted((plain(each) for each in value), key=json.dumps)}
  if isinstance(value, list):
    return [plain(each) for each in value]
  for kind in (str, bool, int, float):  # numpy's strings and floats are of them, too
    if isinstance(value, kind):
      return kind(value)
  if isinstance(value, numbers.Integral):
    return int(value)
  if value is None:
    return None
  raise TypeError(f'{value!r} of type {type(value).__name__}')


def questions(source: config.ReasoningGym) -> list[Question]:
  """The problems of a task.

  Raises:
    UserError: the `gym` extra is missing, there is no such task, or it has no such setting.
  """
  process = subprocess.run(
      [sys.executable, '-m', 'jaxrl_pt.data.gym_questions', json.dumps(reference(source))],
      env={**os.environ, **HASH_SEED}, capture_output=True, text=True, check=False)
  if process.returncode:
    raise RuntimeError(f'reasoning-gym failed at the task {source.task}: '
                       f'{process.stderr[-2000:]}')
  said = json.loads(process.stdout.splitlines()[-1])  # a task may print too
  if 'error' in said:
    raise UserError(said['error'])
  return [Question(*question) for question in said['questions']]


def _answer(task: str, seed: int, size: int, settings: list[list[Any]]) -> dict[str, Any]:
  try:
    import reasoning_gym  # an extra: only this source needs it
  except ImportError:
    return {'error': "ReasoningGym needs the extra `gym`: pip install 'jaxrl_pt[gym]'."}
  try:
    data = reasoning_gym.create_dataset(task, seed=seed, size=size, **dict(settings))
  except TypeError as error:  # an argument that the task does not have
    return {'error': f'ReasoningGym.settings = {dict(settings)} of the task {task!r}: {error}.'}
  except (ValueError, AssertionError) as error:  # no such task; one that needs settings
    return {'error': f'ReasoningGym.task = {task!r}: {error}.'}
  entries = [data[i] for i in range(size)]
  return {'questions': [
      (entry['question'], '' if entry['answer'] is None else str(entry['answer']), _entry(entry))
      for entry in entries]}


def _entry(entry: dict[str, Any]) -> dict[str, Any] | None:
  """The problem as JSON, or None, where the verifier makes the problem again from its name."""
  try:
    found: dict[str, Any] = plain(entry)
  except TypeError:
    return None
  return found


if __name__ == '__main__':
  print(json.dumps(_answer(**json.loads(sys.argv[1]))))
