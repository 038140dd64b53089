"""Child of test_pod_kernels.py: prints, as JSON, which kernels the pods' samplers pass over."""

import json
import sys

from jaxrl_pt.jobs import open as jobs
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.tpu import chips
from jaxrl_pt.tpu import compile as compiling
from pallas_kernels import dispatch

if __name__ == '__main__':
  devices = chips.topology_devices('v5p:2x2x2')
  for name in sys.argv[1:]:
    run = compiling.load([f'gin/run/{name}.gin', 'gin/cluster/v5p_8.gin'], [])
    [sampler] = [p for p in jobs.programs(run, make_mesh(run.mesh, devices))
                 if p.name.startswith('sampler')]
    with dispatch.noting() as left:
      sampler.run.trace(*sampler.args)
    print(json.dumps({'name': name, 'left': left}))
