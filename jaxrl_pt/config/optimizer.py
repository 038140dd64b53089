"""The optimiser and the schedules of its learning rate, which count optimiser steps."""

from dataclasses import dataclass
from typing import Literal, get_args

from jaxrl_pt.config import checks


@dataclass(frozen=True)
class ConstantRate:
  """Linear warm-up, then a constant learning rate."""

  learning_rate: float
  warmup_steps: int = 0

  def __post_init__(self) -> None:
    checks.positive(self, 'learning_rate')
    checks.integer(self, 'warmup_steps', 0)


@dataclass(frozen=True)
class Cosine:
  """Linear warm-up to `peak_rate`, then cosine decay to `end_rate` at the last step."""

  peak_rate: float
  end_rate: float = 0.0
  warmup_steps: int = 0

  def __post_init__(self) -> None:
    checks.positive(self, 'peak_rate')
    checks.number(self, 'end_rate', 0.0)
    checks.integer(self, 'warmup_steps', 0)


@dataclass(frozen=True)
class WSD:
  """Linear warm-up to `peak_rate`, which stays until a linear decay to `end_rate` over the last
  `decay_fraction` of the run."""

  peak_rate: float
  end_rate: float = 0.0
  warmup_steps: int = 0
  decay_fraction: float = 0.2

  def __post_init__(self) -> None:
    checks.positive(self, 'peak_rate')
    checks.number(self, 'end_rate', 0.0)
    checks.integer(self, 'warmup_steps', 0)
    checks.number(self, 'decay_fraction', 0.0, 1.0)


@dataclass(frozen=True)
class TwoStage:
  """BitNet's two stages (docs/methods/bitnet.md).

  Up to `switch_fraction` of the run the learning rate decays from `peak_rate`, as if over the whole
  run. Afterwards it is the tail of the schedule that would have decayed from `second_peak_rate`
  over the whole run. Weight decay is on before the switch and exactly 0 after it.

  shape: 'linear' is the decay of BitNet v2, 'cosine' that of BitNet b1.58 2B4T.
  """

  peak_rate: float
  second_peak_rate: float
  end_rate: float = 0.0
  warmup_steps: int = 0
  switch_fraction: float = 0.5
  shape: Literal['linear', 'cosine'] = 'linear'

  def __post_init__(self) -> None:
    for name in ('peak_rate', 'second_peak_rate'):
      checks.positive(self, name)
    checks.number(self, 'end_rate', 0.0)
    checks.integer(self, 'warmup_steps', 0)
    checks.number(self, 'switch_fraction', 0.0, 1.0)
    checks.choice(self, 'shape', Literal['linear', 'cosine'])


Schedule = ConstantRate | Cosine | WSD | TwoStage


@dataclass(frozen=True)
class AdamW:
  """optax's AdamW after a clip of the global gradient norm.

  Weight decay acts on matrices only, not on embeddings and norms.

  weight_decay_shape: 'constant', or 'cosine' for a weight decay that rises to `weight_decay` over
    the first stage, as in BitNet b1.58 2B4T. With either, TwoStage sets it to 0 in its second
    stage.
  clip_norm: the largest global norm of the gradient; 0 switches the clip off.
  """

  schedule: Schedule
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  weight_decay_shape: Literal['constant', 'cosine'] = 'constant'
  clip_norm: float = 1.0

  def __post_init__(self) -> None:
    checks.instance(self, 'schedule', *get_args(Schedule))
    checks.below_one(self, 'b1')
    checks.below_one(self, 'b2')
    # With eps = 0 a weight that has had no gradient yet would move by 0 / 0.
    checks.positive(self, 'eps', 1e-30)
    checks.number(self, 'weight_decay', 0.0)
    checks.choice(self, 'weight_decay_shape', Literal['constant', 'cosine'])
    checks.number(self, 'clip_norm', 0.0)
