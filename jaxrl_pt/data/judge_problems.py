"""Pairs of responses as problems of a judge, whose answer is the name of the better response."""

from collections.abc import Iterable, Iterator
import hashlib
import json

from jaxrl_pt import config
from jaxrl_pt.data import generated, judge_prompts
from jaxrl_pt.data.generated import Pair, Problem


def problems(source: config.JudgePairs, pairs: Iterable[Pair], is_chat: bool = False
             ) -> Iterator[Problem]:
  """Yields the problems of each pair: one, or two where it is shown in both orders.

  Args:
    source: how pairs are shown, and in which order.
    pairs: of `source.source`.
    is_chat: whether the prompt is put to the judge as a user's message, after a system message.
  """
  system = judge_prompts.system_text(source.prompt) if is_chat else ''
  for number, pair in enumerate(pairs):
    for is_swapped in _orders(source, pair):
      first, second = judge_prompts.orders(pair.better, pair.worse, is_swapped)
      prompt = judge_prompts.text(source.prompt, pair.query, first, second)
      if not is_chat:
        prompt = judge_prompts.without_chat(source.prompt, prompt)
      yield Problem(
          2 * number + is_swapped, prompt, source.prompt.verdict.labels[is_swapped], pair.place,
          _demonstration(source, pair, (first, second), int(is_swapped)), key=pair.query,
          system=system)


def _orders(source: config.JudgePairs, pair: Pair) -> tuple[bool, ...]:
  """Whether the worse response is shown first, for each problem of a pair."""
  match source.order:
    case 'both':
      return False, True
    case 'better_first':
      return (False,)
    case 'hashed':
      return (is_second(source.seed, pair.query, pair.better, pair.worse),)


def is_second(seed: int, *texts: str) -> bool:
  """Whether the better response stands second: a fair coin that is a hash of seed and texts."""
  hashed = hashlib.sha256(json.dumps([seed, *texts]).encode()).digest()
  return bool(hashed[0] & 1)


def _demonstration(source: config.JudgePairs, pair: Pair, shown: tuple[str, str], better: int
                   ) -> str:
  """A response of a judge to a pair.

  It works the query out and names the response with its result; where neither has it, which
  happens where the work goes wrong, it names either, as a hash says.
  """
  verdict = source.prompt.verdict
  steps, marker, result = pair.worked.rpartition(generated.MARKER)
  if not marker:
    return verdict.text(better)
  stated = [text.rpartition(generated.MARKER)[2] for text in shown]
  if result in stated and stated[0] != stated[1]:
    named = stated.index(result)
  else:
    named = int(is_second(source.seed, 'guess', pair.query, *shown))
  return (steps if source.is_worked else '') + verdict.text(named)
