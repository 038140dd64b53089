"""The environment of problems that are played in several turns: prompts, rollouts, verdicts.

A batch is drawn and rewarded at once (`Player.draw`), since an episode goes on while it is drawn.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
import contextlib
from dataclasses import dataclass
import hashlib
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
from jaxrl_pt.run import session as sessions
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

  It stands where other tasks have a verifier. Its engine is made when it first draws.
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
    self._engine: Engine | None = None
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
      params: the policy's parameters.
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
    if self._engine is None:
      self._engine = self._make_engine(params)
    self._engine.load(params, version, batch)
    limits = self._rollouts.response_tokens, self._settings.turn_tokens
    return turns.draw_turns(self._engine, self._pool, self._transcript,
                            self._openings(prompts, size), turns.Bounds(*limits), sampler)

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

  def _make_engine(self, params: Params) -> Engine:
    run, rollouts = self._session.run, self._rollouts
    model = models.build(run.model, run.compute, self._session.mesh, rules.SHARD)
    padding = [b''] * (run.model.vocab_size - self._transcript.tokenizer.vocab_size)
    return Engine(
        model, params, engine_config(rollouts, self._settings), seed=run.seed,
        token_bytes=[*self._transcript.tokenizer.token_bytes(), *padding],
        unused_ids=rollouts.sampler.banned, mesh=self._session.mesh)

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


def engine_config(rollouts: cfg.Rollouts, settings: cfg.Interactive) -> cfg.Engine:
  """The sizes of the engine that draws the turns of a batch."""
  slots, num_rows = rollouts.slots, rollouts.num_prompts * rollouts.group_size
  longest = rollouts.prompt_len + rollouts.response_tokens
  chunk = min(slots.prefill_chunk, longest)
  return cfg.Engine(
      slots=min(slots.slots or num_rows, num_rows), queue=num_rows, prompt_len=longest,
      response_len=min(settings.turn_tokens, rollouts.response_tokens),
      page_size=slots.page_size, num_pages=slots.num_pages, prefill_chunk=chunk,
      prefill_rows=max(1, slots.prefill_tokens // chunk), kv=slots.kv,
      steps_per_call=STEPS_PER_CALL, top_logprobs=0, constrained=1)


def check_mesh(mesh: Mesh) -> None:
  """Raises UserError if there are several devices."""
  if mesh.size > 1:
    raise UserError(f'RL.verifier = @cfg.Interactive() draws on one device, and the mesh has '
                    f'{mesh.size}: set the axes of cfg.Mesh to 1.')


@contextlib.contextmanager
def open_environment(session: sessions.Session, method: cfg.RL) -> Iterator[Task]:
  """The problems of `method` and the environment in which they are played.

  Its processes run as long as the context lasts.

  Raises:
    UserError: the problems cannot be read, the environment lacks what it needs, or there are
      several devices.
  """
  settings = method.verifier
  assert isinstance(settings, cfg.Interactive)
  check_mesh(session.mesh)
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
