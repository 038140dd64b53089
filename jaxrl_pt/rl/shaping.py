"""What a response's length adds to its reward.

A length reward that compares responses is a function of the whole batch. Short-RL's reward also
remembers how accurate the policy has been. That state, f32[], is an argument and a result, and
belongs in the checkpoint. Lengths are in tokens, the stop token included.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.rl.entry import Entry
from jaxrl_pt.types import Array, Verdict, Weighted

EPSILON = 1e-5  # tokens; keeps a group of one length at +0.5


def overlong(lengths: Array, max_tokens: int, buffer_tokens: int) -> Array:
  """DAPO's soft penalty: 0 up to L_max − L_c, then (L_max − L_c − |y|) / L_c, −1 from L_max on.

  Args:
    lengths: f32[N, G].
    max_tokens: L_max.
    buffer_tokens: L_c, over which the penalty falls.

  Returns:
    f32[N, G] in [−1, 0].

  Source: 2503.14476, equation 13.
  """
  chex.assert_rank(lengths, 2)
  return jnp.clip((max_tokens - buffer_tokens - lengths) / buffer_tokens, -1.0, 0.0)


def kimi(lengths: Array, correct: Array, valid: Array) -> Array:
  """Kimi k1.5's length reward: λ_i if correct, min(0, λ_i) if not, without gates.

  λ_i = 0.5 − (ℓ_i − ℓ_min) / (ℓ_max − ℓ_min) over all valid responses of the group, and 0
  where all have one length.

  Args:
    lengths: f32[N, G].
    correct: f32[N, G] in {0, 1}.
    valid: f32[N, G] in {0, 1}.

  Returns:
    f32[N, G] in [−0.5, 0.5].

  Source: 2501.12599, section 2.3.3.
  """
  chex.assert_rank(lengths, 2)
  chex.assert_equal_shape([lengths, correct, valid])
  shortest, longest = _extremes(lengths, valid)
  spread = longest - shortest
  position = 0.5 - (lengths - shortest) / jnp.maximum(spread, 1.0)
  bonus = jnp.where(correct > 0, position, jnp.minimum(position, 0.0))
  return jnp.where(spread > 0, bonus, 0.0) * valid


# --- Short-RL ---------------------------------------------------------------------


def accuracy_gate(reference: Array, accuracy: Array, slack_accuracy: float, ema: float = 0.0
                  ) -> tuple[Array, Array]:
  """Short-RL's gate: 1 iff acc ≥ acc_ref − τ_acc, where acc_ref has already seen this batch.

  acc_ref is the running maximum of the batches' accuracies if `ema` is 0, and else their
  exponential average acc_ref ← ema · acc_ref + (1 − ema) · acc. A maximum of noisy numbers
  lies above what the policy can do, the more so the smaller the batch; the average does not.

  Args:
    reference: f32[] acc_ref after the batches before; 0 at the start, when the gate is open.
    accuracy: f32[] accuracy of this batch.
    slack_accuracy: τ_acc.
    ema: 0 for the running maximum, or the decay of the average in (0, 1).

  Returns:
    f32[] in {0, 1}, and f32[] the new acc_ref.
  """
  chex.assert_rank([reference, accuracy], 0)
  if ema:
    new = ema * reference + (1 - ema) * accuracy
  else:
    new = jnp.maximum(reference, accuracy)
  # Accuracies are multiples of 1/n: a tie at the bound must not hang on round-off.
  is_open = accuracy >= new - slack_accuracy - 1e-6
  return is_open.astype(jnp.float32), new


def correct_and_short(lengths: Array, correct: Array, valid: Array, slack_tokens: int) -> Array:
  """What Short-RL pays a response for its length while the gate is open.

    0 if wrong; 0.5 if ℓ_i ≤ ℓ_min + τ_ℓ; else λ_i = 0.5 − (ℓ_i − ℓ_min) / (ℓ_max − ℓ_min + 1e-5)

  ℓ_min and ℓ_max are the least and the greatest length of the group's correct responses. With
  τ_ℓ = 0 only the shortest of them earn the full 0.5.

  Args:
    lengths: f32[N, G].
    correct: f32[N, G] in {0, 1}: right and well-formatted.
    valid: f32[N, G] in {0, 1}.
    slack_tokens: τ_ℓ.

  Returns:
    f32[N, G] in [−0.5, 0.5].

  Source: the code of Short-RL, 2505.12284 (docs/methods/short_rl.md).
  """
  chex.assert_rank(lengths, 2)
  chex.assert_equal_shape([lengths, correct, valid])
  counted = correct * valid
  shortest, longest = _extremes(lengths, counted)
  position = 0.5 - (lengths - shortest) / (longest - shortest + EPSILON)
  return jnp.where(lengths <= shortest + slack_tokens, 0.5, position) * counted


def short_rl(reference: Array, lengths: Array, correct: Array, valid: Array, *,
             slack_tokens: int, slack_accuracy: float, ema: float = 0.0
             ) -> tuple[Array, Array, Array]:
  """Short-RL's length reward: `correct_and_short`, while `accuracy_gate` is open.

  A batch without a valid row leaves the state as it was.

  Args:
    reference: f32[] state of the gate; 0 at the start.
    lengths: f32[N, G].
    correct: f32[N, G] in {0, 1}: right and well-formatted.
    valid: f32[N, G] in {0, 1}.
    slack_tokens: τ_ℓ.
    slack_accuracy: τ_acc; 1 keeps the gate open.
    ema: as in `accuracy_gate`.

  Returns:
    f32[N, G] to add to the reward, f32[] whether the gate was open, f32[] the new state.

  Source: the code of Short-RL, 2505.12284 (docs/methods/short_rl.md).
  Departs from it in keeping its maximum as state instead of a global that a restart loses.
  """
  bonus = correct_and_short(lengths, correct, valid, slack_tokens)
  num_valid = valid.sum()
  accuracy = (correct * valid).sum() / jnp.maximum(num_valid, 1)
  is_open, new = accuracy_gate(reference, accuracy, slack_accuracy, ema)
  is_open = is_open * (num_valid > 0)
  return bonus * is_open, is_open, jnp.where(num_valid > 0, new, reference)


def _extremes(lengths: Array, counted: Array) -> tuple[Array, Array]:
  """f32[N, 1] twice: shortest and longest counted response of each group; 0 without one."""
  shortest = jnp.where(counted > 0, lengths, jnp.inf).min(-1, keepdims=True)
  longest = jnp.where(counted > 0, lengths, -jnp.inf).max(-1, keepdims=True)
  some = jnp.isfinite(shortest)
  return jnp.where(some, shortest, 0.0), jnp.where(some, longest, 0.0)


# --- By config type ---------------------------------------------------------------

Metrics = dict[str, Weighted]
# (config, verdict, f32[N, G] lengths, gate's state) → f32[N, G] what is added to the reward (None
# for nothing), the gate's new state, metrics.
Compute = Callable[[Any, Verdict, Array, Any], tuple[Array | None, Any, Metrics]]


def _stateless(bonus: Callable[[Any, Verdict, Array], Array]) -> Compute:
  def compute(config: Any, verdict: Verdict, lengths: Array, gate: Any
              ) -> tuple[Array, Any, Metrics]:
    value = bonus(config, verdict, lengths)
    return value, gate, {'length_reward': Weighted.of(value, verdict.valid)}

  return compute


def _short_rl(config: cfg.ShortRL, verdict: Verdict, lengths: Array, gate: Any
              ) -> tuple[Array, Any, Metrics]:
  bonus, is_open, gate = short_rl(
      gate, lengths, verdict.correct, verdict.valid, slack_tokens=config.slack_tokens,
      slack_accuracy=config.slack_accuracy, ema=config.ema)
  value = config.weight * bonus
  return value, gate, {'gate_open': Weighted.single(is_open),
                       'gate_accuracy': Weighted.single(gate),
                       'length_reward': Weighted.of(value, verdict.valid)}


TABLE: dict[type, Entry[Compute]] = {
    cfg.NoShaping: Entry(lambda c, verdict, lengths, gate: (None, gate, {}), 'r', ''),
    cfg.Overlong: Entry(
        _stateless(lambda c, verdict, lengths: overlong(lengths, c.max_tokens, c.buffer_tokens)),
        'r + clip((L_max − L_c − |y|) / L_c, −1, 0); clip [0.8, 1.28], token mean, groups drawn '
        'again', '2503.14476', 'DAPO', 'dapo'),
    cfg.Kimi: Entry(
        _stateless(lambda c, verdict, lengths: c.weight * kimi(
            lengths, verdict.correct, verdict.valid)),
        'r + λ if correct, r + min(0, λ) if not', '2501.12599', 'Kimi length reward', 'kimi'),
    cfg.ShortRL: Entry(
        _short_rl, 'r + 0.5 or λ if correct, within the slack, while accuracy holds',
        '2505.12284', 'Short-RL', 'short_rl'),
}
