"""The loss of a variational autoencoder of a game's frames.

    L = Σ_pixels w_pixel (decode(z) − x)² / Σ w_pixel + β KL(q ‖ N(0, 1)),   z = mean + σ ε

Source: 1312.6114; the weights are those of 2412.00887, without its perceptual loss.
"""

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.diffusion.sampling import as_pixels
from jaxrl_pt.models.told import Shape
from jaxrl_pt.models.vae import Coder, kl
from jaxrl_pt.train.step import MeasuredLoss, Metrics
from jaxrl_pt.train.worlds import row_weights
from jaxrl_pt.types import Array, Params, Stills, Weighted


def num_frames(stills: Stills) -> Array:
  """f32[]: the frames of a batch, by which the step divides."""
  return jnp.asarray(stills.keys.size, jnp.float32)


def frame_loss(coder: Coder, shape: Shape, config: cfg.Autoencoding) -> MeasuredLoss:
  """loss(params, stills) → (the sum over the frames, metrics).

  Its metrics are means over frames: the loss, the error of the pixels, the divergence in nats, and
  the mean and the mean square of the latents, from which `VAE.offset` and `VAE.scale` follow.

  Args:
    coder: the autoencoder.
    shape: of the game.
    config: weights.
  """
  pixels = jnp.asarray(row_weights(shape.frame[0], shape.display_rows, config.display_weight))

  def loss(params: Params, stills: Stills) -> tuple[Array, Metrics]:
    num = stills.keys.size
    frames = as_pixels(stills.frames.reshape(num, *stills.frames.shape[2:]))
    mean, log_variance = coder.encode(params, frames)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(stills.keys.reshape(num))
    decoded = coder.decode(params, mean + jnp.exp(log_variance / 2) * noise)
    error_R = (pixels * jnp.square(decoded - frames)).mean((1, 2, 3))
    kl_R = kl(mean, log_variance)
    each_R = error_R + config.kl_weight * kl_R
    average = lambda x: Weighted.of(jax.lax.stop_gradient(x), jnp.ones(num))
    return each_R.sum(), {
        'loss': average(each_R), 'frame_loss': average(error_R), 'kl': average(kl_R),
        'latent_mean': average(mean.mean((1, 2, 3))),
        'latent_mean_square': average(jnp.square(mean).mean((1, 2, 3)))}

  return loss
