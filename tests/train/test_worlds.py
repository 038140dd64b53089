"""The loss of a model of a game, with models that say what a test decides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.diffusion import processes, weights
from jaxrl_pt.models.told import Shape
from jaxrl_pt.models.world import World
from jaxrl_pt.train import worlds
from jaxrl_pt.types import Clips

SHAPE = Shape(frame=(4, 4), display_rows=1, num_actions=3, stay=1, num_events=2, digits=(3,),
              num_contents=0, view=(0, 0), grid=(0, 0, 0, 0))
CONFIG = cfg.DiT(num_layers=1, d_model=8, d_ff=8, num_heads=1, patch=4)
B, N, K = 2, 3, 2
RNG = np.random.default_rng(0)


def clips():
  keys = jax.random.split(jax.random.key(3), (B, N))
  return Clips(
      jnp.asarray(RNG.integers(0, 256, (B, N, K + 1, 4, 4, 3)), jnp.uint8),
      jnp.zeros((B, N), int), jnp.zeros((B, N, 1), int), jnp.zeros((B, N, 0, 0), int),
      jnp.array([[0, 1, 0], [0, 0, 0]]), jnp.array([[0.6, 3.0, 0.6], [0.6, 0.6, 0.6]]), keys)


def world_of(say, config=CONFIG, logits=None):
  """A model that says `say(past, noisy, time, bucket, step)` of a frame."""
  def denoise(params, past, noisy, time_B, told, bucket_B, step_B):
    return say(past, noisy, time_B, bucket_B, step_B), past

  def events(params, past, action_B):
    return jnp.tile(jnp.array([1.0, 0.0]) if logits is None else logits, (len(past), 1))

  same = lambda params, frames: frames
  return World(config, SHAPE, {}, (4, 4, 3), None, denoise, None, None, None, events, same, same)


def measured(model, config, batch):
  return jax.jit(worlds.frame_loss(model, config), compiler_options={
      'xla_backend_optimization_level': 0})({}, batch)


def test_pixels_of_the_display_weigh_more():
  weight = worlds.row_weights(4, 1, 8.0)[:, 0, 0]
  np.testing.assert_allclose(weight, np.array([8, 1, 1, 1]) * 4 / 11)
  batch, config = clips(), cfg.Diffusion(event_weight=0.0, context_noise=0.0)
  total, metrics = measured(world_of(lambda past, noisy, *_: 0 * noisy), config, batch)
  frames = np.asarray(batch.frames[:, :, -1], np.float64) / 127.5 - 1
  expected = (weight[:, None, None] * frames**2).mean((2, 3, 4))
  np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)
  np.testing.assert_allclose(metrics['frame_loss'].mean(), expected.mean(), rtol=1e-5)
  assert worlds.num_frames(batch) == B * N


def test_events_are_weighed_by_class_and_lambda():
  batch = clips()
  config = cfg.Diffusion(event_weight=0.5)
  _, metrics = measured(world_of(lambda past, noisy, *_: 0 * noisy), config, batch)
  likely, rare = np.log1p(np.exp(-1.0)), np.log1p(np.exp(1.0))  # −log p of the two events
  balanced = (5 * 0.6 * likely + 3 * rare) / 6
  np.testing.assert_allclose(metrics['event_loss'].mean(), balanced, rtol=1e-5)
  np.testing.assert_allclose(
      metrics['loss'].mean(), metrics['frame_loss'].mean() + 0.5 * balanced, rtol=1e-5)
  np.testing.assert_allclose(metrics['event_accuracy'].mean(), 5 / 6, rtol=1e-6)
  assert metrics['event_recall'].sum == 0 and metrics['event_recall'].count == 1


@pytest.mark.slow
def test_the_model_is_told_how_much_noise_the_past_has():
  """The noise is that of a level up to `context_noise`, in `noise_buckets` equal buckets."""
  batch, seen = clips(), {}

  def say(past, noisy, time, bucket, step):
    seen.update(past=past, bucket=bucket)
    return noisy

  config = dataclasses.replace(CONFIG, past=cfg.FrameHistory(2, noise_buckets=4))
  worlds.frame_loss(world_of(say, config), cfg.Diffusion(context_noise=0.8))({}, batch)
  frames = np.asarray(batch.frames, np.float64).reshape(B * N, K + 1, 4, 4, 3) / 127.5 - 1
  clean = np.concatenate([frames[:, 0], frames[:, 1]], -1)
  assert len(set(np.asarray(seen['bucket']).tolist())) > 1
  for row, (key, bucket) in enumerate(zip(batch.keys.reshape(-1), seen['bucket'], strict=True)):
    keys = jax.random.split(key, 4)
    level = float(jax.random.uniform(keys[0]))
    assert bucket == int(4 * level)
    noise = np.asarray(jax.random.normal(keys[1], (4, 4, 6)))
    np.testing.assert_allclose(seen['past'][row], (1 - 0.8 * level) * clean[row]
                               + 0.8 * level * noise, atol=1e-5)
  worlds.frame_loss(world_of(say, config), cfg.Diffusion(context_noise=0.0))({}, batch)
  np.testing.assert_allclose(seen['past'], clean, atol=1e-6)
  assert np.abs(seen['bucket']).max() == 0


@pytest.mark.slow
def test_v_prediction_has_the_weight_of_a_frame_alone():
  batch, seen = clips(), {}
  process = cfg.VDiffusion()

  def say(past, noisy, time, bucket, step):
    seen.update(noisy=noisy, time=time)
    return 0 * noisy

  config = cfg.Diffusion(process, display_weight=1.0, event_weight=0.0)
  total, _ = worlds.frame_loss(world_of(say), config)({}, batch)
  frames = jnp.asarray(batch.frames[:, :, -1], jnp.float32).reshape(-1, 4, 4, 3) / 127.5 - 1
  alpha, sigma = (x[:, None, None, None] for x in processes.coefficients(process, seen['time']))
  noise = (seen['noisy'] - alpha * frames) / sigma
  snr = processes.signal_to_noise(process, seen['time'])
  weight = weights.forcing(snr[:, None], 5.0, 0.4096)[:, 0]
  expected = weight * jnp.square(alpha * noise - sigma * frames).mean((1, 2, 3))
  np.testing.assert_allclose(total, expected.sum(), rtol=1e-4)


@pytest.mark.slow
def test_a_large_step_learns_two_small_ones():
  """One clip of each episode; its target is the mean of two velocities of half the step."""
  config = dataclasses.replace(CONFIG, step_sizes=3)
  velocity = lambda x, time, step: 0.3 * x + time[:, None, None, None] + step[:, None, None, None]
  model = world_of(lambda past, noisy, time, bucket, step: velocity(noisy, time, step), config)
  x_t = jnp.asarray(RNG.normal(size=(2, 4, 4, 3)), jnp.float32)
  time, index = jnp.array([1.0, 0.5]), jnp.array([0, 1])
  rows = worlds._Rows(x_t, index, None, x_t, x_t, index)
  found = worlds.shortcut_target(model, {}, rows, x_t, time, index)
  for row, half in ((0, 0.5), (1, 0.25)):
    t, s = time[row], index[row] + 1
    first = 0.3 * x_t[row] + t + s
    second = 0.3 * (x_t[row] - half * first) + (t - half) + s
    np.testing.assert_allclose(found[row], (first + second) / 2, rtol=1e-5)

  calls = []

  def say(past, noisy, time, bucket, step):
    calls.append((np.asarray(time), np.asarray(step)))
    return 0 * noisy

  loss = worlds.frame_loss(world_of(say, config), cfg.Diffusion(
      cfg.Shortcut(), event_weight=0.0, display_weight=1.0))
  total, _ = loss({}, clips())
  (t_1, s_1), (t_2, s_2), (t, s), (small_t, small_s) = calls
  assert len(t) == B and len(small_t) == B * (N - 1) and (small_s == 2).all()
  np.testing.assert_array_equal(s_1, s + 1)
  np.testing.assert_array_equal(s_2, s + 1)
  np.testing.assert_allclose(t_2, t - 0.5 ** (s + 1))
  assert ((t * 2**s) % 1 == 0).all() and (t_2 >= 0.5 ** (s + 1)).all()
  assert np.isfinite(total) and total > 0


@pytest.mark.slow
@pytest.mark.parametrize('process', [cfg.Flow(), cfg.Flow('velocity'), cfg.VDiffusion()], ids=repr)
def test_a_model_that_is_right_has_no_loss(process):
  batch = clips()
  frames = jnp.asarray(batch.frames[:, :, -1], jnp.float32).reshape(-1, 4, 4, 3) / 127.5 - 1

  def say(past, noisy, time, bucket, step):
    alpha, sigma = processes.coefficients(process, time[:, None, None, None])
    return processes.target(process, frames, (noisy - alpha * frames) / sigma, time)

  total, _ = worlds.frame_loss(world_of(say), cfg.Diffusion(process, event_weight=0.0))({}, batch)
  assert abs(total) < 1e-5


@pytest.mark.slow
def test_a_recurrent_model_learns_each_frame_after_those_before_it():
  """A model whose state counts frames and whose word for a frame is that count."""
  length = 5
  rng = np.random.default_rng(1)
  episodes = Clips(
      jnp.asarray(rng.integers(0, 256, (B, length, 1, 4, 4, 3)), jnp.uint8),
      jnp.tile(jnp.arange(length), (B, 1)), jnp.zeros((B, length, 1), int),
      jnp.zeros((B, length, 0, 0), int), jnp.ones((B, length), int), jnp.ones((B, length)),
      jax.random.split(jax.random.key(3), (B, length)))
  config = dataclasses.replace(CONFIG, past=cfg.Recurrent(1))
  model = world_of(None, config)._replace(
      start=lambda params, number: jnp.zeros((number, 4, 4, 1)),
      denoise=lambda params, past, noisy, time, told, bucket, step: (
          0 * noisy + past + told.action[:, None, None, None], past + 1),
      events=lambda params, past, action: jnp.stack([0 * past[:, 0, 0, 0], past[:, 0, 0, 0]], -1))
  process = cfg.VDiffusion()
  objective = cfg.Diffusion(process, event_weight=1.0, display_weight=1.0)
  total, metrics = worlds.frame_loss(model, objective)({}, episodes)
  frames = np.asarray(episodes.frames[:, :, 0], np.float64) / 127.5 - 1
  expected, cross, snr = [], [], np.zeros((B, length))
  errors = np.zeros((B, length))
  for b in range(B):
    for t in range(length):
      keys = jax.random.split(episodes.keys[b, t])
      time = processes.draw_times(process, keys[0])
      noise = np.asarray(jax.random.normal(keys[1], (4, 4, 3)))
      alpha, sigma = processes.coefficients(process, time)
      errors[b, t] = ((t + t - (alpha * noise - sigma * frames[b, t])) ** 2).mean()
      snr[b, t] = processes.signal_to_noise(process, time)
      cross.append(np.log1p(np.exp(-float(t))))  # The state before the frame: t frames are in it.
  weight = np.asarray(weights.forcing(jnp.asarray(snr, jnp.float32), 5.0, 0.4096))
  expected = (errors * weight).sum() + np.sum(cross)
  np.testing.assert_allclose(total, expected, rtol=1e-4)
  np.testing.assert_allclose(metrics['event_loss'].mean(), np.mean(cross), rtol=1e-5)
