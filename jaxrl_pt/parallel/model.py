"""Builds models for a mesh."""

from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt.models import transformer, world
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.told import Shape
from jaxrl_pt.parallel import kernels, rules


def build(config: cfg.Model, compute: cfg.Compute, mesh: Mesh,
          table: rules.Rules = rules.TRAIN) -> Model:
  """The model, laid out over a mesh by a table of rules, with the kernels of the mesh's devices."""
  return transformer.build(config, compute, rules.make_constrain(mesh, table),
                           kernels.make_ops(mesh, table))


def build_world(config: cfg.DiT, shape: Shape, compute: cfg.Compute, mesh: Mesh
                ) -> world.World:
  """The model of a game, laid out over a mesh, with the kernels of the mesh's devices."""
  return world.build(config, shape, compute, rules.make_constrain(mesh), kernels.make_ops(mesh))
