"""Child of test_parallel.py: prints, as JSON, what 8 fake CPU devices compute."""

import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.models.logprobs import token_logprobs
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.types import Batch

ROWS, LENGTH = 8, 16
QUANTS = {'plain': cfg.Quant(), 'w158a8': cfg.Quant('ternary', 'int8')}


def config_of(quant):
  return cfg.Model(num_layers=2, d_model=32, d_ff=64, num_heads=8, num_kv_heads=8, head_dim=4,
                   vocab_size=64, activation='relu2', sub_norm=True, quant=quant)


def make_batch():
  random = np.random.default_rng(0)
  tokens = random.integers(0, 64, (ROWS, LENGTH + 1)).astype(np.int32)
  positions = np.tile(np.r_[np.arange(10), np.arange(6)], (ROWS, 1)).astype(np.int32)
  segments = np.tile([1] * 10 + [2] * 6, (ROWS, 1)).astype(np.int32)
  weights = np.ones((ROWS, LENGTH), np.float32)
  return Batch(tokens[:, :-1], tokens[:, 1:], positions, segments, weights,
               np.arange(ROWS, dtype=np.int32))


def loss_and_norm(model, mesh):
  """jitted (params, batch) → loss and gradient norm."""
  def loss(params, batch):
    hidden = model.apply(params, batch.tokens, batch.positions, batch.segments)
    scores = token_logprobs(hidden, model.head(params), batch.targets)
    return -(scores.logp * batch.weights).sum() / batch.weights.sum()

  def both(params, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    return value, jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))

  return jax.jit(both, in_shardings=(rules.param_shardings(model.specs, mesh),
                                     rules.batch_sharding(mesh)))


def compute(quant, shape, devices):
  mesh = make_mesh(cfg.Mesh(*shape), devices)
  model = transformer.build(config_of(quant), constrain=rules.make_constrain(mesh))
  shardings = rules.param_shardings(model.specs, mesh)
  params = jax.jit(lambda key: P.init(model.specs, key), out_shardings=shardings)(
      jax.random.key(0))
  batch = jax.device_put(make_batch(), rules.batch_sharding(mesh))
  value, norm = loss_and_norm(model, mesh)(params, batch)
  return params, [float(value), float(norm)]


def largest_share(params):
  """The largest part of the parameters that one device holds."""
  total = sum(x.size for x in jax.tree.leaves(params))
  held = {}
  for x in jax.tree.leaves(params):
    for shard in x.addressable_shards:
      held[shard.device] = held.get(shard.device, 0) + shard.data.size
  return max(held.values()) / total


def main(name, which):
  """With 'equal' only meshes whose axes above 1 are equally long: 8 on one axis, or 2 on three."""
  quant = QUANTS[name]
  whole, reference = compute(quant, (1, 1, 1, 1), jax.devices()[:1])
  shapes = [s for s in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(s) == 8
            and (which == 'all' or len({*s} - {1}) == 1)]
  results = {}
  for shape in shapes:
    params, values = compute(quant, shape, jax.devices())
    gap = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in
              zip(jax.tree.leaves(whole), jax.tree.leaves(params)))
    results['x'.join(map(str, shape))] = [*values, gap, largest_share(params)]
  print(json.dumps({'devices': jax.device_count(), 'one_device': reference, 'meshes': results}))


if __name__ == '__main__':
  main(*sys.argv[1:])
