"""reasoning-gym's tasks: the scorer of the task judges the answer of the response.

The reference names a problem as JSON {"task", "seed", "size", "settings", "index"}; the library
makes the same problem again from it, so that its scorer sees what it made and nothing is stored.
Some of the scorers evaluate the answer as an expression: judge in the pool, never in the trainer.
"""

import functools
import json
from typing import Any

from jaxrl_pt.config import GymAnswer
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers.judgement import HostVerifier, Judgement, Outcome

RIGHT = 0.99  # the library scores from 0 to 1, some tasks in floating point


@functools.lru_cache(maxsize=16)
def _dataset(task: str, seed: int, size: int, settings: tuple[tuple[str, Any], ...]) -> Any:
  import reasoning_gym
  return reasoning_gym.create_dataset(task, seed=seed, size=size, **dict(settings))


def extract(response: str, form: GymAnswer) -> str | None:
  """What stands in the last `<answer>…</answer>`, or the whole response; None if blank."""
  if form == 'text':
    return response.strip() or None
  before, closing, _ = response.rpartition('</answer>')
  _, opening, found = before.rpartition('<answer>')
  return found.strip() or None if closing and opening else None


def verifier(form: GymAnswer) -> HostVerifier:
  """The verifier of reasoning-gym's problems; the reward is the scorer's, from 0 to 1.

  Raises:
    UserError: the `gym` extra is missing.
  """
  try:
    import reasoning_gym  # noqa: F401 an extra: only this verifier needs it
  except ImportError as error:
    raise UserError("GymVerifier needs the extra `gym`: pip install 'jaxrl_pt[gym]'.") from error

  def judge(response: str, reference: str) -> Judgement:
    found = extract(response, form)
    if found is None:
      return Judgement(Outcome.UNPARSED, {'answer': 0.0})
    place = json.loads(reference)
    data = _dataset(place['task'], place['seed'], place['size'],
                    tuple(map(tuple, place['settings'])))
    entry = data[place['index']]
    try:
      score = float(data.score_answer(answer=found, entry=entry))
    except Exception as error:  # scorers read well-formed answers: this one could not be read
      return Judgement(Outcome.UNPARSED, {'answer': 0.0}, f'{type(error).__name__}: {error}')
    outcome = Outcome.CORRECT if score >= RIGHT else Outcome.WRONG
    return Judgement(outcome, {'answer': score})

  return judge
