"""What a verifier is: on the device a function of arrays, on the host of text."""

from collections.abc import Callable, Sequence
import functools

import jax.numpy as jnp
import numpy as np

from jaxrl_pt.types import Array, Prompts, Rollout, Verdict
from jaxrl_pt.verifiers.judgement import UNJUDGED, Judgement, Outcome

# Runs inside the jitted step.
DeviceVerifier = Callable[[Prompts, Rollout], Verdict]


def verdict(groups: Sequence[Sequence[Judgement]], parts: Sequence[str] = ('answer',)) -> Verdict:
  """The arrays of N groups of G judgements; what was not judged is masked, not dropped.

  Args:
    groups: N groups of G.
    parts: names of the parts to log apart; a judgement without one counts 0 there.

  Returns:
    Verdict of f32[N, G] arrays: reward is the score, correct is 1 where the outcome is CORRECT.
  """
  def table(of: Callable[[Judgement], float]) -> Array:
    return jnp.asarray(np.array([[of(j) for j in group] for group in groups], np.float32))

  return Verdict(
      table(lambda j: j.score), table(lambda j: j.outcome not in UNJUDGED),
      table(lambda j: j.outcome is Outcome.CORRECT),
      {name: table(functools.partial(_part, name)) for name in parts})


def _part(name: str, judgement: Judgement) -> float:
  return judgement.parts.get(name, 0.0)
