"""The environment of problems with verifiable answers.

A verifier works on the device, comparing bytes, or on the host in processes that read text.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
from typing import NamedTuple

import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.data import build, chat_files, judge_prompts, modes, problems, splits
from jaxrl_pt.data.chat import ChatTemplate, for_training
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.environments.base import EVALUATION_STREAM, Task, settled
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.run import places
from jaxrl_pt.run import session as sessions
from jaxrl_pt.token_bytes import token_table
from jaxrl_pt.train import programs
from jaxrl_pt.types import THINK, Params, Prompts, RolloutBatch
from jaxrl_pt.verifiers import exact, pool, trial
from jaxrl_pt.verifiers.base import DeviceVerifier
from jaxrl_pt.verifiers.host import PoolVerifier

_COUNTS = 'counts'  # the column of the scorer that says which responses count


class Opened(NamedTuple):
  """The problems of a run, encoded, and the verifier that says which answers are right."""

  training: problems.ProblemSet
  held_out: problems.ProblemSet | None  # those that are measured; None if none are held out
  verifier: DeviceVerifier | PoolVerifier


@contextlib.contextmanager
def open_environment(session: sessions.Session, method: cfg.RL) -> Iterator[Task]:
  """The problems of `method` and their verifier, whose processes run as long as the context lasts.

  Args:
    session: the run's session.
    method: the run's objective.

  Raises:
    UserError: as `open_problems`.
  """
  with open_problems(session, method) as opened:
    score: Callable[[Params], dict[str, float]] = lambda params: {}
    if opened.held_out is not None:
      score = make_scorer(HeldOut(session, method.rollouts, opened.held_out), opened.verifier)
    yield Task(taker(session, method, opened.training), opened.verifier, score,
               opened.training.digest)


@contextlib.contextmanager
def open_problems(session: sessions.Session, method: cfg.RL) -> Iterator[Opened]:
  """The problems of `method` and the verifier of their answers, as long as the context lasts.

  Raises:
    UserError: the problems cannot be read, a prompt is too long, or the verifier lacks an
      installed extra or does not verify these problems.
  """
  tokenizer, rollouts = session.data.tokenizer, method.rollouts
  training, held_out = problems.load(method.problems)
  if isinstance(method.problems.source, cfg.JudgePairs):
    judge_prompts.check_tokenizer(method.problems.source.prompt, tokenizer)
  on_device = isinstance(method.truth, cfg.AnswerMatch)
  template = method.problems.template
  chat = chat_template(session) if method.problems.is_chat else None
  encoded = lambda some: problems.encode(some, tokenizer, rollouts.prompt_len, on_device, template,
                                         chat)
  training_set = encoded(training)
  with open_verifier(method, tokenizer, session.run.model.vocab_size,
                     [*training, *held_out]) as verifier:
    measured = held_out[:method.eval_problems]
    yield Opened(training_set, encoded(measured) if measured else None, verifier)


def taker(session: sessions.Session, method: cfg.RL, training: problems.ProblemSet
          ) -> Callable[[int], tuple[Prompts, Sequence[str]]]:
  """The function `Task.take` of problems."""
  return lambda batch: problems.step_prompts(training, method.rollouts.num_prompts,
                                             session.run.seed, batch)


@contextlib.contextmanager
def open_verifier(method: cfg.RL, tokenizer: Tokenizer, vocab_size: int,
                   all_problems: Sequence[problems.Problem]
                   ) -> Iterator[DeviceVerifier | PoolVerifier]:
  """The verifier of `method`, after it has been tried on some of the problems."""
  match method.truth:
    case cfg.AnswerMatch(marker=marker, wrong=wrong):
      for problem in all_problems:
        _check_answer(tokenizer, marker, problem.answer, problem.place)
      table = token_table(tokenizer.token_bytes(), vocab_size)
      yield DeviceVerifier(exact.device_verifier(table, marker.encode(), tokenizer.stop_ids,
                                                 wrong))
    case verifier:
      assert not isinstance(verifier, cfg.Interactive)  # `multi_turn` opens those.
      with pool.Pool(verifier, method.pool) as verifiers:
        stride = max(1, len(all_problems) // trial.NUM_TRIED)
        chosen = all_problems[::stride][:trial.NUM_TRIED]
        trial.check(verifiers, verifier, [
            trial.tried(verifier, p.answer, p.demonstration, p.place) for p in chosen])
        yield PoolVerifier(verifiers, tokenizer.decode)


def _check_answer(tokenizer: Tokenizer, marker: str, answer: str, place: str) -> None:
  """Refuses a reference answer that no response could give.

  Raises:
    UserError: the tokenizer cannot spell the answer or the marker, or the answer holds the marker.
  """
  for name, text in (('AnswerMatch.marker', marker), (f'The answer of {place}', answer)):
    spelled = tokenizer.decode(tokenizer.encode(text))
    if spelled != text:
      raise UserError(f'{name}, {text!r}, cannot be written in this tokenizer, which makes '
                      f'{spelled!r} of it: change it, or choose another tokenizer.')
  if (marker + answer).rfind(marker):
    raise UserError(f'The answer of {place}, {answer!r}, holds the marker {marker!r} after which '
                    'an answer begins: choose another AnswerMatch.marker.')


def chat_template(session: sessions.Session) -> ChatTemplate:
  """The chat template of the policy that the run starts from, at a date that stays the same."""
  folder = places.carried(session.run, session.workdir)
  return for_training(chat_files.of_model(folder, session.data.tokenizer))


class Answers(NamedTuple):
  """Responses to one batch of held-out problems, one to each.

  rollouts, fetched: on the devices and on the host.
  counted: bool[N] False where a problem stands a second time to fill the batch.
  """

  prompts: Prompts
  references: Sequence[str]
  rollouts: RolloutBatch
  fetched: RolloutBatch
  counted: np.ndarray


class HeldOut:
  """Draws a response to each held-out problem, with training's sampler or greedily. Final.

  Where responses have modes the policy chooses them itself.
  """

  # With training's sampler, and greedily: what metrics are called behind their names.
  SUFFIXES = '', '_argmax'

  def __init__(self, session: sessions.Session, rollouts: cfg.Rollouts,
               held_out: problems.ProblemSet) -> None:
    """Compiles nothing yet."""
    run, mesh, stop_ids = session.run, session.mesh, session.data.tokenizer.stop_ids
    self._session, self.problems = session, held_out.problems
    self.mode_ids = modes.token_ids(session.data.tokenizer, rollouts.modes)
    greedy = cfg.Sampler(temperature=0.0, banned=rollouts.sampler.banned)
    self._samplers = {
        suffix: programs.sampler(run, mesh, _one_sample(rollouts, sampler), stop_ids,
                                 self.mode_ids)
        for suffix, sampler in zip(self.SUFFIXES, (rollouts.sampler, greedy), strict=True)}
    # A batch has no more rows than there are problems, since responses to padding count for
    # nothing.
    size = min(rollouts.num_prompts, rules.whole_rows(mesh, len(held_out)))
    self._batches = []
    for start in range(0, len(held_out), size):
      rows = np.arange(start, start + size)
      prompts, references = held_out.prompts(np.minimum(rows, len(held_out) - 1))
      self._batches.append((session.put_rows(prompts), references, rows < len(held_out)))

  def synced(self, params: Params) -> Params:
    """The sampler's copy of a policy's parameters."""
    return self._session.sync_weights(params, 0)

  def draw(self, synced: Params, suffix: str) -> Iterator[Answers]:
    """Draws the responses to each batch of problems.

    Args:
      synced: from `synced`.
      suffix: one of `SUFFIXES`, which says how they are drawn.
    """
    for prompts, references, counted in self._batches:
      rollouts = self._samplers[suffix](synced, prompts, np.int32(EVALUATION_STREAM), np.int32(0))
      yield Answers(prompts, references, rollouts, on_host(rollouts), counted)


# (suffix, number of the batch, responses, columns f[N, 1] of the scorer by name) → columns.
Amend = Callable[[str, int, Answers, dict[str, np.ndarray]], dict[str, np.ndarray]]


def make_scorer(held_out: HeldOut, verifier: DeviceVerifier | PoolVerifier,
                amend: Amend = lambda suffix, number, answers, columns: columns
                ) -> Callable[[Params], dict[str, float]]:
  """score(params) → validation/{accuracy,reward,response_length} and the same with _argmax.

  Where responses have modes, `think` is how often the policy thinks.

  Args:
    held_out: draws the responses.
    verifier: verifies them.
    amend: changes what is measured of each batch.
  """
  def score(params: Params) -> dict[str, float]:
    synced = held_out.synced(params)
    results = {}
    for suffix in HeldOut.SUFFIXES:
      rows = []
      for number, answers in enumerate(held_out.draw(synced, suffix)):
        prompts, references, rollouts, fetched, counted = answers
        if isinstance(verifier, DeviceVerifier):
          verdict = on_host(verifier.submit(prompts, rollouts, references).result())
        else:
          verdict = settled(verifier.submit(prompts, fetched, references))
        columns = {'reward': verdict.reward, 'accuracy': verdict.correct,
                   'response_length': fetched.in_response.sum(-1), _COUNTS: verdict.valid}
        if held_out.mode_ids:
          columns['think'] = fetched.mode == THINK
        columns = amend(suffix, number, answers, columns)
        rows.append({name: values[:, 0] * counted for name, values in columns.items()})
      joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
      counts = joined.pop(_COUNTS)
      for name, values in joined.items():
        results[f'validation/{name}{suffix}'] = float(
            (values * counts).sum() / max(counts.sum(), 1.0))
    return results

  return score


def _one_sample(rollouts: cfg.Rollouts, sampler: cfg.Sampler) -> cfg.Rollouts:
  """The settings to draw one response to each prompt, of the same lengths."""
  return cfg.Rollouts(rollouts.num_prompts, 1, rollouts.prompt_len, rollouts.response_tokens,
                      sampler, modes=cfg.of_its_own(rollouts.modes))


# --- What the start policy has read -----------------------------------------------


def check_held_out(asked: cfg.Problems, start: cfg.Run) -> None:
  """Refuses held-out prompts on which the policy that the run starts from was trained.

  Only the prompts of demonstrations, conversations and preferences, and the problems of an earlier
  run of RL are compared; free text that quotes a problem is not found. A hash of the prompt decides
  in both runs what is held out, so a start policy whose run held out as large a share or a larger
  one has read no held-out prompt.

  Args:
    asked: the run's problems.
    start: the settings of the run that trained the start policy.

  Raises:
    UserError: some held-out prompts were trained on; it says how many of how many.
  """
  advice = ('hold out as much there as here, by {} = Problems.held_out = '
            f'{asked.held_out:g}, and train the start policy again.')
  build.refuse_trained_on(start.data, asked.held_out,
                          lambda: problems.prompts(asked, held_out=True),
                          advice.format('Data.validation_fraction'))
  if isinstance(start.objective, cfg.RL) and start.objective.problems.held_out < asked.held_out:
    splits.refuse_overlap(problems.prompts(start.objective.problems, held_out=False),
                          problems.prompts(asked, held_out=True), 'prompts',
                          advice.format('its Problems.held_out'))
