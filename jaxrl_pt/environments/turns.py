"""Rollouts of several turns: the policy's texts are drawn by the engine and answered by episodes.

    while some row has not ended:
      queue:   the whole sequence so far of each row whose turn it is
      draw:    a few tokens of each text that is under way
      play:    a text that has ended goes to its episode; what has been answered is appended

No row waits for another one: while one episode's environment works, the texts of other rows go on.
On a mesh each shard of the data has an engine and rows of its own, and no engine waits for another:
the loop waits for whatever is there first, some engine's tokens or some episode's answer.
The engine keeps the pages of every sequence, so that a turn computes its predecessor's last token
and the observation alone. The noise of a token is addressed by (seed, batch, prompt id, sample,
position), so that neither the order in which environments answer nor the number of slots changes a
token; a response of one turn is the one that `groups.make_sampler` draws.
"""

from collections import deque
from collections.abc import Sequence
from concurrent import futures
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.environments.episodes import Episode, EpisodePool, Observation, Outcome
from jaxrl_pt.environments.transcript import Transcript
from jaxrl_pt.sampling.engine import Engine, Request, Response
from jaxrl_pt.types import RolloutBatch, Verdict

# What the package's own environments count; logs have one name for every count.
COUNTS = ('guesses', 'tool_calls', 'tool_errors')


@dataclass(frozen=True)
class Opening:
  """How one row begins.

  prompt: the tokens of the first messages.
  id, sample: address the noise.
  episode: the episode before its first turn; one that is done draws nothing.
  outcome, detail: what became of its start.
  """

  prompt: tuple[int, ...]
  id: int
  sample: int
  episode: Episode
  outcome: Outcome = Outcome.OK
  detail: str = ''


@dataclass(frozen=True)
class Bounds:
  """What a row may use: `response_tokens` in all, and `turn_tokens` in each turn."""

  response_tokens: int
  turn_tokens: int


@dataclass
class Row:
  """A row so far. `tokens` and the lists beside it hold all that follows the prompt."""

  opening: Opening
  episode: Episode
  outcome: Outcome
  detail: str = ''
  tokens: list[int] = field(default_factory=list)
  logp: list[float] = field(default_factory=list)
  sampled: list[float] = field(default_factory=list)
  turn: list[int] = field(default_factory=list)
  newest: Sequence[int] = ()  # tokens of the turn whose text was last handed to the episode
  finish: str = ''  # why that turn ended
  num_cut: int = 0  # observations of which the policy has read only a part
  counts: dict[str, float] = field(default_factory=dict)

  def append(self, tokens: Sequence[int], logp: Sequence[float], sampled: Sequence[float]) -> None:
    """Appends tokens of the present turn."""
    self.tokens += tokens
    self.logp += logp
    self.sampled += sampled
    self.turn += [self.episode.num_turns] * len(tokens)


@dataclass(eq=False)
class _Shard:
  """An engine with its rows: those whose turn it is, and those of which it draws a text."""

  engine: Engine
  waiting: deque[Row]
  drawing: dict[int, Row] = field(default_factory=dict)  # by the handle of the request


def draw_turns(engines: Sequence[Engine], pool: EpisodePool, transcript: Transcript,
               openings: Sequence[Sequence[Opening]], bounds: Bounds, sampler: cfg.Sampler
               ) -> list[Row]:
  """Plays an episode for each opening to its end.

  A row whose environment fails, or whose tokens are used up, has an outcome that says so, and no
  other row is affected.

  Args:
    engines: the engines, whose parameters and batch are loaded. Nothing is under way in them.
    pool: where the episodes are played.
    transcript: how they are written as tokens.
    openings: for each engine, one for each of its rows.
    bounds: what a row may use.
    sampler: temperature and filters.

  Returns:
    The rows in the order of the openings.
  """
  rows = [[Row(o, o.episode, o.outcome, o.detail) for o in part] for part in openings]
  shards = [_Shard(engine, deque(row for row in part if not row.episode.done))
            for engine, part in zip(engines, rows, strict=True)]
  advancing: dict[futures.Future[list[tuple[int, Response]]], _Shard] = {}
  playing: dict[futures.Future[Observation], tuple[_Shard, Row]] = {}
  # A call of an engine waits for its devices, so each engine is called in a thread of its own.
  with futures.ThreadPoolExecutor(len(shards)) as threads:
    try:
      while playing or any(shard.waiting or shard.drawing for shard in shards):
        for shard in shards:
          if shard not in advancing.values():  # An engine takes requests between its calls alone.
            _queue(shard, transcript, bounds, sampler)
            if shard.drawing:
              advancing[threads.submit(shard.engine.advance)] = shard
        under_way: list[futures.Future[Any]] = [*advancing, *playing]
        done = futures.wait(under_way, None, futures.FIRST_COMPLETED).done
        for call in advancing.keys() & done:
          shard = advancing.pop(call)
          for handle, response in [ended for ended in call.result() if ended[1].finish]:
            row = shard.drawing.pop(handle)
            text = _take(row, response, transcript)
            playing[pool.submit_step([(row.episode, text)]).futures[0]] = shard, row
        for answer in playing.keys() & done:
          shard, row = playing.pop(answer)
          if _goes_on(row, answer.result(), transcript, bounds):
            shard.waiting.append(row)
    finally:
      futures.wait(advancing)
      for shard in shards:
        _drain(shard)
  return [row for part in rows for row in part]


