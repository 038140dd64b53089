"""The verifier that turns a rollout batch into texts and hands them to the pool."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxrl_pt.types import Prompts, RolloutBatch, Verdict
from jaxrl_pt.verifiers import base, pool, trial
from jaxrl_pt.verifiers.response_verdict import UNVERIFIED, Outcome


@dataclass(frozen=True)
class PendingPoolVerdict:
  """The future of the verdict on responses that the pool verifies."""

  verdicts: pool.PendingVerdicts
  group_size: int
  parts: tuple[str, ...]

  def result(self) -> Verdict:
    """Waits for the verdict, whose arrays are f32[N, G].

    Raises:
      CancelledError: the pool was closed before the responses were verified.
    """
    verdicts, size = self.verdicts.result(), self.group_size
    groups = [verdicts[i:i + size] for i in range(0, len(verdicts), size)]
    return base.verdict(groups, self.parts)

  def parsed(self) -> float:
    """The share of the verified responses that state an answer; 1 where none was verified."""
    outcomes = [v.outcome for v in self.verdicts.result() if v.outcome not in UNVERIFIED]
    return 1.0 - outcomes.count(Outcome.UNPARSED) / max(len(outcomes), 1)

  def last_words(self) -> str:
    """The most frequent reason why responses were not verified, once there is a result."""
    return trial.last_words(self.verdicts.result())


@dataclass(frozen=True)
class PoolVerifier:
  """Verifies the text of each response in the processes of a pool.

  pool: the pool that verifies.
  decode: the function from token ids to text, in which special tokens, such as the one that ends a
    response, are empty.
  """

  pool: pool.Pool
  decode: Callable[[Sequence[int]], str]

  def submit(self, prompts: Prompts, rollouts: RolloutBatch, references: Sequence[str]
             ) -> PendingPoolVerdict:
    """Hands over the text of every response and returns before it is verified.

    It waits for the rollouts' arrays, since it reads them on the host.
    """
    del prompts
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.in_response) > 0
    items = [(self.decode(tokens[n, g][mask[n, g]].tolist()), reference)
             for n, reference in enumerate(references) for g in range(tokens.shape[1])]
    return PendingPoolVerdict(self.pool.submit(items), tokens.shape[1], self.pool.parts)
