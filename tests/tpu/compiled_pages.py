"""Child of test_pages.py: layers that write to the pages of a pool and attend to them, compiled for
TPUs inside a `shard_map` over data.

Prints a JSON row for each kind of pages: the bytes of the pool on a chip, the bytes that the
program updates in place, its copies of anything as large as the pool or its scales, and the kernels
that it passed over.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxrl_pt import config as cfg
from jaxrl_pt.parallel import kernels, rules
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.tpu import chips, hlo
from pallas_kernels import dispatch

# Scales of this many pages do not fit VMEM, where the compiler would hold them for a while.
LAYERS, PAGES, PAGE, TABLE, WIDTH = 4, 8193, 128, 64, 128
ROWS, HEADS, GROUPS = 64, 16, 8


def main(topology: str, dtype: str, num_new: str) -> None:
  mesh = make_mesh(cfg.Mesh(data=2, tensor=2), chips.topology_devices(topology)[:4])
  ops = kernels.make_ops(mesh, rules.SAMPLE)
  new, features = int(num_new), HEADS * WIDTH
  rows = ROWS if new == 1 else 2

  def array(spec, *dims, of='bfloat16'):
    return jax.ShapeDtypeStruct(dims, jnp.dtype(of), sharding=NamedSharding(mesh, Spec(*spec)))

  def shard(x, wq, wkv, pages, scales, table, starts, counts):
    def layer(carry, inputs):
      (x, pages, scales), (index, wq, wkv) = carry, inputs
      q = (x @ wq).reshape(-1, new, HEADS, WIDTH)
      kv = (x @ wkv).reshape(-1, new, GROUPS, 2, WIDTH)
      of_layer = table + index * PAGES
      put = lambda leaf, values: ops.write_pages(leaf, of_layer, starts, counts,
                                             values.astype(leaf.dtype), index * PAGES)
      if scales is not None:
        scales = put(scales, jnp.abs(kv).max(-1))
      pages = put(pages, kv)
      out = ops.paged(q, pages, scales, of_layer, starts, counts)
      return (x + out.reshape(x.shape), pages, scales), None

    return jax.lax.scan(layer, (x, pages, scales), (jnp.arange(LAYERS), wq, wkv))[0]

  pool, by_rows = ('tensor', 'data'), ('data',)
  shape = (GROUPS, 2 * LAYERS * PAGES, 2, PAGE)  # A pool for each of two shards.
  scales = array(pool, *shape, of='float32') if dtype == 'int8' else None
  args = (array(by_rows, 2 * rows, new, features),
          array((None, None, 'tensor'), LAYERS, features, features),
          array((None, None, 'tensor'), LAYERS, features, 2 * GROUPS * WIDTH),
          array(pool, *shape, WIDTH, of=dtype), scales,
          array(by_rows, 2 * rows, TABLE, of='int32'),
          *[array(by_rows, 2 * rows, of='int32')] * 2)
  own = Spec(None, 'data')  # The axis tensor is the compiler's.
  mapped = jax.shard_map(
      shard, mesh=mesh, axis_names={'data', 'fsdp'}, check_vma=False,
      in_specs=(Spec('data'), Spec(), Spec(), own, own, *[Spec('data')] * 3),
      out_specs=(Spec('data'), own, own))
  with dispatch.noting() as passed_over:
    compiled = jax.jit(mapped, donate_argnums=(3, 4)).lower(*args).compile()
  on_chip = [GROUPS // 2, LAYERS * PAGES, 2, PAGE]
  shapes = [f'[{",".join(map(str, s))}]' for s in (on_chip, [*on_chip, WIDTH])]
  copies = [i.name for computation in hlo.parse(compiled.as_text()).computations.values()
            for i in computation.values() if i.opcode in ('copy', 'copy-start', 'transpose')
            and any(s in i.type for s in shapes)]
  in_pool = args[3].size // 4 * args[3].dtype.itemsize
  print(json.dumps({'pool': in_pool, 'copies': copies, 'passed over': passed_over,
                    'kernels': compiled.as_text().count('tpu_custom_call'),
                    'in_place': compiled.memory_analysis().alias_size_in_bytes}), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
