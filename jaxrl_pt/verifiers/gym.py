"""reasoning-gym's tasks: the scorer of the task verifies the answer of the response.

The reference names a problem as JSON {"task", "seed", "size", "settings", "index", "entry"}.
`entry` is the problem itself, as `gym_questions` made it: some tasks make another one of the same
index where strings hash otherwise. A reference without it is made again.

Some scorers evaluate the answer. They see only answers that `expressions` finds harmless; others
are UNPARSED. Verify in the pool even so, never in the trainer.
"""

import functools
import json
from typing import Any, NamedTuple

from jaxrl_pt.config import GymAnswer
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import expressions
from jaxrl_pt.verifiers.response_verdict import HostVerifier, Outcome, ResponseVerdict

# The library scores from 0 to 1, some tasks in floating point. No lower: a long answer with a
# character too many gets its share of characters, which is nearly 1.
RIGHT = 1.0 - 1e-6


class _Task(NamedTuple):
  """A task's scorer with its settings; refusal: why it verifies nothing, if so."""

  data: Any
  refusal: str | None


@functools.lru_cache(maxsize=16)
def _task(name: str, seed: int, size: int, settings: tuple[tuple[str, Any], ...]) -> _Task:
  import reasoning_gym
  data = reasoning_gym.create_dataset(name, seed=seed, size=size, **dict(settings))
  return _Task(data, expressions.refused(name, data.score_answer))


def restored(plain: Any) -> Any:
  """Undoes `gym_questions.plain`, which writes as JSON what JSON does not have."""
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
  """What stands in the last `<answer>…</answer>`, or the whole response; None if blank."""
  if form == 'text':
    return response.strip() or None
  before, closing, _ = response.rpartition('</answer>')
  _, opening, found = before.rpartition('<answer>')
  return found.strip() or None if closing and opening else None


def parts(score: float, partial_credit: bool) -> dict[str, float]:
  """The parts of a reward: `answer`, and `partial` where credit for a wrong answer is paid."""
  is_right = score >= RIGHT
  paid = {'answer': score if is_right else 0.0}
  return {**paid, 'partial': 0.0 if is_right else score} if partial_credit else paid


def verifier(form: GymAnswer, partial_credit: bool) -> HostVerifier:
  """The verifier of reasoning-gym's problems: the score of a right answer, 0 for any other.

  With `partial_credit` the scorer's credit for an answer that is not right is paid too.

  Raises:
    UserError: the `gym` extra is missing.
  """
  try:
    import reasoning_gym  # noqa: F401 an extra: only this verifier needs it
  except ImportError as error:
    raise UserError("GymVerifier needs the extra `gym`: pip install 'jaxrl_pt[gym]'.") from error

  def verify(response: str, reference: str) -> ResponseVerdict:
    found = extract(response, form)
    if found is None:
      return ResponseVerdict(Outcome.UNPARSED, parts(0.0, partial_credit))
    place = json.loads(reference)
    data, refusal = _task(place['task'], place['seed'], place['size'],
                          tuple(map(tuple, place['settings'])))
    if refusal:
      return ResponseVerdict(Outcome.CRASH, detail=refusal)
    entry = restored(place['entry']) if 'entry' in place else data[place['index']]
    if not expressions.is_admissible(place['task'], found, entry['answer']):
      return ResponseVerdict(Outcome.UNPARSED, parts(0.0, partial_credit), 'not an expression')
    try:
      score = float(data.score_answer(answer=found, entry=entry))
    except Exception as error:  # scorers read well-formed answers: this one could not be read
      return ResponseVerdict(Outcome.UNPARSED, parts(0.0, partial_credit),
                       f'{type(error).__name__}: {error}')
    outcome = Outcome.CORRECT if score >= RIGHT else Outcome.WRONG
    return ResponseVerdict(outcome, parts(score, partial_credit))

  return verify
