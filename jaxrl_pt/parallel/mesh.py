"""The device mesh."""

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError

AXES = ('data', 'fsdp', 'tensor', 'context')


def make_mesh(config: cfg.Mesh, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A mesh over all devices, or the given ones, with Auto axis types.

  Slices are connected by a slow network. Where there are several, the axis `data` spans as many of
  them as it can, then `fsdp`, while `tensor` and `context` stay inside each slice.

  Raises:
    UserError: the product of the axes is not the number of devices, or data × fsdp cannot span
      the slices.
  """
  devices = list(devices if devices is not None else jax.devices())
  fixed = config.data * config.tensor * config.context
  fsdp = config.fsdp or max(1, len(devices) // fixed)
  shape = (config.data, fsdp, config.tensor, config.context)
  if int(np.prod(shape)) != len(devices):
    raise UserError(
        f'Mesh data={config.data} × fsdp={config.fsdp or "(what is left)"} × '
        f'tensor={config.tensor} × context={config.context} does not cover the '
        f'{len(devices)} devices present: choose axes whose product is {len(devices)}, or '
        'fsdp = 0 with the others dividing it.')
  between = _between_slices(shape, _num_slices(devices))
  inside = tuple(size // parts for size, parts in zip(shape, between, strict=True))
  # This is `jax.make_mesh`, but also for slices whose physical axes no mesh axis fills, such as
  # tensor = 2 on 8×8×8.
  if max(between) > 1:
    grid = mesh_utils.create_hybrid_device_mesh(inside, between, devices,
                                                allow_split_physical_axes=True)
  else:
    grid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shard_meshes(mesh: jax.sharding.Mesh) -> list[jax.sharding.Mesh]:
  """A mesh of its own for each shard of the data, in the order in which the shards' rows stand.

  It has the devices of one coordinate of data and fsdp, whose axes have one part each.
  """
  num_data, num_fsdp = mesh.shape['data'], mesh.shape['fsdp']
  return [jax.sharding.Mesh(mesh.devices[d:d + 1, f:f + 1], AXES, axis_types=mesh.axis_types)
          for d in range(num_data) for f in range(num_fsdp)]


def _num_slices(devices: list[jax.Device]) -> int:
  # A device has a slice_index only in jobs of several slices.
  return len({getattr(device, 'slice_index', 0) for device in devices})


def _between_slices(shape: tuple[int, int, int, int], num_slices: int
                    ) -> tuple[int, int, int, int]:
  """How many slices each axis spans.

  Raises:
    UserError: data × fsdp cannot be split into the slices.
  """
  data, fsdp, _, _ = shape
  over_data = math.gcd(data, num_slices)
  over_fsdp = num_slices // over_data
  if fsdp % over_fsdp:
    raise UserError(f'Mesh data={data} × fsdp={fsdp} cannot span {num_slices} slices, and tensor '
                    f'and context stay inside each: set Mesh.data = {num_slices}, or make it a '
                    'multiple of that.')
  return over_data, over_fsdp, 1, 1
