"""The reader of compiled programs, on a small text whose numbers are counted by hand."""

from pathlib import Path

import pytest

from jaxrl_pt.tpu import hlo

# A loop of 5 trips gathers f32[8,128] from 4 devices and calls a kernel; after it all 8
# devices add up bf16[16,128].
TEXT = (Path(__file__).parent / 'data' / 'small_program.txt').read_text()


@pytest.fixture
def module():
  return hlo.parse(TEXT)


def test_collectives_are_counted_with_the_trips_of_their_loop(module):
  found = {c.kind: c for c in hlo.collectives(module)}
  assert set(found) == {'all-gather', 'all-reduce'}
  gathered = 8 * 128 * 4
  assert found['all-gather'].count == 5
  assert found['all-gather'].num_bytes == 5 * gathered
  assert found['all-gather'].wire_bytes == 5 * gathered * 3 // 4
  reduced = 16 * 128 * 2
  assert found['all-reduce'].count == 1
  assert found['all-reduce'].num_bytes == reduced
  assert found['all-reduce'].wire_bytes == 2 * reduced * 7 // 8


def test_kernels_are_named_and_counted(module):
  assert hlo.kernels(module) == {'scale': (1, 5)}


def test_traffic_counts_padded_tiles_in_hbm(module):
  # f32[2,128] takes a tile of 8 rows. A trip gathers (reads one tile, writes 8 rows) and runs
  # the kernel (reads 8 rows, writes a tile), and adds up two scalars; then the sum of q.
  tile, scalars = 8 * 128 * 4, 3 * 4
  trip = (tile + tile) + (tile + tile) + scalars
  assert hlo.hbm_bytes(module) == pytest.approx(5 * trip + 2 * 16 * 128 * 2, abs=5 * 8)


def test_the_biggest_arrays_come_first(module):
  [first, *_] = hlo.biggest(module)
  assert first.num_bytes == 4096 and first.opcode in ('all-gather', 'parameter', 'all-reduce',
                                                      'custom-call')


@pytest.mark.parametrize('text, num_bytes, padded', [
    ('bf16[10,100]{1,0:T(8,128)(2,1)}', 2000, 16 * 128 * 2),
    ('s2[64,128]{1,0:T(64,128)}', 64 * 128 // 4, 64 * 128 // 4),
    ('f32[3,5]{0,1}', 60, 60)])
def test_bytes_of_an_array(text, num_bytes, padded):
  [array] = hlo.arrays(text)
  assert (array.num_bytes, array.padded_bytes, array.in_hbm) == (num_bytes, padded, True)


def test_vmem_is_not_hbm():
  [array] = hlo.arrays('f32[8,128]{1,0:T(8,128)S(1)}')
  assert not array.in_hbm


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match='ENTRY'):
    hlo.parse('nothing')


# --- What a pod's program has on top: fused collectives, updates in place -----------


@pytest.fixture
def pod():
  return hlo.parse((Path(__file__).parent / 'data' / 'pod_program.txt').read_text())


def test_a_collective_spread_over_fusions_counts_once(pod):
  found = {c.kind: c for c in hlo.collectives(pod)}
  # 4 devices along axis_1 gather bf16[256,128]; its two pieces share channel 7.
  gathered = 256 * 128 * 2
  assert (found['all-gather'].count, found['all-gather'].num_bytes) == (1, gathered)
  assert found['all-gather'].wire_bytes == gathered * 3 // 4


def test_a_sum_of_which_each_device_keeps_its_part_is_a_reduce_scatter(pod):
  found = {c.kind: c for c in hlo.collectives(pod)}
  assert set(found) == {'all-gather', 'reduce-scatter'}
  # Half of what an all-reduce among 8 devices would send.
  assert found['reduce-scatter'].wire_bytes == 256 * 128 * 4 * 7 // 8


def test_an_update_in_place_moves_what_it_writes(pod):
  [written] = [r for r in hlo.runs(pod) if r.instruction.name == 'written']
  layer = 256 * 128 * 4
  # The layer is read and its place in the stack written; i is one tile.
  assert hlo._traffic(pod, written) == 2 * layer + 128 * 4
  assert [b.opcode for b in hlo.biggest(pod) if b.type == 'f32[10,256,128]'] == ['parameter']


def test_a_product_that_takes_a_layer_inside_moves_that_layer(pod):
  [product] = [r for r in hlo.runs(pod) if r.instruction.name == 'product']
  # The slice is in a fusion within the fusion; rows and product are in VMEM.
  assert hlo._traffic(pod, product) == 256 * 128 * 4 + 128 * 4


def test_a_kernel_without_a_scope_has_its_name(pod):
  assert hlo.kernels(pod) == {'flash': (1, 1), 'paged': (1, 1)}


def test_of_a_pool_only_what_is_written_and_read_moves(pod):
  pool, kernel = ([r for r in hlo.runs(pod) if r.instruction.name == name][0]
                  for name in ('pool', 'paged.6'))
  assert hlo._traffic(pod, pool) == 4 * 256 * 128 * 4  # The new lines come from VMEM.
  assert hlo._traffic(pod, kernel) == 5000  # As it says.
