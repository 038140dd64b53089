"""Child of test_kernel_shards.py: the operations of a model inside a `shard_map` over data and
fsdp, as a sampler's shards call them, against the whole batch on one device, as JSON.

On fake CPU devices, kernels in the plain interpreter."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.parallel import kernels, rules
from jaxrl_pt.parallel.mesh import make_mesh
from pallas_kernels import dispatch

ROWS, LENGTH, SHARD = ('data', 'fsdp'), 128, {**rules.SAMPLE, 'batch': ()}
CONFIG = cfg.Model(num_layers=1, d_model=128, d_ff=256, num_heads=2, num_kv_heads=2, head_dim=128,
                   vocab_size=64, activation='relu2', sub_norm=True,
                   quant=cfg.Quant('ternary', 'int8', hadamard=True))


def off(found, expected):
  found, expected = (np.asarray(x, np.float64) for x in (found, expected))
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def sharded(mesh, f, in_specs, out_specs):
  """f on each part of the rows; the other axes of the mesh stay the compiler's."""
  return jax.jit(jax.shard_map(f, mesh=mesh, axis_names=set(ROWS), in_specs=in_specs,
                               out_specs=out_specs, check_vma=False))


def model(mesh, ops):
  """A model's forward pass, through products, rotated inputs and attention."""
  plain = transformer.build(CONFIG)
  constrain = lambda x, axes: jax.lax.with_sharding_constraint(
      x, rules.partition_spec(axes, SHARD))
  fast = transformer.build(CONFIG, constrain=constrain, ops=ops)
  params = jax.jit(lambda key: P.init(plain.specs, key))(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (4, LENGTH), 0, 64)
  segments = jnp.broadcast_to(jnp.where(jnp.arange(LENGTH) < 50, 1, 2), tokens.shape)
  positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
  placed = jax.device_put(params, rules.param_shardings(plain.specs, mesh, rules.SAMPLE))
  found = sharded(mesh, fast.apply, (Spec(), Spec(ROWS), Spec(ROWS), Spec(ROWS)), Spec(ROWS))(
      placed, tokens, positions, segments)
  return off(found, jax.jit(plain.apply)(params, tokens, positions, segments))


def paged(mesh, ops, num_new, dtype, outside=False):
  """Each shard has rows and a pool of its own; heads lie over the axis tensor."""
  shards, rows, heads, page = (1 if outside else mesh.size // 2), 2, 2, 128
  draw = np.random.default_rng(num_new)
  q = jnp.asarray(draw.normal(size=(shards * rows, num_new, 2 * heads, 128)), jnp.float32)
  shape = (heads, shards * 7, 2, page, 128)
  pages, scales = jnp.asarray(draw.normal(size=shape), jnp.float32), None
  if dtype == 'int8':
    pages = jnp.asarray(draw.integers(-127, 128, shape), jnp.int8)
    scales = jnp.asarray(draw.uniform(0.001, 0.02, shape[:-1]), jnp.float32)
  table = jnp.asarray(np.stack([draw.permutation(7)[:6].reshape(rows, 3)
                                for _ in range(shards)]).reshape(-1, 3), jnp.int32)
  starts = jnp.asarray(draw.integers(0, 3 * page - num_new, shards * rows), jnp.int32)
  counts = jnp.asarray(draw.integers(1, num_new + 1, shards * rows), jnp.int32)
  pool = Spec(None, ROWS)
  args = (q, pages, scales, table, starts, counts)
  run = jax.jit(ops.paged) if outside else sharded(
      mesh, ops.paged, (Spec(ROWS), pool, pool, *[Spec(ROWS)] * 3), Spec(ROWS))
  of_shard = jnp.repeat(jnp.arange(shards) * 7, rows)[:, None]  # One pool, for one device.
  expected = Ops().paged(q, pages, scales, table + of_shard, starts, counts)
  live = (jnp.arange(num_new) < counts[:, None])[..., None, None]
  return off(jnp.where(live, run(*args), 0), jnp.where(live, expected, 0))


def product(mesh, ops):
  """A product whose contraction is split over chips."""
  keys = jax.random.split(jax.random.key(4), 2)
  codes = jax.random.randint(keys[0], (4, 8, 256), -127, 128).astype(jnp.float32)
  weight = jax.random.randint(keys[1], (256, 128), -1, 2).astype(jnp.float32)
  run = lambda o, x, w: o.product(x, jnp.full((*x.shape[:2], 1), 0.1), w, jnp.full((1, 1), 0.5),
                                  'int8', ('ff', 'embed'), jnp.float32)
  found = sharded(mesh, functools.partial(run, ops), (Spec(ROWS), Spec()), Spec(ROWS))(
      codes, weight)
  return off(found, run(Ops(), codes, weight))


def attention(mesh, ops):
  q, k, v = (jax.random.normal(key, (4, LENGTH, n, 128))
             for key, n in zip(jax.random.split(jax.random.key(5), 3), (4, 2, 2), strict=True))
  segments = jnp.broadcast_to(jnp.where(jnp.arange(LENGTH) < 50, 1, 2), (4, LENGTH))
  found = sharded(mesh, ops.attention, (Spec(ROWS),) * 4, Spec(ROWS))(q, k, v, segments)
  return off(found, jax.jit(Ops().attention)(q, k, v, segments))


def main(everything):
  mesh = make_mesh(cfg.Mesh(2, 2, 2, 1) if everything else cfg.Mesh(2, 1, 2, 1))
  # With rules that know of rows as with those of a shard: inside, their axes are taken apart.
  shard, trained = (kernels.kernel_ops(mesh, table, 'v5e', interpret=True)
                    for table in (SHARD, rules.TRAIN))
  with dispatch.noting() as passed_over:
    found = {'product': product(mesh, trained), 'chunk': paged(mesh, shard, 5, 'int8')}
    if everything:
      found |= {'model': model(mesh, shard), 'model, other rules': model(mesh, trained),
                'attention': attention(mesh, shard),
                'decode': paged(mesh, trained, 1, 'float32'),
                'outside': paged(mesh, trained, 1, 'float32', outside=True)}
  print(json.dumps({'off': found, 'passed over': passed_over}))


if __name__ == '__main__':
  main(sys.argv[1] == 'everything')
