"""Child of test_hosts_of_slices.py: prints, as JSON, what meshes on real slices look like."""

import json

from jax.sharding import NamedSharding
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel import hosts, rules
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.tpu import chips

# topology, slices, mesh (data, fsdp, tensor, context)
CASES = [('v5e:16x16', 1, (1, 256, 1, 1)), ('v5e:16x16', 1, (1, 64, 4, 1)),
         ('v5e:16x16', 1, (1, 32, 1, 8)), ('v5p:4x4x4', 1, (1, 16, 4, 1)),
         ('v5p:4x4x4', 1, (2, 4, 2, 4)), ('v6e:16x16', 2, (2, 256, 1, 1)),
         ('v6e:16x16', 2, (1, 512, 1, 1)), ('v6e:16x16', 4, (2, 128, 4, 1))]
ROWS, TOKENS = 1024, 4096


def look(topology, slices, shape):
  """The slices at each place of data × fsdp, and how well each host's part fits its devices."""
  devices = chips.topology_devices(topology, slices)
  mesh = make_mesh(cfg.Mesh(*shape), devices)
  spec = rules.partition_spec(('batch', 'sequence'), rules.TRAIN)
  sharding = NamedSharding(mesh, spec)
  wanted = {}
  for device, index in sharding.devices_indices_map((ROWS, TOKENS)).items():
    wanted.setdefault(device.process_index, set()).add(
        tuple(s.indices(n)[:2] for s, n in zip(index, (ROWS, TOKENS), strict=True)))
  exact, by_number = 0, 0
  for process, pieces in wanted.items():
    rows, tokens = hosts.owned(sharding, (ROWS, TOKENS), process)
    for (low, high), (first, last) in pieces:
      assert np.isin(np.arange(low, high), rows).all(), 'a row that is not read'
      assert np.isin(np.arange(first, last), tokens).all(), 'a token that is not read'
    area = sum((high - low) * (last - first) for (low, high), (first, last) in pieces)
    exact += area == len(rows) * len(tokens)
    share = ROWS // len(wanted)
    by_number += np.array_equal(rows, np.arange(process * share, (process + 1) * share)) and (
        len(tokens) == TOKENS)
  of_slice = np.vectorize(lambda d: getattr(d, 'slice_index', 0))(mesh.devices)
  return {'hosts': len(wanted), 'exact': exact, 'by_number': int(by_number),
          'slices': of_slice.max((2, 3)).tolist(),
          'whole': bool((of_slice.max((2, 3)) == of_slice.min((2, 3))).all())}


if __name__ == '__main__':
  found = [look(*case) for case in CASES]
  try:
    make_mesh(cfg.Mesh(1, 1, 512, 1), chips.topology_devices('v6e:16x16', 2))
  except UserError as e:
    print(json.dumps({'cases': found, 'refused': str(e)}))
