"""What preflight makes of a compiler that refuses, without one."""

import types

import jax
import jax.numpy as jnp
import pytest

from jaxrl_pt.tpu import compile as compiling
from jaxrl_pt.tpu import roofline, search

EARLY = ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
         'temporaries (29.82G) exceeds available HBM (15.75G).')
LATE = '''RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(step)/dot_general" source_file="x.py"
     Shape: f32[4,512,524288]{2,1,0:T(8,128)}
     Unpadded size: 4.00G
     ==========================

  2. Size: 512.0M
     Shape: bf16[64,4096,1024]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 512.0M
'''


@pytest.mark.parametrize('message, needed', [(EARLY, 29.82), (LATE, 20.5)])
def test_out_of_memory_is_an_answer_with_both_sizes(message, needed):
  row = compiling._refusal(message)
  assert row['hbm']['total'] == pytest.approx(needed * 2**30, abs=1)
  assert row['capacity'] == 15.75 * 2**30
  assert f'{needed:.2f} GiB of 15.75 GiB' in row['error'] and 'refused' not in row


def test_the_compiler_s_own_allocations_are_the_biggest_buffers():
  first, second = compiling._refusal(LATE)['buffers']
  assert (first['num_bytes'], first['type']) == (4 * 2**30, 'f32[4,512,524288]')
  assert first['op_name'] == 'jit(step)/dot_general'
  assert (second['num_bytes'], second['op_name']) == (2**29, '')


def test_another_refusal_keeps_its_first_line():
  row = compiling._refusal('INTERNAL: Mosaic failed to compile\nmore')
  assert row == {'error': 'does not compile: INTERNAL: Mosaic failed to compile', 'refused': True}


def test_a_refused_program_shows_its_largest_traced_arrays():
  def program(x):
    _, ys = jax.lax.scan(lambda c, _: (c, c @ c), x, None, length=50)
    return ys.sum()

  jaxpr = jax.jit(program).trace(jnp.ones((64, 64))).jaxpr.jaxpr
  [stacked, product] = compiling._largest(compiling._traced_rows(jaxpr, 4))[:2]
  assert stacked['num_bytes'] == 50 * 64 * 64 * 4 // 4
  assert product['num_bytes'] == 64 * 64 * 4 // 4


def test_the_search_stops_where_the_state_alone_is_too_big(monkeypatch):
  too_big = {'fits': False, 'error': 'too big', 'state_too_big': True, 'num_devices': 4,
             'capacity': 10, 'hbm': {'arguments': 25}}
  tried = []
  monkeypatch.setattr(search.compiling, 'compile_run',
                      lambda *args: tried.append(args) or [too_big])
  lines = []
  assert search.fitting('v5e:2x2', ['gin/run/pretrain_tiny.gin'], [], lines.append) == []
  assert len(tried) == 1 and 'need 10 of them' in lines[-1]


def test_splash_attention_counts_the_blocks_its_mask_leaves():
  def call(name):
    grid = types.SimpleNamespace(grid=(2, 4, 4))
    return types.SimpleNamespace(params={'name': name, 'grid_mapping': grid})

  assert roofline._is_splash('pallas_call', call('splash_mha_fwd'))
  assert not roofline._is_splash('pallas_call', call('ternary_matmul'))
  # 10 of 4 × 4 blocks are on the diagonal or below.
  count = roofline._causal(roofline.MultiplyAdds({'bf16': 16}), call('splash_mha_fwd'))
  assert count == {'bf16': 10}
