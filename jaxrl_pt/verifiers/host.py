"""Between the loop, which has tokens, and the pool, which judges text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxrl_pt.types import Rollout, Verdict
from jaxrl_pt.verifiers import base, pool, trial
from jaxrl_pt.verifiers.judgement import UNJUDGED, Outcome


@dataclass(frozen=True)
class Ticket:
  """Rollouts handed to the pool."""

  judgements: pool.Ticket
  group_size: int
  parts: tuple[str, ...]

  def result(self) -> Verdict:
    """Waits for the verdict, f32[N, G] arrays; see `pool.Ticket.result`."""
    judged, size = self.judgements.result(), self.group_size
    groups = [judged[i:i + size] for i in range(0, len(judged), size)]
    return base.verdict(groups, self.parts)

  def parsed(self) -> float:
    """The share of the judged responses in which an answer was found; 1 where none was judged."""
    outcomes = [j.outcome for j in self.judgements.result() if j.outcome not in UNJUDGED]
    return 1.0 - outcomes.count(Outcome.UNPARSED) / max(len(outcomes), 1)

  def last_words(self) -> str:
    """Why responses were not judged, once there is a result."""
    return trial.last_words(self.judgements.result())


def submit(verifiers: pool.Pool, decode: Callable[[Sequence[int]], str], rollout: Rollout,
           references: Sequence[str]) -> Ticket:
  """Hands over the text of every response and returns at once.

  Args:
    verifiers: the pool.
    decode: ids → text; special tokens, such as the one that ends a response, are empty in it.
    rollout: N prompts, G samples, on the host.
    references: N reference answers.
  """
  tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask) > 0
  items = [(decode(tokens[n, g][mask[n, g]].tolist()), reference)
           for n, reference in enumerate(references) for g in range(tokens.shape[1])]
  return Ticket(verifiers.submit(items), tokens.shape[1], verifiers.parts)
