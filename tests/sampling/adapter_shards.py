"""Child of test_shards.py: adapters on meshes of 8 fake CPU devices, printed as JSON.

One row for each mesh: the bytes that two weight syncs moved, whether what arrived is what was sent,
and the largest difference of a training step from that of one device.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.sampling import weight_sync
from jaxrl_pt.train import losses, optim
from jaxrl_pt.train import state as states
from jaxrl_pt.train.step import make_train_step
from jaxrl_pt.types import Batch

PLAIN = cfg.Model(num_layers=2, d_model=32, d_ff=64, num_heads=8, num_kv_heads=8, head_dim=4,
                  vocab_size=16, quant=cfg.Quant('ternary', 'int8'))
CONFIG = dataclasses.replace(PLAIN, adapter=cfg.LoRA(2, projections=('q_proj', 'down_proj')))
TOKENS = np.arange(64).reshape(8, 8) * 7 % 16


def one_step(mesh):
  """(model, state after a step) on a mesh."""
  model = models.build(CONFIG, cfg.Compute(), mesh)
  start = P.init(transformer.build(PLAIN).specs, jax.random.key(0))
  optimizer = optim.make_optimizer(cfg.AdamW(cfg.ConstantRate(0.01)), 9, model.specs)
  state = states.state_of(model, start, optimizer, states.abstract_state(model, optimizer, mesh))
  positions = np.broadcast_to(np.arange(8), TOKENS.shape)
  ones = np.ones_like(TOKENS)
  batch = Batch(*map(jnp.asarray, (TOKENS, (TOKENS + 3) % 16, positions, ones,
                                   ones.astype(np.float32), np.arange(8))))
  step = jax.jit(make_train_step(model.specs, losses.next_token(model, 0), optimizer,
                                 lambda step: 0.01), donate_argnums=0)
  for _ in range(2):
    state, _ = step(state, batch)
  return model, state


def main() -> None:
  _, alone = one_step(make_mesh(cfg.Mesh(fsdp=1), jax.devices()[:1]))
  for argument in sys.argv[1:]:
    data, fsdp, tensor = map(int, argument.split(','))
    mesh = make_mesh(cfg.Mesh(data, fsdp, tensor))
    model, state = one_step(mesh)
    own = P.trained(model.specs, state.params)
    difference = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(
        jax.tree.leaves(own), jax.tree.leaves(P.trained(model.specs, alone.params)), strict=True))
    sync = weight_sync.make_weight_sync(model, mesh, packed=True)
    first = sync(state.params, 0)
    moved = P.joined(state.params, jax.tree.map(lambda x: x + 1, own))
    second = sync(moved, 1)
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()),
                        (first.params, second.params), (state.params, moved))
    print(json.dumps({'first': first.num_bytes, 'second': second.num_bytes,
                      'all': P.num_bytes(model.specs),
                      'adapters': P.num_bytes(P.trained(model.specs, model.specs)),
                      'same': all(jax.tree.leaves(same)), 'difference': difference}))


if __name__ == '__main__':
  main()
