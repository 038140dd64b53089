"""BitNet's recipes fit the slices that they are written for, by the TPU compiler."""

import importlib.util

import pytest

from jaxrl_pt.tpu import compile as compiling

SLICES = {'v5e:16x16': 'gin/cluster/v5e_256.gin', 'v5p:4x4x8': 'gin/cluster/v5p_128.gin'}
RECIPES = ('pretrain_bitnet_v2_400m', 'pretrain_bitnet_v2_1_3b', 'pretrain_bitnet_v2_3b',
           'pretrain_bitnet_v2_7b', 'pretrain_2b4t', 'sft_2b4t', 'dpo_2b4t')


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='libtpu is not installed: make libtpu')
@pytest.mark.parametrize('topology', SLICES)
@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_fits(name, topology):
  rows = list(compiling.compile_run(topology, [f'gin/run/{name}.gin', SLICES[topology]], []))
  # BitNet v2 has a step for each of its two phases.
  assert len(rows) >= (2 if 'v2' in name else 1)
  assert all(row['fits'] for row in rows), rows
