"""A task: batches of prompts by number, a verifier, and a measure on held-out prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel.hosts import agreed
from jaxrl_pt.types import Params, Prompts, Verdict
from jaxrl_pt.verifiers.base import PendingVerdict, Verifier

# Stands in place of a batch's number, so that every evaluation draws the same noise, which no
# training batch draws.
EVALUATION_STREAM = 2**31 - 1


@dataclass(frozen=True)
class Task:
  """What a policy is reinforced on.

  take: b → (prompts as numpy arrays, reference answers) of batch b = 0, 1, …, which depend on b
    alone.
  verifier: verifies the responses to these prompts.
  score: parameters → metrics of the policy on held-out prompts.
  digest: a hash of the prompts' content, and of a judge if one rewards the responses. A run resumes
    only with the same.
  num_held_out: the number of prompts that a judge's reward is measured on.
  """

  take: Callable[[int], tuple[Prompts, Sequence[str]]]
  verifier: Verifier
  score: Callable[[Params], dict[str, float]]
  digest: str
  num_held_out: int = 0


def settled(pending: PendingVerdict) -> Verdict:
  """Waits for a verdict, as numpy arrays that are the same on all hosts.

  Raises:
    UserError: no response was verified, so there is nothing to learn from.
  """
  # A response whose verification timed out on one host may have been verified on another.
  verdict = jax.tree.map(np.asarray, agreed(pending.result()))
  if not verdict.valid.any():
    raise UserError(f'The verifier gave no verdict on any of {verdict.valid.size} responses: '
                    f'{pending.last_words()}. This step is not learned from: mend the verifier or '
                    'its limits (VerifierPool), then run the same command to go on from the last '
                    'checkpoint.')
  return verdict
