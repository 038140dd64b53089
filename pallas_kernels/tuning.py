"""What the tuner, the static report and the compile tests know of a kernel call.

Each kernel's `arg_specs.cases(generation)` lists its `Case`s: the call, the abstract
arguments, the arithmetic and the bytes that bound it, and what it is compared with. Chosen
block sizes are data, in `<kernel>/tuned/<generation>.json`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

Operand = Literal['bf16', 'int8', 'int4', 'fp8']


@dataclass(frozen=True)
class Cost:
  """What bounds a call from below.

  multiply_adds: on the MXU, by operand type.
  hbm_bytes: bytes read and written, refetched blocks counted each time.
  """

  multiply_adds: Mapping[Operand, int]
  hbm_bytes: int


@dataclass(frozen=True)
class Call:
  """A function of abstract arguments, and its cost.

  dynamic_trips: how often a loop runs whose bound only the data decide, in order of the
    schedule, where the kernel has such loops.
  """

  run: Callable[..., Any]
  args: tuple[Any, ...]  # of jax.ShapeDtypeStruct
  cost: Cost
  dynamic_trips: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
  """One row of the static report: a kernel at one shape, and its alternatives.

  kernel, variant, activations, shape: the row's labels ('' where one does not apply).
  minimum_bytes: operands and results once each: what any implementation must move.
  alternatives: by name, e.g. 'xla_bf16' and 'xla_int8'.
  """

  kernel: str
  variant: str
  activations: str
  shape: str
  call: Call
  minimum_bytes: int
  alternatives: Mapping[str, Call] = field(default_factory=dict)

  @property
  def name(self) -> str:
    return ' '.join(x for x in (self.kernel, self.variant, self.activations, self.shape) if x)


def num_bytes(*arrays: Any) -> int:
  """Bytes of arrays in HBM; 2- and 4-bit integers packed."""
  return sum(math.ceil(math.prod(x.shape) * jax.dtypes.itemsize_bits(x.dtype) / 8)
             for x in arrays)


def moved_bytes(grid: Sequence[int], block: Sequence[int], dtype: Any,
                index_map: Callable[..., Sequence[int]]) -> int:
  """Bytes that a pipelined grid moves for one operand: a block each time its index changes."""
  indices = (tuple(index_map(*step)) for step in itertools.product(*map(range, grid)))
  changes = sum(1 for _ in itertools.groupby(indices))
  return changes * num_bytes(jax.ShapeDtypeStruct(tuple(block), jnp.dtype(dtype)))


@functools.cache
def tuned(folder: Path, generation: str) -> Mapping[str, Any]:
  """The tuner's choices for a generation: by the call's key; empty where it never ran."""
  path = folder / 'tuned' / f'{generation}.json'
  return json.loads(path.read_text()) if path.is_file() else {}
