"""The ways between a frame x and noise ε, as functions of the noise level t from 0 (x) to 1 (ε).

    x_t = α x + σ ε

    Flow, Shortcut     α = 1 − t, σ = t          velocity dx_t/dt = ε − x
    VDiffusion         α = √ᾱ, σ = √(1 − ᾱ)      v = α ε − σ x

ᾱ falls along a sigmoid over `num_levels` levels (2212.11972 with start −3, end 3, τ 1, as the code
of PlayGen, 2412.00887, has it), and level n of N is t = n / N. A network says one of three things:
the frame, the velocity or v. `split` makes frame and noise of any of them, and `step` goes from one
level to a lower one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.types import Array


@functools.cache
def alpha_bars(num_levels: int) -> np.ndarray:
  """f32[N + 1]: ᾱ of levels 0 … N; 1 at level 0, and above 0 at level N."""
  start, end = -3.0, 3.0
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  at = np.linspace(0.0, 1.0, num_levels + 1)
  raw = (sigmoid(end) - sigmoid(at * (end - start) + start)) / (sigmoid(end) - sigmoid(start))
  betas = np.clip(1 - raw[1:] / raw[:-1], 0.0, 0.999)
  return np.concatenate([[1.0], np.cumprod(1 - betas)]).astype(np.float32)


def _alpha_bar(process: cfg.VDiffusion, time: Array) -> Array:
  level = jnp.round(time * process.num_levels).astype(jnp.int32)
  return jnp.asarray(alpha_bars(process.num_levels))[level]


def coefficients(process: cfg.Process, time: Array) -> tuple[Array, Array]:
  """α and σ at these noise levels, f32[...] each."""
  match process:
    case cfg.VDiffusion():
      alpha_bar = _alpha_bar(process, time)
      return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
    case _:
      return 1 - time, time


def signal_to_noise(process: cfg.VDiffusion, time: Array) -> Array:
  """ᾱ / (1 − ᾱ), f32[...]; time is above 0."""
  alpha_bar = _alpha_bar(process, time)
  return alpha_bar / (1 - alpha_bar)


def draw_times(process: cfg.Process, key: Array, shape: tuple[int, ...] = ()) -> Array:
  """f32[shape]: noise levels to learn at, each as likely as another but for `Flow.shift`."""
  match process:
    case cfg.VDiffusion(num_levels=number):
      return jax.random.randint(key, shape, 1, number + 1) / number
    case cfg.Flow(shift=shift):
      return _shifted(jax.random.uniform(key, shape), shift)
    case _:
      return jax.random.uniform(key, shape)


def _shifted(at: Any, shift: float) -> Any:
  """s t / (1 + (s − 1) t), which keeps 0 and 1."""
  return shift * at / (1 + (shift - 1) * at)


def _beside(time_B: Array, x: Array) -> Array:
  return time_B.reshape(time_B.shape + (1,) * (x.ndim - time_B.ndim))


def noised(process: cfg.Process, frame: Array, noise: Array, time_B: Array) -> Array:
  """x_t, f32[B, ...], of frames and noise of that shape at the levels f32[B]."""
  alpha, sigma = coefficients(process, _beside(time_B, frame))
  return alpha * frame + sigma * noise


def target(process: cfg.Process, frame: Array, noise: Array, time_B: Array) -> Array:
  """f32[B, ...]: what the network is to say at x_t."""
  match process:
    case cfg.Flow(prediction='x0'):
      return frame
    case cfg.VDiffusion():
      alpha, sigma = coefficients(process, _beside(time_B, frame))
      return alpha * noise - sigma * frame
    case _:
      return noise - frame


def split(process: cfg.Process, said: Array, x_t: Array, time_B: Array) -> tuple[Array, Array]:
  """The frame and the noise, f32[B, ...] each, that the network says x_t is made of.

  Args:
    process: the process.
    said: f32[B, ...] what the network says at x_t.
    x_t: f32[B, ...].
    time_B: f32[B], above 0.
  """
  time = _beside(time_B, x_t)
  alpha, sigma = coefficients(process, time)
  match process:
    case cfg.Flow(prediction='x0'):
      return said, (x_t - alpha * said) / sigma
    case cfg.VDiffusion():
      return alpha * x_t - sigma * said, sigma * x_t + alpha * said
    case _:
      return x_t - sigma * said, x_t + alpha * said


def step(process: cfg.Process, said: Array, x_t: Array, time_B: Array, next_B: Array) -> Array:
  """From x_t to a lower noise level: an Euler step of a flow, a DDIM step with η = 0 of diffusion.

    Euler  x_s = x_t + (s − t) (ε − x)      DDIM  x_s = α_s x + σ_s ε

  with x and ε as the network says (2010.02502 equation 12).

  Args:
    process: the process.
    said: f32[B, ...] what the network says at x_t.
    x_t: f32[B, ...].
    time_B: f32[B], above 0.
    next_B: f32[B], s.
  """
  frame, noise = split(process, said, x_t, time_B)
  match process:
    case cfg.VDiffusion():
      return noised(process, frame, noise, next_B)
    case _:
      return x_t + _beside(next_B - time_B, x_t) * (noise - frame)


def times(process: cfg.Process, num_steps: int) -> np.ndarray:
  """f32[num_steps + 1]: the noise levels of a sampler, from 1 to 0.

  Those of VDiffusion are levels; the steps between them are as even as whole levels are.
  """
  at = np.linspace(1.0, 0.0, num_steps + 1)
  match process:
    case cfg.Flow(sampling_shift=shift):
      at = _shifted(at, shift)
    case cfg.VDiffusion(num_levels=number):
      at = np.round(at * number) / number
  return at.astype(np.float32)


def step_index(process: cfg.Process, num_steps: int) -> int:
  """The index of a step size of 1 / num_steps, as shortcut models are told it; 0 for others.

  Raises:
    ValueError: a shortcut model takes 1, 2, 4, … steps.
  """
  if not isinstance(process, cfg.Shortcut):
    return 0
  if num_steps & (num_steps - 1):
    raise ValueError(f'a shortcut model takes 1, 2, 4, 8 … steps, not {num_steps}')
  return num_steps.bit_length() - 1
