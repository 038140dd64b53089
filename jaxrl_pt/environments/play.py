"""The command `play`: a person plays an environment at the terminal, as the policy would."""

from collections.abc import Iterable, Iterator
import json
from typing import TextIO

from jaxrl_pt import config as cfg
from jaxrl_pt.environments.episodes import EpisodePool, Observation, Start
from jaxrl_pt.environments.interactive import Problem


def play(settings: cfg.Interactive, problem: Problem, texts: Iterable[str], out: TextIO,
         as_json: bool) -> bool:
  """Plays one episode with the texts of a person.

  Args:
    settings: the environment.
    problem: what the episode is about.
    texts: one text a turn.
    out: where messages, observations and rewards are written.
    as_json: whether as JSON, an object a line.

  Returns:
    Whether the episode has ended well: not by a failure of the environment, nor because the texts
    have ended.
  """
  with EpisodePool(settings, cfg.VerifierPool(num_workers=1)) as pool:
    start, = pool.start([problem])
    _write(out, as_json, _opening(start))
    episode, outcome = start.episode, start.outcome
    for text in texts if not episode.done else ():
      seen, = pool.step([(episode, text)])
      episode, outcome = seen.episode, seen.outcome
      _write(out, as_json, _turn(seen))
      if episode.done:
        break
  return episode.done and outcome.is_valid


def _opening(start: Start) -> dict[str, object]:
  messages = [{'role': m.role, 'content': m.content} for m in start.messages]
  return {'messages': messages, 'outcome': start.outcome.value, 'detail': start.detail}


def _turn(seen: Observation) -> dict[str, object]:
  return {'observation': seen.text, 'reward': seen.reward, 'done': seen.done,
          'outcome': seen.outcome.value, 'detail': seen.detail, 'counts': dict(seen.counts),
          'turns': seen.episode.num_turns, 'total_reward': seen.episode.reward}


def _write(out: TextIO, as_json: bool, event: dict[str, object]) -> None:
  lines = [json.dumps(event, ensure_ascii=False)] if as_json else _lines(event)
  out.write('\n'.join(lines) + '\n')
  out.flush()


def _lines(event: dict[str, object]) -> Iterator[str]:
  messages = event.get('messages')
  for message in messages if isinstance(messages, list) else ():
    yield f'[{message["role"]}] {message["content"]}'
  if event.get('observation'):
    yield str(event['observation'])
  if event['outcome'] != 'ok':
    yield f'[{event["outcome"]}: {event["detail"]}]'
  if 'reward' in event:
    counts = event['counts'] if isinstance(event['counts'], dict) else {}
    numbers = {'reward': event['reward'], **counts}
    yield '[' + ', '.join(f'{name} {value:g}' for name, value in numbers.items()) + ']'
  if event.get('done'):
    yield f'[done after {event["turns"]} turns, reward {event["total_reward"]:g}]'


def joined(lines: Iterable[str]) -> Iterator[str]:
  r"""Texts of one or several lines: one that ends with \ goes on in the next."""
  parts: list[str] = []
  for line in lines:
    if line.endswith('\\'):
      parts.append(line[:-1])
      continue
    yield '\n'.join([*parts, line])
    parts = []
  if parts:
    yield '\n'.join(parts)
