"""The device mesh, and nothing else that knows devices."""

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError

AXES = ('data', 'fsdp', 'tensor', 'context')


def make_mesh(config: cfg.Mesh, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A mesh over all devices (or those given) with Auto axis types.

  Raises:
    UserError: the axes do not multiply to the number of devices.
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
  # jax.make_mesh, but for slices that no axis fills, as tensor = 2 on 8×8×8.
  grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
