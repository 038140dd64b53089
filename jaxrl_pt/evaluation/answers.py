"""`jaxrl-pt answers`: sampled answers to a run's problems, verified, as candidates and as pairs.

    {"prompt": "…", "candidates": ["…", …], "correct": [true, …]}     what `jaxrl-pt judge` reads
    {"prompt": "…", "chosen": "…", "rejected": "…"}                   what preferences are read from

The verifier is the run's own. A response that it did not verify, one that is blank, and one whose
bytes are no text are left out. Of a run in a chat template, pairs are messages.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import files
from jaxrl_pt.data import judge_prompts, problems
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.environments import problems as environment
from jaxrl_pt.errors import UserError
from jaxrl_pt.evaluation import preference_pairs
from jaxrl_pt.evaluation.verified import Verified, verified
from jaxrl_pt.run import samples
from jaxrl_pt.run.policy import Policy
from jaxrl_pt.sampling.engine import Request

Side = Literal['training', 'held_out']
_NO_TEXT = '\ufffd'  # What bytes that are no text are decoded to.


class Answered(NamedTuple):
  """A problem with the responses that the verifier has verified."""

  problem: problems.Problem
  texts: list[str]
  correct: list[bool]


def draw(policy: Policy, method: cfg.RL, *, side: Side, limit: int, num_samples: int,
         sampler: cfg.Sampler, slots: int, seed: int) -> list[Answered]:
  """Draws and verifies answers to the problems of a run.

  Args:
    policy: who answers; it need not be the run's own.
    method: the run's objective, which has problems, verifier and lengths.
    side: whether the problems that are trained on are asked, or those that are held out.
    limit: the most problems, the first ones of the source; 0 for all.
    num_samples: answers to each problem.
    sampler: how they are drawn.
    slots: answers that are decoded at once.
    seed: addresses the noise.

  Raises:
    UserError: no problems, problems that the policy was trained on although they are held out, or
      a verifier that does not verify them.
  """
  if isinstance(method.verifier, cfg.Interactive):
    raise UserError('RL.verifier = @cfg.Interactive() rewards episodes of several turns, which are '
                    'no answers: give a run whose verifier reads one response.')
  session, rollouts = policy.session, method.rollouts
  tokenizer = session.data.tokenizer
  chosen = _problems(method, session.run, side)[:limit or None]
  chat = environment.chat_template(session) if method.problems.is_chat else None
  encoded = problems.encode(
      chosen, tokenizer, rollouts.prompt_len, isinstance(method.truth, cfg.AnswerMatch),
      method.problems.template, chat)
  engine = samples.make_engine(policy, cfg.Engine(
      slots=slots, queue=max(4 * slots, num_samples), prompt_len=rollouts.prompt_len,
      response_len=rollouts.response_tokens, prefill_chunk=min(128, rollouts.prompt_len),
      prefill_rows=8, kv=rollouts.slots.kv, top_logprobs=0, constrained=1), seed=seed)
  responses = engine.run(
      Request(tuple(tokens[:length].tolist()), problem.id, rollouts.response_tokens, num_samples,
              sampler, tokenizer.stop_ids)
      for problem, tokens, length in zip(encoded.problems, encoded.tokens, encoded.lengths,
                                         strict=True))
  with environment.open_verifier(method, tokenizer, policy.model.config.vocab_size,
                                 chosen) as verifier:
    found = verified(responses, encoded, verifier, rollouts.num_prompts, tokenizer.stop_ids)
  return [_answered(problem, found, n, tokenizer) for n, problem in enumerate(encoded.problems)]


def _problems(method: cfg.RL, trained: cfg.Run, side: Side) -> list[problems.Problem]:
  training, held_out = problems.load(method.problems)
  if side == 'training':
    return training
  if not held_out:
    raise UserError('Problems.held_out = 0 leaves no held-out problem to answer: set it as in the '
                    'run, or leave --held_out out.')
  environment.check_held_out(method.problems, trained)
  return held_out


def _answered(problem: problems.Problem, found: Verified, n: int, tokenizer: Tokenizer
              ) -> Answered:
  """The verified responses to problem number n that are text."""
  texts, correct = [], []
  for g in np.flatnonzero(found.valid[n]):
    text = tokenizer.decode(found.tokens[n, g][found.there[n, g] > 0].tolist())
    if text.strip() and _NO_TEXT not in text:
      texts.append(text)
      correct.append(bool(found.correct[n, g]))
  return Answered(problem, texts, correct)


# --- Files --------------------------------------------------------------------------


def summary(answered: Sequence[Answered], num_samples: int) -> str:
  """One sentence on the answers."""
  right = sum(sum(one.correct) for one in answered)
  num = sum(len(one.texts) for one in answered)
  return (f'{len(answered)} problems, {num} of {num_samples * len(answered)} answers verified and '
          f'text, {right / max(num, 1):.1%} of them right')


def write_candidates(path: Path, answered: Sequence[Answered]) -> str:
  """Writes the answers to each problem, those without any left out; returns a sentence."""
  rows = [{'prompt': one.problem.prompt, 'candidates': one.texts, 'correct': one.correct}
          for one in answered if one.texts]
  files.write_json_lines(path, rows)
  return f'{len(rows)} rows of candidates in {path}'


def write_pairs(path: Path, answered: Sequence[Answered], most: int, is_chat: bool) -> str:
  """Writes pairs of a right and a wrong answer; `preference_pairs.of_verdicts` says which.

  Args:
    path: the file.
    answered: the answers to each problem.
    most: the most pairs of a problem.
    is_chat: whether pairs are messages.

  Returns:
    How many pairs there are, and what was left out, as a sentence.

  Raises:
    UserError: there is no pair, so that nothing is written.
    Unwritable: the file cannot be written.
  """
  found = [preference_pairs.of_verdicts(_asked(one.problem, is_chat), one.texts, one.correct, most)
           for one in answered]
  return preference_pairs.write(path, found, 'problems')


def _asked(problem: problems.Problem, is_chat: bool) -> Any:
  return judge_prompts.messages(problem.system, problem.prompt) if is_chat else problem.prompt
