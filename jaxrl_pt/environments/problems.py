"""The environment of problems with verifiable answers.

A verifier works on the device, comparing bytes, or on the host in processes that read text.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib

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
from jaxrl_pt.types import THINK, Params, Prompts
from jaxrl_pt.verifiers import exact, pool, trial
from jaxrl_pt.verifiers.base import DeviceVerifier
from jaxrl_pt.verifiers.host import PoolVerifier

_COUNTS = 'counts'  # the column of the scorer that says which responses count


@contextlib.contextmanager
def open_environment(session: sessions.Session, method: cfg.RL) -> Iterator[Task]:
  """The problems of `method` and their verifier, whose processes run as long as the context lasts.

  Args:
    session: the run's session.
    method: the run's objective.

  Raises:
    UserError: the problems cannot be read, a prompt is too long, or the verifier lacks an
      installed extra or does not verify these problems.
  """
  tokenizer, rollouts = session.data.tokenizer, method.rollouts
  training, held_out = problems.load(method.problems)
  if isinstance(method.problems.source, cfg.JudgePairs):
    judge_prompts.check_tokenizer(method.problems.source.prompt, tokenizer)
  on_device = isinstance(method.verifier, cfg.AnswerMatch)
  template = method.problems.template
  chat = chat_template(session) if method.problems.is_chat else None
  training_set = problems.encode(training, tokenizer, rollouts.prompt_len, on_device, template,
                                 chat)

  def take(batch: int) -> tuple[Prompts, Sequence[str]]:
    return problems.step_prompts(training_set, rollouts.num_prompts, session.run.seed, batch)

  with open_verifier(method, tokenizer, session.run.model.vocab_size,
                      [*training, *held_out]) as verifier:
    score: Callable[[Params], dict[str, float]] = lambda params: {}
    if held_out:
      held_out_set = problems.encode(held_out[:method.eval_problems], tokenizer,
                                     rollouts.prompt_len, on_device, template, chat)
      score = _make_scorer(session, rollouts, verifier, held_out_set)
    yield Task(take, verifier, score, training_set.digest)


@contextlib.contextmanager
def open_verifier(method: cfg.RL, tokenizer: Tokenizer, vocab_size: int,
                   all_problems: Sequence[problems.Problem]
                   ) -> Iterator[DeviceVerifier | PoolVerifier]:
  """The verifier of `method`, after it has been tried on some of the problems."""
  match method.verifier:
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


def _make_scorer(session: sessions.Session, rollout_config: cfg.Rollouts,
                 verifier: DeviceVerifier | PoolVerifier, held_out: problems.ProblemSet
                 ) -> Callable[[Params], dict[str, float]]:
  """score(params) → validation/{accuracy,reward,response_length} and the same with _argmax.

  The policy answers each problem once with training's sampler, and once greedily for _argmax. Where
  responses have modes it chooses them itself, and `think` is how often it thinks.
  """
  run, mesh, stop_ids = session.run, session.mesh, session.data.tokenizer.stop_ids
  mode_ids = modes.token_ids(session.data.tokenizer, rollout_config.modes)
  greedy = cfg.Sampler(temperature=0.0, banned=rollout_config.sampler.banned)
  samplers = {suffix: programs.sampler(run, mesh, _one_sample(rollout_config, sampler), stop_ids,
                                       mode_ids)
              for suffix, sampler in (('', rollout_config.sampler), ('_argmax', greedy))}
  # A batch has no more rows than there are problems, since responses to padding count for nothing.
  size = min(rollout_config.num_prompts, rules.whole_rows(mesh, len(held_out)))
  batches = []
  for start in range(0, len(held_out), size):
    rows = np.arange(start, start + size)
    prompts, references = held_out.prompts(np.minimum(rows, len(held_out) - 1))
    batches.append((session.put_rows(prompts), references, rows < len(held_out)))

  def score(params: Params) -> dict[str, float]:
    params = session.sync_weights(params, 0)
    results = {}
    for suffix, sample in samplers.items():
      rows = []
      for prompts, references, counted in batches:
        rollouts = sample(params, prompts, np.int32(EVALUATION_STREAM), np.int32(0))
        fetched = on_host(rollouts)
        if isinstance(verifier, DeviceVerifier):
          verdict = on_host(verifier.submit(prompts, rollouts, references).result())
        else:
          verdict = settled(verifier.submit(prompts, fetched, references))
        columns = {'reward': verdict.reward, 'accuracy': verdict.correct,
                   'response_length': fetched.in_response.sum(-1), _COUNTS: verdict.valid}
        if mode_ids:
          columns['think'] = fetched.mode == THINK
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
