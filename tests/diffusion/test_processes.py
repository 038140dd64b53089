"""From noise to a frame and back: each equation against its definition, on small arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.diffusion import processes, weights

ALL = [cfg.Flow(), cfg.Flow('velocity'), cfg.Flow(sampling_shift=0.3), cfg.Shortcut(),
       cfg.VDiffusion(), cfg.VDiffusion(num_levels=10)]
RNG = np.random.default_rng(0)
FRAME, NOISE = (jnp.asarray(RNG.normal(size=(5, 3, 2)), jnp.float32) for _ in range(2))
TIME = jnp.array([0.1, 0.3, 0.5, 0.9, 1.0])


@pytest.mark.parametrize('process', ALL, ids=repr)
def test_what_is_said_of_a_frame_gives_frame_and_noise_back(process):
  x_t = processes.noised(process, FRAME, NOISE, TIME)
  said = processes.target(process, FRAME, NOISE, TIME)
  frame, noise = processes.split(process, said, x_t, TIME)
  np.testing.assert_allclose(frame, FRAME, atol=1e-4)
  np.testing.assert_allclose(noise, NOISE, atol=1e-4)


def test_the_targets_are_what_their_names_say():
  alpha_bar = processes.alpha_bars(1000)[np.round(1000 * TIME).astype(int)][:, None, None]
  root, rest = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
  for process, x_t, said in (
      (cfg.Flow(), (1 - TIME[:, None, None]) * FRAME + TIME[:, None, None] * NOISE, FRAME),
      (cfg.Flow('velocity'), None, NOISE - FRAME), (cfg.Shortcut(), None, NOISE - FRAME),
      (cfg.VDiffusion(), root * FRAME + rest * NOISE, root * NOISE - rest * FRAME)):
    np.testing.assert_allclose(processes.target(process, FRAME, NOISE, TIME), said, rtol=1e-5)
    if x_t is not None:
      np.testing.assert_allclose(processes.noised(process, FRAME, NOISE, TIME), x_t, atol=1e-6)


@pytest.mark.parametrize('num_steps', [1, 3, 8])
@pytest.mark.parametrize('process', ALL, ids=repr)
def test_a_sampler_with_an_exact_network_recovers_the_frame(process, num_steps):
  """Euler is exact on straight paths and DDIM where the network knows the frame, in any steps."""
  at = processes.times(process, num_steps)
  assert at[0] == 1 and at[-1] == 0 and (np.diff(at) < 0).all() and len(at) == num_steps + 1
  x_t = processes.noised(process, FRAME, NOISE, jnp.ones(5))
  for time, following in zip(at[:-1], at[1:], strict=True):
    time_B, next_B = jnp.full(5, time), jnp.full(5, following)
    said = processes.target(process, FRAME, NOISE, time_B)
    x_t = processes.step(process, said, x_t, time_B, next_B)
    np.testing.assert_allclose(x_t, processes.noised(process, FRAME, NOISE, next_B), atol=2e-4)
  np.testing.assert_allclose(x_t, FRAME, atol=2e-4)


def test_the_sigmoid_schedule_is_that_of_its_definition():
  """2212.11972, algorithm 1, with betas of at most 0.999."""
  number, bar = 10, 1.0
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  gamma = lambda t: (sigmoid(3) - sigmoid(t * 6 - 3)) / (sigmoid(3) - sigmoid(-3))
  found = processes.alpha_bars(number)
  assert found[0] == 1
  for n in range(1, number + 1):
    bar *= max(gamma(n / number) / gamma((n - 1) / number), 0.001)
    np.testing.assert_allclose(found[n], bar, rtol=1e-5)
  np.testing.assert_allclose(
      processes.signal_to_noise(cfg.VDiffusion(10), jnp.array([0.5])), found[5] / (1 - found[5]))


def test_noise_levels_are_drawn_from_all_that_there_are():
  key = jax.random.key(0)
  levels = np.asarray(processes.draw_times(cfg.VDiffusion(10), key, (4000,)))
  found, counts = np.unique(np.round(levels * 10), return_counts=True)
  assert found.tolist() == list(range(1, 11)) and (abs(counts - 400) < 100).all()
  even = np.asarray(processes.draw_times(cfg.Flow(), key, (4000,)))
  shifted = np.asarray(processes.draw_times(cfg.Flow(shift=3.0), key, (4000,)))
  np.testing.assert_allclose(shifted, 3 * even / (1 + 2 * even), rtol=1e-5)
  assert abs(np.median(even) - 0.5) < 0.03 and abs(np.median(shifted) - 0.75) < 0.03
  np.testing.assert_allclose(processes.times(cfg.Flow(shift=3.0), 4), [1, 0.75, 0.5, 0.25, 0])
  np.testing.assert_allclose(processes.times(cfg.Flow(sampling_shift=3.0), 4),
                             [1, 0.9, 0.75, 0.5, 0])


def test_a_shortcut_model_is_told_the_step_size():
  assert [processes.step_index(cfg.Shortcut(), n) for n in (1, 2, 4, 8)] == [0, 1, 2, 3]
  assert processes.step_index(cfg.Flow(), 3) == 0
  with pytest.raises(ValueError, match='1, 2, 4, 8 … steps, not 3'):
    processes.step_index(cfg.Shortcut(), 3)


# --- Weights ------------------------------------------------------------------------


def _forcing_of_one(snr, clip, gamma):
  """The equations of the spec, frame by frame."""
  found, c = [], None
  for ratio in snr:
    s, whole = min(ratio, clip) / clip, ratio / clip
    if c is None:
      fused, fused_whole, c = s, whole, s
    else:
      fused = 1 - (1 - gamma * c) * (1 - s)
      fused_whole = 1 - (1 - gamma * c) * (1 - whole)
      c = gamma * c + (1 - gamma) * s
    found.append(clip * fused / (clip * fused_whole + 1))
  return found


@pytest.mark.parametrize('clip, gamma', [(5.0, 0.4096), (2.0, 0.9), (5.0, 0.0)])
def test_the_weights_of_diffusion_forcing_frame_by_frame(clip, gamma):
  snr = np.exp(RNG.normal(scale=2.5, size=(4, 6))).astype(np.float32)
  assert (snr > clip).any() and (snr < clip).any()
  np.testing.assert_allclose(weights.forcing(jnp.asarray(snr), clip, gamma),
                             [_forcing_of_one(row, clip, gamma) for row in snr], rtol=2e-5)


def test_a_frame_after_a_clear_past_counts_more_than_after_noise():
  clear, noisy = (weights.forcing(jnp.array([[first, 0.01]]), 5.0, 0.4)[0, 1]
                  for first in (100.0, 0.01))
  assert clear > 10 * noisy
