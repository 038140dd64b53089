"""The autoencoder of frames: its sizes, its norms, and what training it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import vae
from jaxrl_pt.nn.norm import group_norm
from jaxrl_pt.train import autoencoding
from jaxrl_pt.types import Stills
from tests.models.test_world import SHAPE, quick

CONFIG = cfg.VAE(base=4, multipliers=(1, 2, 2), num_blocks=1, latent_channels=3)
RNG = np.random.default_rng(0)


def params_of(config, scale=0.3):
  draw = lambda spec: jnp.asarray(scale * RNG.normal(size=spec.shape), jnp.float32)
  return P.map_specs(draw, vae.build(config).specs)


def test_group_norm_by_hand():
  x = RNG.normal(size=(2, 3, 4, 6)).astype(np.float32)
  gain, bias = RNG.normal(size=(2, 6)).astype(np.float32)
  expected = np.zeros_like(x)
  for row in range(2):
    for group in (slice(0, 3), slice(3, 6)):
      part = x[row, :, :, group]
      expected[row, :, :, group] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
  np.testing.assert_allclose(group_norm(jnp.asarray(x), gain, bias, 2), expected * gain + bias,
                             atol=1e-5)


def test_the_divergence_of_a_gaussian_by_hand():
  mean, log_variance = jnp.full((1, 1, 1, 2), 0.5), jnp.log(jnp.full((1, 1, 1, 2), 0.25))
  np.testing.assert_allclose(vae.kl(mean, log_variance), [2 * (0.25 + 0.25 - 1 - np.log(0.25)) / 2],
                             rtol=1e-6)
  assert vae.kl(0 * mean, 0 * mean)[0] == 0


def test_the_size_of_the_base_model():
  """Latents of 1/4 the side; the layers of 2412.00887's configuration, counted by hand."""
  def conv(i, o, side=3):
    return side * side * i * o + o

  def block(i, o):
    return 2 * i + conv(i, o) + 2 * o + conv(o, o) + (i * o if i != o else 0)

  encoder = (conv(3, 128) + 2 * block(128, 128) + conv(128, 128) + block(128, 256) + block(256, 256)
             + conv(256, 256) + block(256, 512) + block(512, 512) + 2 * block(512, 512) + 2 * 512
             + conv(512, 8))
  decoder = (conv(4, 512) + 2 * block(512, 512) + 3 * block(512, 512) + conv(512, 512)
             + block(512, 256) + 2 * block(256, 256) + conv(256, 256) + block(256, 128)
             + 2 * block(128, 128) + 2 * 128 + conv(128, 3))
  assert P.count(vae.build(cfg.VAE()).specs) == encoder + decoder
  assert cfg.VAE().factor == 4
  with pytest.raises(UserError, match='latents of 1/4 of a frame of 10 × 12'):
    vae.check_divides(cfg.VAE(), (10, 12))


@pytest.mark.slow
def test_frames_become_latents_and_come_back_in_their_size():
  coder, params = vae.build(CONFIG), params_of(CONFIG)
  x = jnp.asarray(RNG.normal(size=(2, 8, 12, 3)), jnp.float32)
  mean, log_variance = quick(coder.encode)(params, x)
  assert mean.shape == log_variance.shape == (2, 2, 3, 3)
  assert quick(coder.decode)(params, mean).shape == x.shape
  forward = lambda p, x: coder.decode(p, coder.encode(p, x)[0])
  found = jax.jit(forward).lower(params, x[:1]).cost_analysis()['flops']
  # XLA leaves out what falls outside of a frame, and counts norms too.
  assert 0.6 < 2 * vae.multiply_adds(CONFIG, (8, 12)) / found < 1.6


@pytest.mark.slow
def test_the_loss_is_the_weighted_error_and_the_divergence():
  coder, params = vae.build(CONFIG), params_of(CONFIG)
  stills = Stills(jnp.asarray(RNG.integers(0, 256, (2, 2, 8, 12, 3)), jnp.uint8),
                  jax.random.split(jax.random.key(0), (2, 2)))
  config = cfg.Autoencoding(kl_weight=0.5, display_weight=3.0)
  total, metrics = autoencoding.frame_loss(coder, SHAPE, config)(params, stills)
  frames = jnp.asarray(stills.frames, jnp.float32).reshape(4, 8, 12, 3) / 127.5 - 1
  mean, log_variance = coder.encode(params, frames)
  noise = jnp.stack([jax.random.normal(k, mean.shape[1:]) for k in stills.keys.reshape(-1)])
  decoded = coder.decode(params, mean + jnp.exp(log_variance / 2) * noise)
  weight = np.array([3, 3, 1, 1, 1, 1, 1, 1]) * 8 / 12  # Two rows of display.
  error = (weight[:, None, None] * (decoded - frames) ** 2).mean((1, 2, 3))
  np.testing.assert_allclose(total, (error + 0.5 * vae.kl(mean, log_variance)).sum(), rtol=1e-4)
  np.testing.assert_allclose(metrics['latent_mean'].mean(), mean.mean(), rtol=1e-4)
  assert autoencoding.num_frames(stills) == 4
