"""A whole run."""

import dataclasses
from dataclasses import dataclass, field
from typing import get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.data import Data
from jaxrl_pt.config.model import Compute, Mesh, Model
from jaxrl_pt.config.objectives import RL, RPT, NextToken, Objective
from jaxrl_pt.config.optimizer import AdamW
from jaxrl_pt.errors import UserError


@dataclass(frozen=True)
class Train:
  """Steps and cadence of the loop. batch_size counts sequences over all devices.

  accumulation: micro-batches a step; each holds batch_size / accumulation rows.
  eval_batches: validation batches a pass; 0 takes them all.
  """

  num_steps: int
  batch_size: int
  accumulation: int = 1
  log_every: int = 10
  eval_every: int = 100
  eval_batches: int = 16
  tensorboard: bool = True

  def __post_init__(self) -> None:
    for name in ('num_steps', 'batch_size', 'accumulation', 'log_every', 'eval_every'):
      checks.integer(self, name, 1)
    checks.integer(self, 'eval_batches', 0)
    checks.flag(self, 'tensorboard')
    if self.batch_size % self.accumulation:
      raise UserError(f'Train.batch_size = {self.batch_size} is not a multiple of '
                      f'Train.accumulation = {self.accumulation}: choose one that is.')


@dataclass(frozen=True)
class Checkpoint:
  """Asynchronous checkpoints: every `every` steps, the last `keep` of them, and for
  good those at multiples of `keep_every` (0 keeps none for good)."""

  every: int = 100
  keep: int = 3
  keep_every: int = 0

  def __post_init__(self) -> None:
    checks.integer(self, 'every', 1)
    checks.integer(self, 'keep', 1)
    checks.integer(self, 'keep_every', 0)


@dataclass(frozen=True)
class Run:
  """Everything that decides the numbers of one run. The work directory is not part of it."""

  seed: int
  model: Model
  data: Data
  objective: Objective
  optimizer: AdamW
  train: Train
  checkpoint: Checkpoint = field(default_factory=Checkpoint)
  mesh: Mesh = field(default_factory=Mesh)
  compute: Compute = field(default_factory=Compute)

  def __post_init__(self) -> None:
    checks.integer(self, 'seed', 0, 2**31 - 1)
    checks.instance(self, 'model', Model)
    checks.instance(self, 'data', Data)
    checks.instance(self, 'objective', *get_args(Objective))
    checks.instance(self, 'optimizer', AdamW)
    checks.instance(self, 'train', Train)
    checks.instance(self, 'checkpoint', Checkpoint)
    checks.instance(self, 'mesh', Mesh)
    checks.instance(self, 'compute', Compute)
    match self.objective:
      case NextToken(int4_from=fraction) if fraction < 1 and self.model.quant.weights == 'none':
        raise UserError('NextToken.int4_from < 1 switches BitLinear activations: set '
                        "Quant.weights = 'ternary' too.")
      case RPT(rollouts=rollouts, algorithm=algorithm) | RL(rollouts=rollouts,
                                                            algorithm=algorithm):
        rows, parts = rollouts.num_prompts // algorithm.minibatches, self.train.accumulation
        if rows % parts:
          raise UserError(f'Train.accumulation = {parts} does not divide the {rows} prompts of an '
                          'update (Rollouts.num_prompts / Algorithm.minibatches): change one.')
      case _:
        pass
    match self.objective:
      case RPT(positions_per_document=shared) if shared > 1 and self.train.accumulation > 1:
        raise UserError(f'RPT.positions_per_document = {shared} keeps prompts together that '
                        f'Train.accumulation = {self.train.accumulation} would part: set one of '
                        'them to 1.')


def model_at(run: Run, step: int) -> Model:
  """The model of optimiser step `step`: activations are int4 from `int4_from` on."""
  match run.objective:
    case NextToken(int4_from=fraction) if step >= round(fraction * run.train.num_steps):
      if fraction < 1.0:
        quant = dataclasses.replace(run.model.quant, activations='int4')
        return dataclasses.replace(run.model, quant=quant)
  return run.model
