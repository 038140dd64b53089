"""Compiles the weight sync of a ternary 2B4T policy for 256 v5e chips; prints a row of JSON."""

import json

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.sampling import weight_sync
from jaxrl_pt.tpu import chips

MODEL = cfg.Model(num_layers=30, d_model=2560, d_ff=6912, num_heads=20, num_kv_heads=5,
                  head_dim=128, vocab_size=128_256, quant=cfg.Quant('ternary', 'int8'))


def main() -> None:
  mesh = make_mesh(cfg.Mesh(fsdp=256), chips.topology_devices('v5e:16x16'))
  model = models.build(MODEL, cfg.Compute('bfloat16'), mesh)
  latent = jax.tree.map(
      lambda x, there: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there),
      P.abstract(model.specs), rules.param_shardings(model.specs, mesh))
  weight_sync.make_leave(model, mesh, True, jnp.bfloat16).lower(latent).compile()
  codes = 0
  for x, arrived in zip(
      jax.tree.leaves(weight_sync.abstract_leaving(model, mesh, True, jnp.bfloat16)),
      jax.tree.leaves(weight_sync.abstract(model, mesh, True, jnp.bfloat16)), strict=True):
    weight_sync.mover(arrived.sharding, arrived.dtype).lower(x).compile()
    codes += arrived.dtype == jnp.int2
  print(json.dumps({'codes': codes}))


if __name__ == '__main__':
  main()