def _queue(shard: _Shard, transcript: Transcript, bounds: Bounds, sampler: cfg.Sampler) -> None:
  """Hands rows whose turn it is to the engine, as many as it has room for."""
  while shard.waiting and shard.engine.room():
    row = shard.waiting[0]
    try:
      handle = shard.engine.submit(_request(row, transcript, bounds, sampler))
    except BlockingIOError:  # Every document of the engine is in use.
      return
    shard.drawing[handle] = row
    shard.waiting.popleft()


def _drain(shard: _Shard) -> None:
  """Ends what is under way after an error, so that the engine can go on with other parameters."""
  for handle in shard.drawing:
    shard.engine.cancel(handle)
  while shard.engine.room() < shard.engine.config.queue:
    shard.engine.advance(1)


def _request(row: Row, transcript: Transcript, bounds: Bounds, sampler: cfg.Sampler) -> Request:
  """The request for the next turn of a row: its whole sequence so far is the prompt."""
  left = bounds.response_tokens - len(row.tokens)
  return Request(
      (*row.opening.prompt, *row.tokens), row.opening.id, min(bounds.turn_tokens, left),
      sampler=sampler, stop=transcript.stop, stop_strings=transcript.stop_strings,
      first_sample=row.opening.sample)


def _take(row: Row, response: Response, transcript: Transcript) -> str:
  """Appends a turn that has ended, and returns its text."""
  row.newest, row.finish = response.tokens.tolist(), response.finish
  row.append(row.newest, response.logp.tolist(), response.sampled.tolist())
  return transcript.said(row.newest, row.finish)


def _goes_on(row: Row, seen: Observation, transcript: Transcript, bounds: Bounds) -> bool:
  """Takes over what the environment has answered; says whether the row has another turn."""
  for name, value in seen.counts.items():
    row.counts[name] = row.counts.get(name, 0.0) + value
  if seen.done:
    row.episode, row.outcome, row.detail = seen.episode, seen.outcome, seen.detail
    return False
  answer = transcript.answer(row.newest, row.finish, seen.text)
  if len(row.tokens) + len(answer.tokens) >= bounds.response_tokens:
    row.episode = dataclasses.replace(seen.episode, done=True)
    row.outcome = Outcome.OUT_OF_TOKENS
    row.detail = f'its turns have used up {bounds.response_tokens} tokens'
    return False
  nothing = [0.0] * len(answer.tokens)
  row.append(answer.tokens, nothing, nothing)  # Still of the turn that it answers.
  row.episode = seen.episode
  row.num_cut += answer.is_cut
  return True


# --- Rows as arrays -------------------------------------------------------------------


def rollout_batch(rows: Sequence[Row], group_size: int, response_tokens: int, stop_id: int,
                  version: int) -> RolloutBatch:
  """The rows as NumPy arrays [N, G, S]; N · G rows are given, group by group.

  After a response's end its tokens are `stop_id`, its masks and logp 0.
  """
  def table(of: Any, dtype: Any, padding: int = 0) -> Any:
    padded = np.full((len(rows), response_tokens), padding, dtype)
    for array, row in zip(padded, rows, strict=True):
      array[:len(row.tokens)] = of(row)
    return padded.reshape(-1, group_size, response_tokens)

  tokens = table(lambda r: r.tokens, np.int32, stop_id)
  version_NGS: Any = np.full(tokens.shape, version, np.int32)
  return RolloutBatch(
      tokens, table(lambda r: 1.0, np.float32), table(lambda r: r.sampled, np.float32),
      table(lambda r: r.logp, np.float32), version_NGS, table(lambda r: r.turn, np.int32))


def verdict(rows: Sequence[Row], group_size: int) -> Verdict:
  """What the environments say of the rows, as NumPy arrays [N, G].

  The reward is the sum over the episode's turns. A response is correct if the environment counts it
  as `correct`, or, where it counts no such thing, if its reward is above 0. A row whose environment
  has failed is not valid.
  """
  def table(of: Any) -> Any:
    return np.array([of(row) for row in rows], np.float32).reshape(-1, group_size)

  right = lambda row: row.counts.get('correct', row.episode.reward) > 0
  is_valid = lambda row: row.outcome.is_valid
  measures = {
      'turns': table(lambda r: r.episode.num_turns),
      'observation_tokens': table(lambda r: len(r.tokens) - sum(r.sampled)),
      'cut_observations': table(lambda r: r.num_cut),
      **{name: table(lambda r, name=name: r.counts.get(name, 0.0)) for name in COUNTS},
      **{f'outcome/{o.value}': table(lambda r, o=o: r.outcome is o) for o in Outcome}}
  return Verdict(table(lambda r: r.episode.reward * is_valid(r)), table(is_valid),
                 table(lambda r: right(r) and is_valid(r)), {}, measures)
