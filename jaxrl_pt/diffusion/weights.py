"""How much the error of a frame counts at its noise level, given those of the frames before it."""

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array


def forcing(snr_BT: Array, clip: float, decay: float) -> Array:
  """The weights of diffusion forcing for v-prediction (2407.01392, fused signal-to-noise ratio).

  With s = min(SNR, clip) / clip, s' = SNR / clip and the running ratio c of the frames before,

    F = 1 − (1 − γ c)(1 − s),   F' = 1 − (1 − γ c)(1 − s'),   w = clip F / (clip F' + 1)
    c ← γ c + (1 − γ) s

  and for the first frame F = s, F' = s', c = s. A frame whose past is clear counts at any level of
  its own; of a frame alone this is the Min-SNR weight (2303.09556).

  Args:
    snr_BT: f32[B, T] signal-to-noise ratio of each frame of a sequence.
    clip: above which a ratio counts no more.
    decay: γ.

  Returns:
    f32[B, T].
  """
  scaled_TB = snr_BT.T / clip
  clipped_TB = jnp.minimum(scaled_TB, 1.0)

  def frame(carry_B: Array, ratios: tuple[Array, Array]) -> tuple[Array, Array]:
    scaled_B, clipped_B = ratios
    fused, whole = (1 - (1 - decay * carry_B) * (1 - s) for s in (clipped_B, scaled_B))
    return decay * carry_B + (1 - decay) * clipped_B, clip * fused / (clip * whole + 1)

  fused_B = clip * clipped_TB[0] / (clip * scaled_TB[0] + 1)
  _, weights_TB = jax.lax.scan(frame, clipped_TB[0], (scaled_TB[1:], clipped_TB[1:]))
  return jnp.concatenate([fused_B[None], weights_TB]).T
