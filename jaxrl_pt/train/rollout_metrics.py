"""What a rollout batch says of the policy that drew it, as sums with denominators."""

import jax.numpy as jnp

from jaxrl_pt.types import NO_THINK, THINK, Array, RolloutBatch, Verdict, Weighted


def of(rollouts: RolloutBatch, verdict: Verdict, reward: Array) -> dict[str, Weighted]:
  """Reward, accuracy and lengths, the parts of the reward, and the same of each mode.

  Args:
    rollouts, verdict: the batch.
    reward: f32[N, G] the reward that is learned from, with what its length adds.
  """
  return {
      'reward': Weighted.of(verdict.reward, verdict.valid),
      'shaped_reward': Weighted.of(reward, verdict.valid),
      'accuracy': Weighted.of(verdict.correct, verdict.valid),
      'verified': Weighted.of(verdict.valid, jnp.ones_like(verdict.valid)),
      'response_length': Weighted.of(rollouts.lengths(), verdict.valid),
      **{f'reward/{name}': Weighted.of(part, verdict.valid)
         for name, part in verdict.parts.items()},
      **{name: Weighted.of(measure, jnp.ones_like(measure))
         for name, measure in verdict.measures.items()},
      **_mode_metrics(rollouts, verdict),
  }


def _mode_metrics(rollouts: RolloutBatch, verdict: Verdict) -> dict[str, Weighted]:
  """How likely the policy thinks, and accuracy and length of each mode; {} without modes."""
  if isinstance(rollouts.mode, tuple):
    return {}
  thinks = (rollouts.mode == THINK).astype(jnp.float32)
  # Where modes are forced, the log-probabilities of half of the group say it.
  was_drawn = rollouts.sampled[..., 0]
  values = {'think': Weighted.of(
      jnp.where(was_drawn > 0, thinks, jnp.exp(rollouts.logp[..., 0])),
      verdict.valid * jnp.where(was_drawn > 0, 1.0, thinks))}
  for name, number in (('think', THINK), ('no_think', NO_THINK)):
    counted = verdict.valid * (rollouts.mode == number)
    values[f'accuracy/{name}'] = Weighted.of(verdict.correct, counted)
    values[f'response_length/{name}'] = Weighted.of(rollouts.lengths(), counted)
  return values
