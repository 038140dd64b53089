"""Problems with verifiable answers: verified on the device by tokens, on the host by text."""

from collections.abc import Callable, Iterator, Sequence
import contextlib

import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.data import loader, problems, splits
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.environments.base import Environment, settled
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.run import session as sessions
from jaxrl_pt.token_bytes import token_table
from jaxrl_pt.train import programs
from jaxrl_pt.types import Params, Prompts
from jaxrl_pt.verifiers import exact, pool, trial
from jaxrl_pt.verifiers.base import DeviceVerifier
from jaxrl_pt.verifiers.host import PoolVerifier

# In place of a batch's number: evaluation draws the same noise every time.
EVALUATION_STREAM = 2**31 - 1


@contextlib.contextmanager
def open_environment(session: sessions.Session, method: cfg.RL) -> Iterator[Environment]:
  """The problems of `method` and their verifier, whose processes run inside the context.

  Raises:
    UserError: unreadable problems, prompts too long, a verifier whose extra is missing or that
      does not verify these problems.
  """
  tokenizer, rollouts = session.data.tokenizer, method.rollouts
  training, held_out = problems.load(method.problems)
  on_device = isinstance(method.verifier, cfg.AnswerMatch)
  template = method.problems.template
  trained_on = problems.encode(training, tokenizer, rollouts.prompt_len, on_device, template)

  def take(batch: int) -> tuple[Prompts, Sequence[str]]:
    return problems.step_prompts(trained_on, rollouts.num_prompts, session.run.seed, batch)

  with _open_verifier(method, tokenizer, session.run.model.vocab_size,
                      [*training, *held_out]) as verifier:
    score: Callable[[Params], dict[str, float]] = lambda params: {}
    if held_out:
      measured = problems.encode(held_out[:method.eval_problems], tokenizer, rollouts.prompt_len,
                                 on_device, template)
      score = _make_scorer(session, rollouts, verifier, measured)
    yield Environment(take, verifier, score, trained_on.digest)


@contextlib.contextmanager
def _open_verifier(method: cfg.RL, tokenizer: Tokenizer, vocab_size: int,
                   asked: Sequence[problems.Problem]) -> Iterator[DeviceVerifier | PoolVerifier]:
  """The verifier of `method`, tried on some of the problems that are asked."""
  match method.verifier:
    case cfg.AnswerMatch(marker=marker):
      for problem in asked:
        _check_answer(tokenizer, marker, problem.answer, problem.place)
      table = token_table(tokenizer.token_bytes(), vocab_size)
      yield DeviceVerifier(exact.device_verifier(table, marker.encode(), tokenizer.eos_id))
    case verifier:
      with pool.Pool(verifier, method.pool) as verifiers:
        chosen = asked[::max(1, len(asked) // trial.NUM_TRIED)][:trial.NUM_TRIED]
        trial.check(verifiers, verifier, [
            trial.tried(verifier, p.answer, p.demonstration, p.place) for p in chosen])
        yield PoolVerifier(verifiers, tokenizer.decode)


def _check_answer(tokenizer: Tokenizer, marker: str, answer: str, place: str) -> None:
  """Refuses an answer that no response could give.

  Raises:
    UserError: the tokenizer cannot spell the answer or the marker, or the answer has the marker
      in it.
  """
  for name, text in (('AnswerMatch.marker', marker), (f'The answer of {place}', answer)):
    spelled = tokenizer.decode(tokenizer.encode(text))
    if spelled != text:
      raise UserError(f'{name}, {text!r}, cannot be written in this tokenizer, which makes '
                      f'{spelled!r} of it: change it, or choose another tokenizer.')
  if (marker + answer).rfind(marker):
    raise UserError(f'The answer of {place}, {answer!r}, holds the marker {marker!r} after which '
                    'an answer begins: choose another AnswerMatch.marker.')


def _make_scorer(session: sessions.Session, rollouts: cfg.Rollouts,
                 verifier: DeviceVerifier | PoolVerifier, held_out: problems.ProblemSet
                 ) -> Callable[[Params], dict[str, float]]:
  """score(params) → validation/{accuracy,reward,response_length}, sampled and by the argmax.

  Each problem is answered once as in training and once greedily.
  """
  run, mesh, stop_id = session.run, session.mesh, session.data.tokenizer.eos_id
  greedy = cfg.Sampler(temperature=0.0, banned=rollouts.sampler.banned)
  once = {'': rollouts.sampler, '_argmax': greedy}
  samplers = {suffix: programs.sampler(run, mesh, _once(rollouts, sampler), stop_id)
              for suffix, sampler in once.items()}
  sync_weights = programs.weight_sync(run, mesh)
  # No more rows at once than there are problems: those beyond would be drawn for nothing.
  size = min(rollouts.num_prompts, rules.whole_rows(mesh, len(held_out)))
  batches = []
  for start in range(0, len(held_out), size):
    rows = np.arange(start, start + size)
    prompts, references = held_out.prompts(np.minimum(rows, len(held_out) - 1))
    batches.append((session.put_rows(prompts), references, rows < len(held_out)))

  def score(params: Params) -> dict[str, float]:
    params = sync_weights(params, 0)
    results = {}
    for suffix, sample in samplers.items():
      rows = []
      for prompts, references, counted in batches:
        drawn = sample(params, prompts, np.int32(EVALUATION_STREAM), np.int32(0))
        here = on_host(drawn)
        if isinstance(verifier, DeviceVerifier):
          verdict = on_host(verifier.submit(prompts, drawn, references).result())
        else:
          verdict = settled(verifier.submit(prompts, here, references))
        rows.append(np.stack([verdict.reward[:, 0], verdict.correct[:, 0],
                              here.in_response[:, 0].sum(-1), verdict.valid[:, 0] * counted]))
      reward, correct, length, counts = np.concatenate(rows, 1)
      for name, values in (('reward', reward), ('accuracy', correct),
                           ('response_length', length)):
        results[f'validation/{name}{suffix}'] = float(
            (values * counts).sum() / max(counts.sum(), 1.0))
    return results

  return score


def _once(rollouts: cfg.Rollouts, sampler: cfg.Sampler) -> cfg.Rollouts:
  """The same lengths, one response a prompt."""
  return cfg.Rollouts(rollouts.num_prompts, 1, rollouts.prompt_len, rollouts.response_tokens,
                      sampler)


# --- What the start policy has read -----------------------------------------------


def check_held_out(asked: cfg.Problems, start: cfg.Run) -> None:
  """Refuses to measure a run on prompts that the policy that it starts from was trained on.

  Demonstrations and the problems of an earlier reinforcement can be compared; free text that
  quotes a problem is not found. Both sides are held out by a hash of the prompt: one that holds
  out more is no danger.

  Args:
    asked: the problems of the run.
    start: the settings in the work directory of its start policy.

  Raises:
    UserError: they share prompts. It says how many of how many.
  """
  advice = ('hold out as much there as here, by {} = Problems.held_out = '
            f'{asked.held_out:g}, and train the start policy again.')
  if isinstance(start.data.source, cfg.Demonstrations) and (
      start.data.validation_fraction < asked.held_out):
    splits.refuse_overlap(loader.split_keys(start.data, held_out=False),
                          problems.prompts(asked, held_out=True), 'prompts',
                          advice.format('Data.validation_fraction'))
  if isinstance(start.objective, cfg.RL) and start.objective.problems.held_out < asked.held_out:
    splits.refuse_overlap(problems.prompts(start.objective.problems, held_out=False),
                          problems.prompts(asked, held_out=True), 'prompts',
                          advice.format('its Problems.held_out'))
