"""The environment of problems that are played in several turns: prompts, rollouts, verdicts.

A batch is drawn and rewarded at once (`Player.draw`), since an episode goes on while it is drawn.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
from dataclasses import dataclass
import hashlib
import itertools
import json
from typing import Any

from jax.sharding import Mesh
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.data import problems
from jaxrl_pt.data.next_token import step_rows
from jaxrl_pt.data.tokenizer import begun
from jaxrl_pt.environments import turns
from jaxrl_pt.environments.base import EVALUATION_STREAM, Task
from jaxrl_pt.environments.episodes import Episode, EpisodePool, Outcome, Start
from jaxrl_pt.environments.interactive import Problem
from jaxrl_pt.environments.transcript import Transcript, make_transcript
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.mesh import shard_meshes
from jaxrl_pt.run import session as sessions
from jaxrl_pt.sampling import weight_sync
from jaxrl_pt.sampling.engine import Engine
from jaxrl_pt.types import Params, Prompts, RolloutBatch, Verdict

STEPS_PER_CALL = 8  # decode steps after which the host looks for texts that have ended


@dataclass(frozen=True)
class Played:
  """The verdict of episodes that have been played; a `PendingVerdict` that pends no more."""

  verdict: Verdict
  details: tuple[str, ...]  # of the rows whose environment failed

  def result(self) -> Verdict:
    """The verdict, of NumPy arrays f32[N, G]."""
    return self.verdict

  def parsed(self) -> None:
    """None: an environment does not say which texts state an answer."""

  def last_words(self) -> str:
    """The most frequent reason why an environment failed."""
    (reason, _), = Counter(self.details).most_common(1) or [('none failed', 0)]
    return reason


class Player:
  """Draws and rewards the responses to problems. Final.

  It stands where other tasks have a verifier. Each shard of the data has an engine, made when it
  first draws, whose devices hold the weights split over the axis tensor.
  """

  def __init__(self, session: sessions.Session, method: cfg.RL, pool: EpisodePool,
               transcript: Transcript, all_problems: Sequence[problems.Problem]) -> None:
    """Compiles nothing yet.

    Args:
      session, method: the run's session and objective, whose verifier is `cfg.Interactive`.
      pool: where episodes are played.
      transcript: how they are written.
      all_problems: training and held-out ones, with distinct ids.
    """
    assert isinstance(method.verifier, cfg.Interactive)
    self._session, self._rollouts, self._settings = session, method.rollouts, method.verifier
    self._pool, self._transcript = pool, transcript
    self._problems = {p.id: Problem(p.prompt, p.answer) for p in all_problems}
    self._failed: dict[int, tuple[Outcome, str]] = {}  # starts that have failed, by problem
    self._engines: list[Engine] = []
    sampler = method.rollouts.sampler
    # What is banned is banned in the whole engine, whose requests name a few tokens at most.
    self._sampler = cfg.Sampler(sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p)

  def submit(self, prompts: Any, rollouts: Any, references: Any) -> Any:
    """Raises TypeError: an episode is rewarded while it is drawn."""
    raise TypeError('a Player has no verdict on what it has not drawn')

  def take(self, chosen: Sequence[problems.Problem]) -> tuple[Prompts, list[str]]:
    """The prompts of problems: the first messages of their episodes as NumPy arrays.

    A problem whose episode cannot begin has a prompt of one token, and no valid response.
    """
    starts = self._pool.start([self._problems[p.id] for p in chosen])
    tokens = np.zeros((len(chosen), self._rollouts.prompt_len), np.int32)
    lengths = np.zeros(len(chosen), np.int32)
    for n, (problem, start) in enumerate(zip(chosen, starts, strict=True)):
      prompt = self._prompt(problem.id, start)
      tokens[n, :len(prompt)], lengths[n] = prompt, len(prompt)
    arrays: Any = tokens, lengths, np.array([p.id for p in chosen], np.int32)
    return Prompts(*arrays), [p.answer for p in chosen]

  def _prompt(self, id: int, start: Start) -> list[int]:
    tokenizer, most = self._transcript.tokenizer, self._rollouts.prompt_len
    self._failed.pop(id, None)
    if start.outcome is not Outcome.OK:
      self._failed[id] = start.outcome, start.detail
    else:
      try:
        prompt = self._transcript.opening(start.messages)
        if len(prompt) <= most:
          return prompt
        self._failed[id] = Outcome.LONG_PROMPT, (
            f'the first messages have {len(prompt)} tokens, and Rollouts.prompt_len is {most}')
      except ValueError as error:
        self._failed[id] = Outcome.RAISED, str(error)
    return begun(tokenizer, [tokenizer.eos_id])[:1]

  def draw(self, params: Params, prompts: Prompts, batch: int, version: int
           ) -> tuple[RolloutBatch, Played]:
    """Plays `Rollouts.group_size` episodes of each prompt.

    Args:
      params: the policy's parameters, as the learner has them.
      prompts: from `take`.
      batch: the batch's number, which addresses the noise.
      version: the number of steps that `params` have taken.

    Returns:
      Rollouts and verdict of NumPy arrays.
    """
    size = self._rollouts.group_size
    rows = self._play(params, prompts, batch, version, size, self._sampler)
    rollouts = turns.rollout_batch(rows, size, self._rollouts.response_tokens,
                                   self._transcript.tokenizer.eos_id, version)
    failed = tuple(row.detail for row in rows if not row.outcome.is_valid)
    return rollouts, Played(turns.verdict(rows, size), failed)

  def _play(self, params: Params, prompts: Prompts, batch: int, version: int, size: int,
            sampler: cfg.Sampler) -> list[turns.Row]:
    synced, mesh = self._session.sync_weights(params, version), self._session.mesh
    of_shards = [(shard, synced if mesh.size == 1 else weight_sync.on_shard(synced, shard))
                 for shard in shard_meshes(mesh)]
    if not self._engines:
      # Each compiles its program for its own devices, all at once.
      with futures.ThreadPoolExecutor() as threads:
        self._engines = list(threads.map(self._make_engine, *zip(*of_shards, strict=True)))
    for engine, (_, held) in zip(self._engines, of_shards, strict=True):
      engine.load(held, version, batch)
    openings = stretches(self._openings(prompts, size), size, len(of_shards))
    bounds = turns.Bounds(self._rollouts.response_tokens, self._settings.turn_tokens)
    try:
      return turns.draw_turns(self._engines, self._pool, self._transcript, openings, bounds,
                              sampler)
    finally:
      for engine in self._engines:
        engine.unload()  # The learner has no use for the sampler's copy.

  def _openings(self, prompts: Prompts, size: int) -> list[turns.Opening]:
    tokens, lengths, ids = (np.asarray(x) for x in (prompts.tokens, prompts.lengths, prompts.ids))
    openings, seen = [], Counter[int]()
    for row, length, id in zip(tokens, lengths, ids.tolist(), strict=True):
      outcome, detail = self._failed.get(id, (Outcome.OK, ''))
      episode = Episode(self._problems[id], done=outcome is not Outcome.OK)
      openings += [turns.Opening(tuple(row[:length].tolist()), id, seen[id] + g, episode, outcome,
                                 detail) for g in range(size)]
      seen[id] += size  # A prompt that comes again in a batch has further samples.
    return openings

  def _make_engine(self, mesh: Mesh, params: Params) -> Engine:
    run, rollouts = self._session.run, self._rollouts
    model = models.build(run.model, run.compute, mesh, rules.SAMPLE)
    padding = [b''] * (run.model.vocab_size - self._transcript.tokenizer.vocab_size)
    config = engine_config(rollouts, self._settings, rules.num_shards(self._session.mesh))
    return Engine(
        model, params, config, seed=run.seed, unused_ids=rollouts.sampler.banned, mesh=mesh,
        token_bytes=[*self._transcript.tokenizer.token_bytes(), *padding])

  def score(self, held_out: Sequence[problems.Problem], params: Params) -> dict[str, float]:
    """validation/{accuracy,reward,response_length,turns} and the same with _argmax.

    Each problem is played once with training's sampler, and once greedily for _argmax.
    """
    results = {}
    for suffix, sampler in (('', self._sampler), ('_argmax', cfg.Sampler(0.0))):
      prompts, _ = self.take(held_out)
      rows = self._play(params, prompts, EVALUATION_STREAM, 0, 1, sampler)
      verdict = turns.verdict(rows, 1)
      lengths = np.array([[len(row.tokens)] for row in rows])
      for name, values in (('reward', verdict.reward), ('accuracy', verdict.correct),
                           ('response_length', lengths), ('turns', verdict.measures['turns'])):
        results[f'validation/{name}{suffix}'] = float(
            (values * verdict.valid).sum() / max(float(verdict.valid.sum()), 1.0))
    return results


def stretches(openings: Sequence[turns.Opening], size: int, num_shards: int
              ) -> list[Sequence[turns.Opening]]:
  """The openings of each shard: stretches of whole groups of `size` rows, in their order.

  They are those of the learner's rows where the shards divide the number of groups. Held-out
  problems may be of any number: then a shard has at most one group more than another, and some have
  none where there are more shards than groups.
  """
  num_groups = len(openings) // size
  bounds = [num_groups * shard // num_shards * size for shard in range(num_shards + 1)]
  return [openings[begin:end] for begin, end in itertools.pairwise(bounds)]


def engine_config(rollouts: cfg.Rollouts, settings: cfg.Interactive, num_shards: int
                  ) -> cfg.Engine:
  """The sizes of the engine that draws the turns of one shard's rows of a batch."""
  slots, num_rows = rollouts.slots, rollouts.num_prompts // num_shards * rollouts.group_size
  longest = rollouts.prompt_len + rollouts.response_tokens
  chunk = min(slots.prefill_chunk, longest)
  return cfg.Engine(
      slots=min(slots.slots or num_rows, num_rows), queue=num_rows, prompt_len=longest,
      response_len=min(settings.turn_tokens, rollouts.response_tokens),
      page_size=slots.page_size, num_pages=slots.num_pages, prefill_chunk=chunk,
      prefill_rows=max(1, slots.prefill_tokens // chunk), kv=slots.kv,
      steps_per_call=STEPS_PER_CALL, top_logprobs=0, constrained=1)


def check_hosts(mesh: Mesh) -> None:
  """Raises UserError if the mesh's devices belong to several processes."""
  num_hosts = len({device.process_index for device in mesh.devices.flat})
  if num_hosts > 1:
    raise UserError('RL.verifier = @cfg.Interactive() plays its episodes on one host, and the '
                    f'devices belong to {num_hosts}: run it on the devices of one host.')


@contextlib.contextmanager
def open_environment(session: sessions.Session, method: cfg.RL) -> Iterator[Task]:
  """The problems of `method` and the environment in which they are played.

  Its processes run as long as the context lasts.

  Raises:
    UserError: the problems cannot be read, the environment lacks what it needs, or there are
      several hosts.
  """
  settings = method.verifier
  assert isinstance(settings, cfg.Interactive)
  check_hosts(session.mesh)
  training, held_out = problems.load(method.problems)
  measured = held_out[:method.eval_problems]
  with EpisodePool(settings, method.pool) as pool:
    player = Player(session, method, pool, make_transcript(settings, session.data.tokenizer),
                    [*training, *measured])

    def take(batch: int) -> tuple[Prompts, Sequence[str]]:
      rows = step_rows(len(training), method.rollouts.num_prompts, session.run.seed, batch)
      return player.take([training[row] for row in rows])

    nothing: Callable[[Params], dict[str, float]] = lambda params: {}
    score = (lambda params: player.score(measured, params)) if measured else nothing
    yield Task(take, player, score, _digest(training, settings))


def _digest(training: Sequence[problems.Problem], settings: cfg.Interactive) -> str:
  """A hash of the problems, and of what turns them into prompts."""
  texts = json.dumps([(p.id, p.prompt, p.answer) for p in training])
  said = f'{texts}{settings.environment!r}{settings.template!r}'
  return hashlib.sha256(said.encode(errors='backslashreplace')).hexdigest()
