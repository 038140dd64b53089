"""The roofline of a step, from the arithmetic of the traced program and the compiled one's bytes.

    seconds ≥ max(MXU, HBM, ICI),  MXU = Σ_kind multiply-adds / rate of this operand type

Multiply-adds are counted in the traced program, which still has all products, with the trips of its
loops; recomputation under `jax.checkpoint` counts, and elementwise work does not. This is a static
prediction with perfect overlap, no latency and every unit at its peak.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
import math
from typing import Any

import jax
from jax.extend import core

from jaxrl_pt.tpu import hlo
from jaxrl_pt.tpu.chips import Chip
from pallas_kernels.tuning import Operand

MultiplyAdds = Counter[Operand]


@dataclass(frozen=True)
class Roofline:
  """The least seconds of a step by unit, and the unit that bounds the step."""

  mxu: float
  hbm: float
  ici: float

  @property
  def seconds(self) -> float:
    return max(self.mxu, self.hbm, self.ici)

  @property
  def bound(self) -> str:
    return max(('mxu', 'hbm', 'ici'), key=lambda name: getattr(self, name))


def estimate(chip: Chip, multiply_adds: MultiplyAdds, hbm_bytes: float,
             wire_bytes: float) -> Roofline:
  """The roofline of one device.

  Args:
    chip: the rates of the device.
    multiply_adds: the multiply-adds of the device, by operand type.
    hbm_bytes: the bytes that it reads from and writes to HBM.
    wire_bytes: the bytes that it sends over all its links.
  """
  mxu = sum(n / _rate(chip, kind) for kind, n in multiply_adds.items())
  return Roofline(mxu, hbm_bytes / chip.hbm_bytes_per_second,
                  wire_bytes / chip.ici_bytes_per_second)


def _rate(chip: Chip, kind: Operand) -> float:
  """Multiply-adds per second of an operand type, or of the next wider one that the MXU has."""
  wider: dict[Operand, Operand] = {'int4': 'int8', 'int8': 'bf16', 'fp8': 'bf16'}
  while not chip.macs_per_second[kind]:
    kind = wider[kind]
  return chip.macs_per_second[kind]


# --- Counting -------------------------------------------------------------------------


def multiply_adds(jaxpr: core.Jaxpr, times: int = 1) -> MultiplyAdds:
  """Multiply-adds of all products in a traced program, over all devices, by operand type."""
  total: MultiplyAdds = Counter()
  for eqn in jaxpr.eqns:
    match eqn.primitive.name:
      case 'dot_general':
        total[_kind(eqn)] += times * _dot(eqn)
      case 'conv_general_dilated':
        total[_kind(eqn)] += times * _convolution(eqn)
      case 'cond':
        total += _largest([multiply_adds(b.jaxpr, times) for b in eqn.params['branches']])
      case name:
        in_all = hlo.in_all(str(eqn.source_info.name_stack)) if name == 'while' else None
        repeats = times * _repeats(name, eqn) if in_all is None else in_all
        for program in inner(eqn):
          count = multiply_adds(program, repeats)
          total += _causal(count, eqn) if _is_splash(name, eqn) else count
  return total


def _largest(branches: list[MultiplyAdds]) -> MultiplyAdds:
  return max(branches, key=lambda count: count.total())


def _kind(eqn: Any) -> Operand:
  """The operand type that the MXU multiplies; float32 products are made of bf16 ones."""
  bits = max(jax.dtypes.itemsize_bits(v.aval.dtype) for v in eqn.invars)
  if not all(jax.numpy.issubdtype(v.aval.dtype, jax.numpy.integer) for v in eqn.invars):
    return 'fp8' if bits == 8 else 'bf16'
  return 'int4' if bits <= 4 else 'int8' if bits == 8 else 'bf16'


def _dot(eqn: Any) -> int:
  (contracted, _), _ = eqn.params['dimension_numbers']
  left = eqn.invars[0].aval.shape
  return math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(eqn: Any) -> int:
  kernel, numbers = eqn.invars[1].aval.shape, eqn.params['dimension_numbers']
  return math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]


def _repeats(name: str, eqn: Any) -> int:
  """How often an equation runs the program inside it."""
  match name:
    case 'scan':
      return eqn.params['length']
    case 'while':
      return _most_trips(eqn)
    case 'shard_map':  # The shapes inside are those of one device.
      mesh = eqn.params['mesh']
      return math.prod(mesh.shape[axis] for axis in eqn.params['newly_manual_axes'])
    case 'pallas_call':
      return math.prod(n for n in eqn.params['grid_mapping'].grid if isinstance(n, int))
  return 1


def _is_splash(name: str, eqn: Any) -> bool:
  """Whether it is JAX's splash attention, which skips the blocks that its mask hides."""
  return name == 'pallas_call' and (eqn.params['name'] or '').startswith('splash_')


def _causal(count: MultiplyAdds, eqn: Any) -> MultiplyAdds:
  """The part of the count of n × n blocks on or below the diagonal; n is the grid's last size."""
  blocks = eqn.params['grid_mapping'].grid[-1]
  return Counter({kind: n * (blocks + 1) // (2 * blocks) for kind, n in count.items()})


def _most_trips(eqn: Any) -> int:
  """The largest constant that a loop's condition compares with; 1 if there is none."""
  bounds = [v.val for e in eqn.params['cond_jaxpr'].jaxpr.eqns if e.primitive.name == 'lt'
            for v in e.invars if isinstance(v, core.Literal)]
  return max((int(b) for b in bounds), default=1)


def inner(eqn: Any) -> Iterator[core.Jaxpr]:
  """The programs inside an equation."""
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item
