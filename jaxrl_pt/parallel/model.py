"""Builds the model for a mesh."""

from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt.models import transformer
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import kernels, rules


def build(config: cfg.Model, compute: cfg.Compute, mesh: Mesh,
          table: rules.Rules = rules.TRAIN) -> Model:
  """The model, laid out over a mesh by a table of rules, with the kernels of the mesh's devices."""
  return transformer.build(config, compute, rules.make_constrain(mesh, table),
                           kernels.make_ops(mesh, table))
