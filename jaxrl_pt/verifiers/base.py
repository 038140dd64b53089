"""What a verifier is: on the device a function of arrays, on the host of text."""

from collections.abc import Callable, Sequence
import enum

import jax.numpy as jnp
import numpy as np

from jaxrl_pt.types import Prompts, Rollout, Verdict

# Runs inside the jitted step.
DeviceVerifier = Callable[[Prompts, Rollout], Verdict]


class Outcome(enum.Enum):
  """What became of one response under a host verifier."""

  CORRECT = 'correct'
  WRONG = 'wrong'
  UNPARSED = 'unparsed'  # no answer found: counts as wrong
  TIMEOUT = 'timeout'  # the verifier ran out of time: says nothing about the response
  CRASH = 'crash'  # the verifier failed: says nothing about the response


# (response, reference) → outcome; runs in a process that may be killed.
HostVerifier = Callable[[str, str], Outcome]


def verdict(outcomes: Sequence[Sequence[Outcome]]) -> Verdict:
  """Reward 1 for a correct response; a response that was not judged is masked, not dropped.

  Args:
    outcomes: N groups of G.

  Returns:
    Verdict of f32[N, G] arrays.
  """
  reward = [[outcome is Outcome.CORRECT for outcome in group] for group in outcomes]
  unjudged = (Outcome.TIMEOUT, Outcome.CRASH)
  valid = [[outcome not in unjudged for outcome in group] for group in outcomes]
  correct = jnp.asarray(np.array(reward), jnp.float32)
  return Verdict(correct, jnp.asarray(np.array(valid), jnp.float32), correct)
