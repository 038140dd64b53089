"""reasoning-gym's tasks: the task's own scorer verifies the answer that a response states.

The reference answer names a problem as JSON {"task", "seed", "size", "settings", "index", "entry"}.
`entry` is the problem itself, as `data/gym_questions.py` made it, because some tasks make another
problem of the same index where strings hash otherwise. Without `entry` the problem is made again.

Some scorers evaluate the answer as an expression. They see only answers that `expressions` finds
harmless, and others are UNPARSED. This verifier must run in the pool all the same, never in the
trainer.
"""

import functools
import json
from typing import Any, NamedTuple

from jaxrl_pt.config import GymAnswer
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import expressions
from jaxrl_pt.verifiers.response_verdict import HostVerifier, Outcome, ResponseVerdict

# Scores from here on are right: the library scores from 0 to 1, in some tasks with rounding errors.
# The bound is no lower, because some scorers give the share of right characters, which is nearly 1
# for a long answer with one character too many.
RIGHT = 1.0 - 1e-6


class _Task(NamedTuple):
  """A task with its settings, and the reason if its answers are not verified."""

  data: Any  # the library's data set, which has the scorer
  refusal: str | None  # why no answer to this task is verified; None where answers are


@functools.lru_cache(maxsize=16)
def _task(name: str, seed: int, size: int, settings: tuple[tuple[str, Any], ...]) -> _Task:
  import reasoning_gym
  data = reasoning_gym.create_dataset(name, seed=seed, size=size, **dict(settings))
  return _Task(data, expressions.refused(name, data.score_answer))


def restored(plain: Any) -> Any:
  """The value that `gym_questions.plain` wrote as JSON, with the types that JSON does not have."""
  if isinstance(plain, list):
    return [restored(value) for value in plain]
  if not isinstance(plain, dict):
    return plain
  match plain:
    case {'~tuple': list(values)}:
      return tuple(map(restored, values))
    case {'~set': list(values)}:
      return set(map(restored, values))
    case {'~dict': list(pairs)}:
      return {restored(key): restored(value) for key, value in pairs}
  return {key: restored(value) for key, value in plain.items()}


def evaluates(reference: str) -> bool:
  """Whether the scorer of the problem evaluates answers."""
  return expressions.evaluates(json.loads(reference)['task'])


def extract(response: str, form: GymAnswer) -> str | None:
  """The text in the last `<answer>…</answer>`, or the whole response; None if it is blank."""
  if form == 'text':
    return response.strip() or None
  before, closing, _ = response.rpartition('</answer>')
  _, opening, stated = before.rpartition('<answer>')
  return stated.strip() or None if closing and opening else None


def parts(score: float, partial_credit: bool) -> dict[str, float]:
  """The parts of a reward: `answer`, and `partial` where a wrong answer may earn credit."""
  is_right = score >= RIGHT
  paid = {'answer': score if is_right else 0.0}
  return {**paid, 'partial': 0.0 if is_right else score} if partial_credit else paid


def verifier(form: GymAnswer, partial_credit: bool) -> HostVerifier:
  """The verifier of reasoning-gym's problems.

  A right answer earns the scorer's score. Any other earns 0, or with `partial_credit` its score.

  Raises:
    UserError: the `gym` extra is missing.
  """
  try:
    import reasoning_gym  # noqa: F401 an extra: only this verifier needs it
  except ImportError as error:
    raise UserError("GymVerifier needs the extra `gym`: pip install 'jaxrl_pt[gym]'.") from error

  def verify(response: str, reference: str) -> ResponseVerdict:
    stated = extract(response, form)
    if stated is None:
      return ResponseVerdict(Outcome.UNPARSED, parts(0.0, partial_credit))
    problem = json.loads(reference)
    data, refusal = _task(problem['task'], problem['seed'], problem['size'],
                          tuple(map(tuple, problem['settings'])))
    if refusal:
      return ResponseVerdict(Outcome.CRASH, detail=refusal)
    entry = restored(problem['entry']) if 'entry' in problem else data[problem['index']]
    if not expressions.is_admissible(problem['task'], stated, entry['answer']):
      return ResponseVerdict(Outcome.UNPARSED, parts(0.0, partial_credit), 'not an expression')
    try:
      score = float(data.score_answer(answer=stated, entry=entry))
    except Exception as error:  # The scorer cannot read this answer.
      return ResponseVerdict(Outcome.UNPARSED, parts(0.0, partial_credit),
                             f'{type(error).__name__}: {error}')
    outcome = Outcome.CORRECT if score >= RIGHT else Outcome.WRONG
    return ResponseVerdict(outcome, parts(score, partial_credit))

  return verify
