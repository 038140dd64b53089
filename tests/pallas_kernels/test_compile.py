"""The TPU compiler takes every kernel at every shape, for every generation.

Each topology in a process of its own; the report's rows name what does not compile.
"""

import importlib.util

import pytest

from jaxrl_pt.tpu import kernels

pytestmark = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                                reason='libtpu is not installed: make libtpu')
# Two minutes of compilation each. What is left to the slow run of v5e are shapes whose programs
# differ from others' in sizes alone.
TOPOLOGIES = [pytest.param(name, '', marks=pytest.mark.slow, id=name)
              for name in ('v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1')]
SOME = '|'.join((
    r'^hadamard\S* (int8 32x6912|int4 (32x2560|2048x8192))',
    r'^sparse\S* page (16 .*8x4K|128 .*256K)',
    r'^ternary\S* (int8 (1|32|2048)x2560->6912|int4 (1|32|2048)x6912->2560)',
    r'2B4T .* 32x1 .*(64|128)$', '32B .* 1x256 ', 'small heads'))
TOPOLOGIES.append(pytest.param('v5e:2x2', SOME, id='v5e, some'))
VMEM_BYTES = {'v4': 16 << 20, 'v5e': 128 << 20, 'v5p': 64 << 20, 'v6e': 128 << 20,
              'tpu7x': 64 << 20}


# In two parts, for two workers.
@pytest.mark.parametrize('part', [0, 1])
@pytest.mark.parametrize('topology, only', TOPOLOGIES)
def test_every_shape_of_every_kernel_compiles(topology, only, part, record_property):
  expected, names = set(kernels.KERNELS[part::2]), set()
  for row in kernels.rows_of_compiles(topology, sorted(expected), only):
    assert not row['error'], f'{row["name"]}: {row["error"]}'
    assert 0 < row['vmem_bytes'] <= VMEM_BYTES[topology.partition(':')[0]], row['name']
    record_property(f'{row["name"]} VMEM bytes', row['vmem_bytes'])
    names.add(row['name'].split()[0])
  if topology.startswith('v4'):  # No 2-bit integers in its Pallas: the reference runs there.
    expected.discard('ternary_matmul')
  assert names == expected
