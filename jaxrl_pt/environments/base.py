"""What a policy is reinforced on: prompts by number, their verifier, and a held-out measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel.hosts import agreed
from jaxrl_pt.types import Params, Prompts, Verdict
from jaxrl_pt.verifiers.base import PendingVerdict, Verifier


@dataclass(frozen=True)
class Environment:
  """Prompts, who verifies the responses, and how the policy is measured.

  take: (prompts as numpy, references) of batch b = 0, 1, …; a function of b alone.
  verifier: of the responses.
  score: metrics of the parameters on held-out prompts.
  digest: names the prompts by their content; a run goes on with the same ones only.
  """

  take: Callable[[int], tuple[Prompts, Sequence[str]]]
  verifier: Verifier
  score: Callable[[Params], dict[str, float]]
  digest: str


def settled(pending: PendingVerdict) -> Verdict:
  """Waits for the verdict that all hosts share; numpy.

  Raises:
    UserError: nothing was verified, so there is nothing to learn from.
  """
  # What timed out on one host may not have on another.
  verdict = jax.tree.map(np.asarray, agreed(pending.result()))
  if not verdict.valid.any():
    raise UserError(f'The verifier gave no verdict on any of {verdict.valid.size} responses: '
                    f'{pending.last_words()}. This step is not learned from: mend the verifier or '
                    'its limits (VerifierPool), then run the same command to go on from the last '
                    'checkpoint.')
  return verdict
