"""What the children that compile for one chip share."""

import functools

import jax
import numpy as np

from jaxrl_pt.parallel.mesh import AXES
from jaxrl_pt.tpu import chips


def one_chip(topology):
  """A mesh of one chip of a topology, and place(tree) → its ShapeDtypeStructs there."""
  device = chips.topology_devices(topology)[0]
  mesh = jax.sharding.Mesh(np.array([device]).reshape(1, 1, 1, 1), AXES)
  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return mesh, functools.partial(
      jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here))
