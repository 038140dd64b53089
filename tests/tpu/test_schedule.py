"""The reader of the compiler's schedules: on a committed sample counted by hand, and on
kernels whose cycles are known because only a loop's trips differ."""

import importlib.util
import json
from pathlib import Path
import subprocess
import sys

import pytest

from jaxrl_pt.tpu import child, schedule

DATA = Path(__file__).parent / 'data'
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                                  reason='libtpu is not installed: make libtpu')


def sample(dynamic_trips=()):
  return schedule.read('loops', (DATA / 'loops_bundles.txt').read_text(),
                       (DATA / 'loops_utilization.txt').read_text(), dynamic_trips)


# loops_bundles.txt is a grid of 5 steps (a loop of 7: two more fill and drain the pipeline)
# over bundles 0x7–0x50, whose body 0x1f–0x44 is skipped in those two. Inside are a loop of
# 11 (0x22–0x2f) with a loop of 7 in it (0x23–0x2a), and one with a run-time bound (0x39–0x40).
OUTSIDE, GRID, BODY, OUTER, INNER, DYNAMIC = 7 + 4, 74, 38, 14, 8, 8


def by_hand(dynamic_trips):
  body = BODY - OUTER - DYNAMIC + 11 * (OUTER - INNER + 7 * INNER) + dynamic_trips * DYNAMIC
  return OUTSIDE + 7 * (GRID - BODY) + 5 * body


def test_nested_loops_are_counted_with_their_trips():
  read = sample()
  assert read.num_bundles == 0x54 + 1
  assert read.issue_cycles == by_hand(1) == 3793
  assert read.dynamic_loops == 1


def test_the_trips_of_a_run_time_loop_can_be_named():
  assert sample([100]).issue_cycles == by_hand(100)


def test_slots_are_shares_of_all_issue_cycles():
  # The innermost loop loads one register in each of its trips; bundle 0x41 stores one. The
  # load unit also sets flags: 8 times outside, in two bundles of the body, in two after it.
  slots = sample().slots
  assert slots['VLOAD'] * 3 * 3793 == pytest.approx(5 * 11 * 7 + 8 + 5 * 2 + 7 * 2)
  assert slots['VSTORE'] * 3793 == pytest.approx(5)
  assert slots['MXU'] == 0


def test_texts_that_do_not_belong_together_are_refused():
  rows = (DATA / 'loops_utilization.txt').read_text().splitlines()
  with pytest.raises(ValueError, match='85 bundles but 84 rows'):
    schedule.read('loops', (DATA / 'loops_bundles.txt').read_text(), '\n'.join(rows[:-1]))


def test_the_floor_names_what_sets_it():
  assert schedule.floor(10, 12.2, 11) == (13, 'mxu')
  assert schedule.floor(10, 2, 11) == (11, 'hbm')
  assert schedule.floor(10, 2, 1) == (10, 'issue')


CHILD = '''
import functools, json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxrl_pt.tpu import chips, schedule
topology, dump = sys.argv[1], Path(sys.argv[2])
sharding = jax.sharding.SingleDeviceSharding(chips.topology_devices(topology)[0])

def chain(trips, steps):
  def body(x, o):
    add = lambda i, c: c * x[pl.ds(i % 8 * 8, 8), :]
    o[...] = jax.lax.fori_loop(0, trips, add, jnp.ones((8, 128)))
  x = jax.ShapeDtypeStruct((64 * steps, 128), jnp.float32, sharding=sharding)
  call = pl.pallas_call(
      body, grid=(steps,), in_specs=[pl.BlockSpec((64, 128), lambda i: (i, 0))],
      out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)), name='chain',
      out_shape=jax.ShapeDtypeStruct((8 * steps, 128), jnp.float32))
  for path in dump.iterdir():
    path.unlink()
  jax.jit(call).lower(x).compile()
  [read] = [s for s in schedule.read_dump(dump) if s.name.startswith('chain')]
  return read.issue_cycles

print(json.dumps([chain(t, s) for t, s in ((20, 4), (30, 4), (40, 4), (20, 6), (30, 6))]))
'''


@needs_libtpu
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_issue_cycles_grow_by_exactly_the_body_of_a_loop(topology, tmp_path):
  done = subprocess.run([sys.executable, '-c', CHILD, topology, str(tmp_path)], check=False,
                        env=child.environment(str(tmp_path)), text=True,
                        capture_output=True, timeout=200)
  assert done.returncode == 0, done.stderr[-3000:]
  few, more, most, longer, longer_more = json.loads(done.stdout.splitlines()[-1])
  body = (more - few) / (4 * 10)  # 4 grid steps, 10 more trips
  assert body == int(body) and 4 <= body <= 40
  assert most - more == more - few
  assert longer_more - longer == 6 * 10 * body
