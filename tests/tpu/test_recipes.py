"""BitNet's recipes and the supervised stages fit their slices, by the TPU compiler."""

import importlib.util
import itertools

import pytest

from jaxrl_pt.tpu import compile as compiling

SLICES = {'v5e:16x16': 'gin/cluster/v5e_256.gin', 'v5p:4x4x8': 'gin/cluster/v5p_128.gin'}
RECIPES = ('pretrain_bitnet_v2_400m', 'pretrain_bitnet_v2_1_3b', 'pretrain_bitnet_v2_3b',
           'pretrain_bitnet_v2_7b', 'pretrain_2b4t', 'sft_2b4t', 'dpo_2b4t')
CASES = [*itertools.product(RECIPES, SLICES),
         ('judge_reward_7b', 'v5p:4x4x8'),
         *((name, 'v5e:16x16') for name in ('sft_7b', 'dpo_7b', 'reward_model_7b'))]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='libtpu is not installed: make libtpu')
@pytest.mark.parametrize('name, topology', CASES)
def test_a_recipe_fits(name, topology):
  rows = list(compiling.compile_run(topology, [f'gin/run/{name}.gin', SLICES[topology]], []))
  # BitNet v2 has a step for each of its two phases.
  assert len(rows) >= (2 if 'v2' in name else 1)
  assert all(row['fits'] for row in rows), rows
