"""What the verifier of a run says of responses that the engine has drawn."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrl_pt.data.problems import ProblemSet
from jaxrl_pt.environments.base import settled
from jaxrl_pt.sampling.engine import Response
from jaxrl_pt.types import RolloutBatch
from jaxrl_pt.verifiers.base import Verifier


class Verified(NamedTuple):
  """Responses to P problems, G to each, with their verdicts.

  tokens: i32[P, G, S]; after the end of a response, a token that ends one.
  there: f32[P, G, S] 1 on tokens of a response.
  score, correct, valid: f32[P, G], the fields of `types.Verdict`.
  """

  tokens: np.ndarray
  there: np.ndarray
  score: np.ndarray
  correct: np.ndarray
  valid: np.ndarray


def verified(responses: Sequence[Sequence[Response]], encoded: ProblemSet, verifier: Verifier,
             at_once: int, stop_ids: tuple[int, ...]) -> Verified:
  """Has responses verified.

  Args:
    responses: [P][G], as many to each problem.
    encoded: the problems.
    verifier: of the run.
    at_once: how many problems the verifier is given at a time.
    stop_ids: the tokens that end a response.

  Raises:
    UserError: none of the responses that were given at a time was verified.
  """
  longest = max(len(r.tokens) for group in responses for r in group)
  shape = len(responses), len(responses[0]), longest
  tokens = np.full(shape, stop_ids[0] if stop_ids else 0, np.int32)
  there = np.zeros(shape, np.float32)
  for n, group in enumerate(responses):
    for g, response in enumerate(group):
      tokens[n, g, :len(response.tokens)] = response.tokens
      there[n, g, :len(response.tokens)] = 1
  size, verdicts = min(at_once, len(responses)), []
  for start in range(0, len(responses), size):
    rows = np.minimum(np.arange(start, start + size), len(responses) - 1)
    prompts, references = encoded.prompts(rows)
    rollouts = RolloutBatch.of_one_turn(jnp.asarray(tokens[rows]), jnp.asarray(there[rows]),
                                        jnp.zeros((size, *shape[1:])), 0)
    verdict = settled(verifier.submit(prompts, rollouts, references))
    verdicts.append([np.asarray(x) for x in (verdict.reward, verdict.correct, verdict.valid)])
  score, correct, valid = (np.concatenate(parts)[:shape[0]]
                           for parts in zip(*verdicts, strict=True))
  return Verified(tokens, there, score, correct, valid)
