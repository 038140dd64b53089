"""Sharding as data: tables from logical axis names to mesh axes.

Parameters and activations name their dimensions, and a table says over which mesh axes each name
is split. Training and sampling have a table each.
"""

from collections.abc import Mapping
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Constrain
from jaxrl_pt.params import map_specs
from jaxrl_pt.types import Array, Batch

Rules = Mapping[str, tuple[str, ...]]

TRAIN: Rules = {
    'batch': ('data', 'fsdp'),
    'sequence': ('context',),
    'vocab': ('tensor',),
    'embed': ('fsdp',),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'ff': ('tensor',),
    'layers': (),
    'norm': (),
    'rank': (),
    'whole': (),
}

# A sampler has its weights whole along `embed`, so that no small product waits for a gather.
SAMPLE: Rules = {**TRAIN, 'embed': (), 'sequence': ()}

# A sampler's shard, inside a `shard_map` over data and fsdp: its rows are all there are.
SHARD: Rules = {**SAMPLE, 'batch': ()}
ROWS = 'data', 'fsdp'  # The mesh axes that such a `shard_map` takes apart.


def num_shards(mesh: Mesh | None) -> int:
  """The number of shards of the data, each of which has a sampler of its own."""
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def partition_spec(axes: tuple[str | None, ...], rules: Rules) -> PartitionSpec:
  """The PartitionSpec of an array whose dimensions have these logical names.

  Raises:
    ValueError: two dimensions of one array claim the same mesh axis.
  """
  used: list[str] = []
  entries: list[tuple[str, ...] | None] = []
  for axis in axes:
    mesh_axes = () if axis is None else rules[axis]
    used.extend(mesh_axes)
    entries.append(mesh_axes or None)
  if len(set(used)) != len(used):
    raise ValueError(f'logical axes {axes} use a mesh axis twice: {used}')
  return PartitionSpec(*entries)


def param_shardings(specs: Any, mesh: Mesh, rules: Rules = TRAIN) -> Any:
  """The NamedSharding of every ParamSpec."""
  return map_specs(lambda s: NamedSharding(mesh, partition_spec(s.axes, rules)), specs)


def batch_sharding(mesh: Mesh, rules: Rules = TRAIN) -> Batch:
  """The NamedShardings of a Batch's fields."""
  rows = NamedSharding(mesh, partition_spec(('batch', 'sequence'), rules))
  ids = NamedSharding(mesh, partition_spec(('batch',), rules))
  return Batch(rows, rows, rows, rows, rows, ids)  # type: ignore[arg-type]  # A tree like Batch.


def row_sharding(mesh: Mesh, rules: Rules = TRAIN) -> NamedSharding:
  """The NamedSharding of an array whose first axis is rows, which data and fsdp split."""
  return NamedSharding(mesh, partition_spec(('batch',), rules))


def whole_rows(mesh: Mesh, num_rows: int) -> int:
  """The least number of rows, at least `num_rows`, that `row_sharding` splits evenly."""
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  return -(-num_rows // parts) * parts


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def make_constrain(mesh: Mesh, rules: Rules = TRAIN) -> Constrain:
  """The function by which a model constrains its activations; the identity on a single device.

  With the rules SHARD it may only be called inside a `shard_map` over the axes ROWS of the mesh.
  """
  if mesh.size == 1:
    return lambda x, axes: x

  def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
    spec = partition_spec(axes, rules)
    # Inside, the mesh of the context is another one, in which the axes ROWS are manual.
    sharding = spec if rules is SHARD else NamedSharding(mesh, spec)
    return jax.lax.with_sharding_constraint(x, sharding)

  return constrain


def check_divides(run: cfg.Run, mesh: Mesh) -> None:
  """Checks that the mesh axes divide every size that they split.

  Raises:
    UserError: an axis does not divide a size; the message names both.
  """
  tensor, fsdp = mesh.shape['tensor'], mesh.shape['fsdp']
  rows = run.train.batch_size // run.train.accumulation
  batch = 'data × fsdp', num_shards(mesh)
  prompts: tuple[tuple[str, int, str, int], ...] = ()
  rollouts, algorithm = run.objective.rollouts, run.objective.algorithm
  if rollouts is not None and algorithm is not None:
    at_once = (rollouts.num_prompts // algorithm.minibatches * run.train.group_parts
               // run.train.accumulation)
    prompts = (('Rollouts.num_prompts', rollouts.num_prompts, *batch),
               ('Rollouts.num_prompts / Algorithm.minibatches × Train.group_parts / '
                'Train.accumulation', at_once, *batch))
    shared = run.objective.positions_per_document
    if shared > 1:
      name = f'{type(run.objective).__name__}.positions_per_document'
      prompts += ((f'Rollouts.num_prompts / {name}', rollouts.num_prompts // shared, *batch),)
  name = type(run.model).__name__
  for what, size, axis, parts in (
      *(() if isinstance(run.model, (cfg.VAE, cfg.GamePolicy)) else (
          (f'{name}.num_heads', run.model.num_heads, 'tensor', tensor),
          (f'{name}.d_ff', run.model.d_ff, 'tensor', tensor),
          (f'{name}.d_model', run.model.d_model, 'fsdp', fsdp))),
      *(_of_text(run, mesh) if isinstance(run.model, cfg.Model) else ()),
      ('Train.batch_size / Train.accumulation', rows, *batch),
      *prompts,
  ):
    if size % parts:
      raise UserError(f'Mesh axis {axis} = {parts} does not divide {what} = {size}: change one '
                      'of them.')


def _of_text(run: cfg.Run, mesh: Mesh) -> tuple[tuple[str, int, str, int], ...]:
  """Sizes that only a language model splits, as `check_divides` lists them."""
  tensor = 'tensor', mesh.shape['tensor']
  return (('Model.num_kv_heads', run.model.num_kv_heads, *tensor),
          ('Model.vocab_size', run.model.vocab_size, *tensor),
          ('Data.seq_len', run.data.seq_len, 'context', mesh.shape['context']))


def check_compiles(model: cfg.Model | cfg.DiT | cfg.VAE | cfg.GamePolicy, platform: str) -> None:
  """Checks that the compiler of the devices takes a training step of the model.

  Args:
    model: the policy's model.
    platform: what the devices are, as JAX names it, e.g. 'tpu'.

  Raises:
    UserError: it does not take it.
  """
  # Layers are slices of a stack of codes, and XLA for TPUs loses the type of a slice of two bits:
  # "Call parameter must match argument; got parameter s2, argument s8", or "Failed to get shape".
  if not isinstance(model, cfg.Model):
    return
  if platform == 'tpu' and model.quant.is_ternary and isinstance(model.adapter, cfg.LoRA):
    raise UserError(
        f"Model.adapter = LoRA over Quant.weights = '{model.quant.weights}' does not train on "
        'TPUs, whose compiler takes no training step over a frozen base of two bits: train all '
        'parameters (Model.adapter = @cfg.NoAdapter()), or the adapters on CPUs or GPUs.')
