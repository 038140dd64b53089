"""Questions of a reasoning-gym task: `python -m jaxrl_pt.data.gym_questions TASK SEED SIZE`.

A process of its own, because some of the library's tasks follow the order of sets and so of
string hashes: `questions` starts it with the hash seed that the verifiers' processes have, and
(task, seed, size, index) then names the same problem everywhere. Imports no JAX.
"""

import json
import os
import subprocess
import sys

from jaxrl_pt.errors import UserError

HASH_SEED = {'PYTHONHASHSEED': '0'}


def questions(task: str, seed: int, size: int) -> list[str]:
  """The texts of `size` problems.

  Raises:
    UserError: the `gym` extra is missing, or there is no such task.
  """
  process = subprocess.run(
      [sys.executable, '-m', 'jaxrl_pt.data.gym_questions', task, str(seed), str(size)],
      env={**os.environ, **HASH_SEED}, capture_output=True, text=True, check=False)
  if process.returncode:
    raise RuntimeError(f'reasoning-gym failed at the task {task}: {process.stderr[-2000:]}')
  said = json.loads(process.stdout.splitlines()[-1])  # a task may print too
  if 'error' in said:
    raise UserError(said['error'])
  found: list[str] = said['questions']
  return found


def _answer(task: str, seed: int, size: int) -> dict[str, str | list[str]]:
  try:
    import reasoning_gym  # an extra: only this source needs it
  except ImportError:
    return {'error': "ReasoningGym needs the extra `gym`: pip install 'jaxrl_pt[gym]'."}
  try:
    data = reasoning_gym.create_dataset(task, seed=seed, size=size)
  except (ValueError, AssertionError) as error:  # no such task; one that needs settings
    return {'error': f'ReasoningGym.task = {task!r}: {error}.'}
  return {'questions': [data[i]['question'] for i in range(size)]}


if __name__ == '__main__':
  print(json.dumps(_answer(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
