"""The rates of each TPU generation, and the devices of topologies by name.

Rates and capacities come from JAX's table (`get_tpu_info_for_chip`). Clocks turn seconds into the
cycles that schedules count: those of v4, v5e and v5p follow from the peak rate and the width of the
MXU, and those of v6e and tpu7x are assumptions.
"""

from dataclasses import dataclass
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from jaxrl_pt.errors import UserError
from pallas_kernels.dispatch import Generation
from pallas_kernels.tuning import Cost, Operand

# Bytes per second that a chip sends over all links of the inter-chip interconnect (Google Cloud's
# system-architecture pages).
_ICI = {'v4': 300e9, 'v5e': 200e9, 'v5p': 600e9, 'v6e': 448e9, 'tpu7x': 1200e9}
_CLOCK_HZ = {'v4': 1.05e9, 'v5e': 1.5e9, 'v5p': 1.75e9, 'v6e': 1.75e9, 'tpu7x': 2.2e9}
_VERSION = {'v4': pltpu.ChipVersion.TPU_V4, 'v5e': pltpu.ChipVersion.TPU_V5E,
            'v5p': pltpu.ChipVersion.TPU_V5P, 'v6e': pltpu.ChipVersion.TPU_V6E,
            'tpu7x': pltpu.ChipVersion.TPU_7X}


@dataclass(frozen=True)
class Chip:
  """A device as JAX counts them: a chip, or on tpu7x one of its two cores.

  num_cores: the cores that one program is split over; v4 and v5p have two.
  macs_per_second: multiply-adds on the MXUs by operand type; 0 where there is no such unit.
  """

  generation: Generation
  num_cores: int
  clock_hz: float
  macs_per_second: dict[Operand, float]
  hbm_bytes: int
  hbm_bytes_per_second: float
  vmem_bytes: int
  ici_bytes_per_second: float

  def mxu_cycles(self, cost: Cost) -> float:
    """The cycles that the multiply-adds take at the peak rates, with all cores busy."""
    return sum(n / self.macs_per_second[kind] * self.clock_hz
               for kind, n in cost.multiply_adds.items())

  def hbm_cycles(self, num_bytes: float) -> float:
    return num_bytes / self.hbm_bytes_per_second * self.clock_hz


def chip(generation: Generation) -> Chip:
  """The device of a TPU generation."""
  num_cores = 2 if generation in ('v4', 'v5p') else 1
  info = pltpu.get_tpu_info_for_chip(_VERSION[generation], num_cores)
  rates: dict[Operand, float] = {
      'bf16': info.bf16_ops_per_second, 'int8': info.int8_ops_per_second,
      'int4': info.int4_ops_per_second, 'fp8': info.fp8_ops_per_second}
  shared = 2 if generation == 'tpu7x' else 1  # The links belong to the chip's two devices.
  return Chip(generation, num_cores, _CLOCK_HZ[generation],
              {kind: rate * num_cores / 2 for kind, rate in rates.items()},
              info.hbm_capacity_bytes * num_cores, info.mem_bw_bytes_per_second * num_cores,
              info.vmem_capacity_bytes, _ICI[generation] / shared)


def generation_of_topology(topology: str) -> Generation:
  """The generation in the name of a topology: 'v5e' for 'v5e:16x16'.

  Raises:
    UserError: the name is not of the form generation:shape.
  """
  generation, _, shape = topology.partition(':')
  sizes = shape.split('x')
  if generation not in _VERSION or not all(s.isdigit() and int(s) for s in sizes):
    raise UserError(f'{topology!r} is no TPU topology: write one of v4:2x2x1, v5e:2x2, '
                    'v5e:16x16, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1 (generation:shape).')
  want = 2 if generation in ('v5e', 'v6e') else 3
  if len(sizes) != want:
    raise UserError(f'{topology!r}: a {generation} slice has {want} dimensions, e.g. '
                    f'{generation}:{"x".join("2" * want)}.')
  return generation  # type: ignore[return-value]  # Just checked.


def topology_devices(topology: str, slices: int = 1) -> list[Any]:
  """The devices of a topology, as targets of compilation; only child processes can ask for them.

  Args:
    topology: the topology of a slice.
    slices: the number of slices.

  Raises:
    UserError: the compiler knows no such topology.
  """
  from jax.experimental import topologies
  # On machines a v4 chip is one device of two cores, which is not libtpu's default here.
  options: dict[str, Any] = {'chip_config_name': 'megacore'} if topology[:3] == 'v4:' else {}
  if set(topology.partition(':')[2]) == {'1', 'x'}:  # A host has four chips by default.
    options['chips_per_host_bounds'] = (1, 1, 1)
  if slices > 1:
    options['num_slices'] = slices
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=topology,
                                             **options).devices)
  except Exception as e:  # Whatever libtpu raises, its first line says what is wrong.
    raise UserError(f'libtpu has no topology {topology!r} ({str(e).splitlines()[0][:200]}): '
                    'choose another slice shape.') from e
