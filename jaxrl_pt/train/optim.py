"""Learning-rate and weight-decay schedules, and the optimiser made of optax parts.

All schedules are functions of the optimiser step, i32[] → f32[]. The two-stage
schedule is BitNet's (docs/methods/bitnet.md): both numbers of its "1.2e-3 → 8e-4" are
peaks of decays over the whole run, and the learning rate jumps from the first decay to the second.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.errors import UserError
from jaxrl_pt.types import Array

Schedule = Callable[[Any], Any]


def check_schedule(schedule: cfg.Schedule, num_steps: int) -> None:
  """Refuses a schedule whose warm-up is not over when its next phase begins.

  The learning rate would jump from the warm-up into the decay: with a warm-up of 900 steps and a
  decay over the last 200 of 1,000 steps it would lose half of its peak in ten steps.

  Args:
    schedule: the schedule's settings.
    num_steps: optimiser steps of the whole run.

  Raises:
    UserError: the warm-up and the next phase overlap.
  """
  name, warmup = type(schedule).__name__, schedule.warmup_steps
  match schedule:
    case cfg.ConstantRate():
      begins, what = num_steps, 'the run ends'
    case cfg.Cosine():
      begins, what = num_steps - 1, 'the decay has to begin'
    case cfg.WSD(decay_fraction=fraction):
      begins = num_steps - max(1, round(fraction * num_steps))
      what = 'the decay of the last WSD.decay_fraction begins'
    case cfg.TwoStage(switch_fraction=fraction):
      begins, what = round(fraction * num_steps), 'TwoStage.switch_fraction ends the first stage'
  if warmup > begins:
    raise UserError(
        f'{name}.warmup_steps = {warmup} goes on beyond step {begins} of {num_steps}, where '
        f'{what}: set a shorter warm-up, or make the run longer.')


def learning_rate(schedule: cfg.Schedule, num_steps: int) -> Schedule:
  """The learning rate of `schedule` over a run of `num_steps` optimiser steps.

  Raises:
    UserError: the warm-up and the phase after it overlap.
  """
  check_schedule(schedule, num_steps)
  match schedule:
    case cfg.ConstantRate(peak, warmup):
      after = optax.constant_schedule(peak)
    case cfg.Cosine(peak, end, warmup):
      after = _decay('cosine', peak, end, num_steps - warmup)
    case cfg.WSD(peak, end, warmup, decay_fraction):
      decay_steps = max(1, round(decay_fraction * num_steps))
      after = optax.join_schedules(
          [optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay_steps)],
          [num_steps - decay_steps - warmup])
    case cfg.TwoStage(peak, second_peak, end, warmup, switch_fraction, shape):
      first = _decay(shape, peak, end, num_steps - warmup)
      second = _decay(shape, second_peak, end, num_steps - warmup)
      switch = round(switch_fraction * num_steps) - warmup
      after = lambda step: jnp.where(step < switch, first(step), second(step))
  if schedule.warmup_steps == 0:
    return after
  # Step 0 has a learning rate above 0: peak · (step + 1) / W in a warm-up of W steps.
  warm_up = lambda step: peak * (step + 1) / schedule.warmup_steps
  return optax.join_schedules([warm_up, after], [schedule.warmup_steps])


def _decay(shape: str, peak: float, end: float, steps: int) -> Schedule:
  """A decay from `peak` to `end` over `steps` steps; `shape` is 'linear' or 'cosine'."""
  steps = max(1, steps)
  if shape == 'linear':
    return optax.linear_schedule(peak, end, steps)
  return optax.cosine_decay_schedule(peak, steps, alpha=end / peak if peak else 0.0)


def weight_decay(config: cfg.AdamW, num_steps: int) -> Schedule:
  """The weight decay: constant or rising along a cosine; 0 in TwoStage's second stage.

  2504.12285 says that the weight decay follows a cosine "reaching a peak of 0.1" in stage one;
  this code reads that as rising from 0 to the peak over that stage.
  """
  match config.schedule:
    case cfg.TwoStage(switch_fraction=fraction):
      switch = round(fraction * num_steps)
    case _:
      switch = num_steps

  def schedule(step: Any) -> Any:
    value: Any
    if config.weight_decay_shape == 'constant':
      value = config.weight_decay
    else:
      phase = jnp.minimum(step / max(1, switch), 1.0)
      value = config.weight_decay * 0.5 * (1 - jnp.cos(jnp.pi * phase))
    return jnp.where(step < switch, value, 0.0)

  return schedule


def make_optimizer(config: cfg.AdamW, num_steps: int, specs: Any) -> optax.GradientTransformation:
  """AdamW (1711.05101) behind a clip of the gradient's global norm.

  Args:
    config: the optimiser's settings.
    num_steps: optimiser steps of the whole run (`config.num_updates`).
    specs: the parameters' tree of ParamSpec, which says which of them are trained, and on which
      weight decay acts. The optimiser's own arguments are trees of the trained ones
      (`params.trained`).

  Raises:
    UserError: the warm-up and the phase after it overlap.
  """
  trained = P.trained(specs, specs)
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  return optax.chain(
      clip,
      optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
      optax.add_decayed_weights(
          weight_decay(config, num_steps),
          mask=P.map_specs(lambda spec: spec.is_decayed, trained)),
      optax.scale_by_learning_rate(learning_rate(config.schedule, num_steps)),
  )


def global_norm(tree: Any) -> Array:
  """f32[]: √Σ x² over all elements of all leaves."""
  return optax.tree.norm(tree)
