"""Checkpoints survive what a disk, a kill and another mesh do to them."""

import gc
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_pt import checkpoint as ckpt
from jaxrl_pt import checksum, types
from jaxrl_pt import config as cfg
from jaxrl_pt.errors import Unwritable, UserError
from tests import xla_flags

# Reads of broken files leave coroutines of the file format behind, collected at any time.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(autouse=True, scope='module')
def collect_garbage():
  yield
  gc.collect()  # here, where the warning is expected, and not in the next module's tests


def make_state(step: int, width: int = 4) -> types.TrainState:
  params = {'layers': {'w': jnp.arange(6.0 * width).reshape(6, width) + step,
                       'b': jnp.full((5,), step, jnp.bfloat16)},
            'flags': jnp.array([True, False, step % 2 == 0])}
  opt_state = optax.adam(1e-3).init(params['layers'])
  return types.TrainState(step=jnp.int32(step), params=params, opt_state=opt_state, method={})


def abstract(state):
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(a, b) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save_steps(directory: pathlib.Path, steps, **config) -> None:
  with ckpt.Checkpointer(directory, cfg.Checkpoint(**config)) as saver:
    for step in steps:
      saver.save(step, make_state(step), {'loader': {'position': 10 * step}, 'text': 'é = 1e-3'})


def run_child(code: str, *args: object, devices: int = 1) -> subprocess.CompletedProcess[str]:
  return subprocess.run([sys.executable, '-c', textwrap.dedent(code), *map(str, args)],
                        env=child_env(devices), capture_output=True, text=True, timeout=120)


def child_env(devices: int) -> dict[str, str]:
  return {**os.environ, 'JAX_PLATFORMS': 'cpu',
          'XLA_FLAGS': xla_flags.with_devices(devices)}


# --- Round trip and retention ---------------------------------------------------------


def test_round_trip_keeps_every_leaf_and_the_extras(tmp_path):
  save_steps(tmp_path, [1, 2])
  found = ckpt.restore(tmp_path, abstract(make_state(0)))
  assert found.step == 2 and found.skipped == ()
  assert_equal(found.state, make_state(2))
  assert found.extras == {'loader': {'position': 20}, 'text': 'é = 1e-3'}
  assert ckpt.read_extras(tmp_path, 1) == (1, {'loader': {'position': 10}, 'text': 'é = 1e-3'})
  assert ckpt.restore(tmp_path, abstract(make_state(0)), step=1).step == 1


def test_one_field_restores_without_the_rest(tmp_path):
  save_steps(tmp_path, [3])
  found = ckpt.restore(tmp_path, abstract(make_state(0).params), part='params')
  assert_equal(found.state, make_state(3).params)


def test_keeps_the_last_and_every_nth(tmp_path):
  with ckpt.Checkpointer(tmp_path, cfg.Checkpoint(keep=2, keep_every=4)) as saver:
    assert saver.latest_step() is None
    for step in range(1, 8):
      saver.save(step, make_state(step), {})
    saver.wait()
    assert saver.steps() == [4, 6, 7] and saver.latest_step() == 7


def test_a_step_saved_here_is_not_saved_again_and_an_older_one_is_refused(tmp_path):
  with ckpt.Checkpointer(tmp_path, cfg.Checkpoint()) as saver:
    saver.save(5, make_state(5), {})
    saver.save(5, make_state(6), {})
    saver.wait()
    assert_equal(saver.restore(abstract(make_state(0))).state, make_state(5))
    with pytest.raises(UserError, match='already holds a checkpoint of step 5, so step 4'):
      saver.save(4, make_state(4), {})


def test_buffers_may_be_donated_while_the_save_runs(tmp_path):
  grow = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
  x = jnp.ones((512, 1024))
  with ckpt.Checkpointer(tmp_path, cfg.Checkpoint(keep=20)) as saver:
    wanted = []
    for step in range(4):
      wanted.append(np.array(x, copy=True))
      saver.save(step, {'x': x}, {})
      for _ in range(5):
        x = grow(x)
    saver.wait()
    for step, value in enumerate(wanted):
      found = saver.restore({'x': jax.ShapeDtypeStruct((512, 1024), jnp.float32)}, step)
      np.testing.assert_array_equal(np.asarray(found.state['x']), value)


# --- Corruption ------------------------------------------------------------------------


def files_of(step_dir: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in step_dir.rglob('*') if p.is_file() and p.stat().st_size)


def restore_is_right(directory: pathlib.Path, capsys) -> bool:
  """Whether step 2 was used; either way the values must be those of the step reported."""
  found = ckpt.restore(directory, abstract(make_state(0)))
  assert_equal(found.state, make_state(found.step))
  if found.step == 2:
    assert found.skipped == ()
  else:
    assert found.step == 1 and len(found.skipped) == 1
    assert str(directory / '2') in found.skipped[0]
    assert str(directory / '2') in capsys.readouterr().err
  return found.step == 2


def test_a_flipped_byte_anywhere_is_found_or_harmless(tmp_path, capsys):
  save_steps(tmp_path, [1, 2])
  rng = random.Random(0)
  for path in files_of(tmp_path / '2'):
    good = path.read_bytes()
    for position in {0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(3))}:
      bad = bytearray(good)
      bad[position] ^= 1 << rng.randrange(8)
      path.write_bytes(bad)
      used = restore_is_right(tmp_path, capsys)
      assert not (used and path.match('record/metadata'))
    path.write_bytes(good)
  assert restore_is_right(tmp_path, capsys)


def test_every_truncated_or_missing_file_is_found_or_harmless(tmp_path, capsys):
  save_steps(tmp_path, [1, 2])
  skipped = 0
  for path in files_of(tmp_path / '2'):
    good = path.read_bytes()
    path.write_bytes(good[:len(good) // 2])
    skipped += not restore_is_right(tmp_path, capsys)
    path.unlink()
    skipped += not restore_is_right(tmp_path, capsys)
    path.write_bytes(good)
  assert skipped >= 4  # the record, the manifest and the data of the arrays at least
  assert restore_is_right(tmp_path, capsys)


def test_changed_values_that_the_file_format_accepts_are_found(tmp_path, capsys):
  """A well-formed checkpoint whose arrays are not those of its record."""
  save_steps(tmp_path / 'a', [1, 2])
  with ckpt.Checkpointer(tmp_path / 'b', cfg.Checkpoint()) as saver:
    state = make_state(2)
    w = state.params['layers']['w'].at[3, 2].add(1e-3)
    params = {**state.params, 'layers': {**state.params['layers'], 'w': w}}
    saver.save(2, state.replace(params=params), {})
  shutil.rmtree(tmp_path / 'a/2/state')
  shutil.copytree(tmp_path / 'b/2/state', tmp_path / 'a/2/state')
  found = ckpt.restore(tmp_path / 'a', abstract(make_state(0)))
  assert found.step == 1 and 'checksum of params/layers/w differs' in found.skipped[0]


def test_none_usable_names_them_all_and_a_chosen_step_is_not_replaced(tmp_path):
  save_steps(tmp_path, [1, 2])
  for step in (1, 2):
    shutil.rmtree(tmp_path / str(step) / 'state')
  with pytest.raises(UserError, match=r'no usable checkpoint in .*/2 is corrupt.*/1 is corrupt'):
    ckpt.restore(tmp_path, abstract(make_state(0)))
  with pytest.raises(UserError, match='/2 is corrupt'):
    ckpt.restore(tmp_path, abstract(make_state(0)), step=2)
  (tmp_path / '2/record/metadata').write_text('{')
  assert ckpt.read_extras(tmp_path)[0] == 1


def test_saving_goes_on_after_a_corrupt_newest(tmp_path):
  save_steps(tmp_path, [1, 2], keep=2)
  shutil.rmtree(tmp_path / '2/state')
  with ckpt.Checkpointer(tmp_path, cfg.Checkpoint(keep=1)) as saver:
    assert saver.restore(abstract(make_state(0))).step == 1
    saver.save(2, make_state(2), {})
    saver.wait()
    assert saver.steps() == [2]
  assert_equal(ckpt.restore(tmp_path, abstract(make_state(0))).state, make_state(2))


# --- Names ---------------------------------------------------------------------------------


def test_only_plain_numbers_are_steps(tmp_path):
  """Python's int() takes more spellings than the directory's name can have, and less."""
  save_steps(tmp_path, [1, 2])
  for name in ('²', '٣', '0３', '007', '+4', '1_0', '-1', ' 5', '5 ', '1e3', 'x'):
    shutil.copytree(tmp_path / '2', tmp_path / name)
  (tmp_path / '9').write_text('')
  assert ckpt.steps(tmp_path) == [1, 2]
  with ckpt.Checkpointer(tmp_path, cfg.Checkpoint(keep=1)) as saver:
    assert saver.restore(abstract(make_state(0))).step == 2
    saver.save(3, make_state(3), {})
    saver.wait()
    assert saver.steps() == [3]
  assert (tmp_path / '007').is_dir() and (tmp_path / '²').is_dir()


@pytest.mark.parametrize('move', [shutil.copytree, os.rename], ids=['copied', 'renamed'])
def test_a_checkpoint_of_another_step_than_its_name_is_refused(tmp_path, move):
  save_steps(tmp_path, [1, 2])
  move(tmp_path / '2', tmp_path / '7')
  said = r'/7 holds the checkpoint of step 2: it was renamed or copied; rename it back'
  with pytest.raises(UserError, match=said):
    ckpt.restore(tmp_path, abstract(make_state(0)))
  with pytest.raises(UserError, match=said):
    ckpt.restore(tmp_path, abstract(make_state(0).params), 7, part='params')
  with pytest.raises(UserError, match=said):
    ckpt.read_extras(tmp_path)
  assert (tmp_path / '7').is_dir()  # it may be the only copy
  assert ckpt.restore(tmp_path, abstract(make_state(0)), 1).step == 1


# --- Mistakes ----------------------------------------------------------------------------


def test_another_model_is_named_and_not_taken_for_corruption(tmp_path):
  save_steps(tmp_path, [1])
  with pytest.raises(UserError, match=(
      r'/1 belongs to another model: params/layers/w is float32\[6, 4\] in the checkpoint and '
      r'float32\[6, 8\] in this run')):
    ckpt.restore(tmp_path, abstract(make_state(0, width=8)))
  state = make_state(0)
  half = state.replace(step=jnp.zeros((), jnp.int16))
  with pytest.raises(UserError, match=r'step is int32\[\] in the checkpoint and int16\[\]'):
    ckpt.restore(tmp_path, abstract(half))
  more = state.replace(params={**state.params, 'head': jnp.ones(3)})
  with pytest.raises(UserError, match=r'params/head is absent in the checkpoint and float32\[3\]'):
    ckpt.restore(tmp_path, abstract(more))
  fewer = state.replace(params={'layers': state.params['layers']})
  with pytest.raises(UserError, match=r'params/flags is bool\[3\] in the checkpoint and absent'):
    ckpt.restore(tmp_path, abstract(fewer))


def test_missing_directory_and_step(tmp_path):
  with pytest.raises(UserError, match='no checkpoint in .*/nowhere'):
    ckpt.restore(tmp_path / 'nowhere', {})
  save_steps(tmp_path, [1, 2])
  with pytest.raises(UserError, match='no checkpoint of step 7 in .*: choose one of 1, 2'):
    ckpt.read_extras(tmp_path, 7)


def test_unwritable_directory(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write checkpoints to .*file/run'):
    ckpt.Checkpointer(tmp_path / 'file/run', cfg.Checkpoint())


# --- Full disks ----------------------------------------------------------------------------

FULL = """
  import pathlib, resource, sys
  import jax.numpy as jnp, numpy as np
  from jaxrl_pt import checkpoint, config, errors
  directory, limit = pathlib.Path(sys.argv[1]), int(sys.argv[2])
  noise = np.random.default_rng(0).standard_normal(2_000_000).astype(np.float32)  # 8 MB
  with checkpoint.Checkpointer(directory, config.Checkpoint()) as saver:
    saver.save(1, {'x': jnp.arange(3.0)}, {})
    saver.wait()
    if limit:
      resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
      saver.save(2, {'x': jnp.asarray(noise)}, {})
      saver.wait()
    except errors.UserError as error:
      print(error)
    left = sorted(p.name for p in directory.iterdir())
    print(left)
    saver.save(3, {'x': jnp.arange(4.0)}, {})  # there is room for a small one
  print(checkpoint.restore(directory, {'x': jnp.arange(4.0)}).step)
  print(checkpoint.restore(directory, {'x': jnp.arange(3.0)}, 1).state['x'])
"""


def check_full(result: subprocess.CompletedProcess[str], directory: pathlib.Path) -> None:
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert lines[0] == (
      'no space left to save the checkpoint of step 2; the last good checkpoint is step 1 in '
      f'{directory}: free some space and resume.')
  assert lines[1:] == ["['1']", '3', '[0. 1. 2.]']
  assert result.stderr == ''


def test_file_size_limit_while_saving_keeps_the_earlier_ones(tmp_path):
  check_full(run_child(FULL, tmp_path, 1_000_000), tmp_path)


def test_full_disk_while_saving_keeps_the_earlier_ones(tmp_path):
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(tmp_path)],
                           capture_output=True, text=True)
  if mounted.returncode:
    pytest.skip(f'no right to mount a small tmpfs here: {mounted.stderr.strip()}')
  try:
    check_full(run_child(FULL, tmp_path / 'run', 0), tmp_path / 'run')
  finally:
    subprocess.run(['umount', '-l', str(tmp_path)], check=True)


# --- Directories that go away --------------------------------------------------------------


@pytest.mark.parametrize('change, said', [
    (lambda d: shutil.rmtree(d.parent), 'deleted or renamed'),
    (lambda d: d.parent.rename(d.parent.parent / 'elsewhere'), 'deleted or renamed'),
    (lambda d: (shutil.rmtree(d), d.write_text('')), 'deleted or renamed')],
    ids=['deleted', 'renamed', 'replaced'])
def test_a_directory_that_goes_away_is_one_sentence_and_stays_away(tmp_path, change, said):
  directory = tmp_path / 'run' / 'checkpoints'
  with ckpt.Checkpointer(directory, cfg.Checkpoint()) as saver:
    saver.save(1, make_state(1), {})
    saver.wait()
    change(directory)
    with pytest.raises(UserError) as error:
      saver.save(2, make_state(2), {})
  assert said in str(error.value) and f'{directory} was step 1' in str(error.value)
  assert not directory.is_dir()


def test_a_read_only_directory_is_one_sentence(tmp_path):
  immutable = subprocess.run(['chattr', '+i', str(tmp_path)], capture_output=True, text=True)
  if immutable.returncode:
    pytest.skip(f'no way to make a directory read-only for this user: {immutable.stderr.strip()}')
  subprocess.run(['chattr', '-i', str(tmp_path)], check=True)
  with ckpt.Checkpointer(tmp_path, cfg.Checkpoint()) as saver:
    saver.save(1, make_state(1), {})
    saver.wait()
    subprocess.run(['chattr', '+i', str(tmp_path)], check=True)
    try:
      with pytest.raises(UserError, match='step 2 .Operation not permitted.; the last good '
                         'checkpoint is step 1'):
        saver.save(2, make_state(2), {})
        saver.wait()
    finally:
      subprocess.run(['chattr', '-i', str(tmp_path)], check=True)
    saver.save(3, make_state(3), {})
  assert ckpt.restore(tmp_path, abstract(make_state(0))).step == 3


def test_what_another_file_could_not_take_names_the_last_checkpoint(tmp_path):
  with pytest.raises(UserError, match='cannot write x .full.; the last good checkpoint is step 4'):
    with ckpt.Checkpointer(tmp_path, cfg.Checkpoint()) as saver:
      saver.save(4, make_state(4), {})  # waited for while the error is on its way
      raise Unwritable('cannot write x (full)')


# --- Kills -----------------------------------------------------------------------------------

SAVE_FOREVER = """
  import pathlib, sys
  import jax.numpy as jnp
  from jaxrl_pt import checkpoint, config
  with checkpoint.Checkpointer(pathlib.Path(sys.argv[1]), config.Checkpoint(keep=2)) as saver:
    step = saver.latest_step() or 0
    while True:
      step += 1
      saver.save(step, {'x': jnp.full((300, 300), float(step)), 'step': jnp.int32(step)}, {})
      print(step, flush=True)
"""


def test_sigkill_while_saving_loses_no_finished_checkpoint(tmp_path):
  rng, before = random.Random(1), 0
  target = {'x': jax.ShapeDtypeStruct((300, 300), jnp.float32),
            'step': jax.ShapeDtypeStruct((), jnp.int32)}
  for _ in range(4):
    child = subprocess.Popen([sys.executable, '-c', textwrap.dedent(SAVE_FOREVER), str(tmp_path)],
                             env=child_env(1), stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(3):  # step n is printed once step n − 1 is on disk
      started = int(child.stdout.readline())
    time.sleep(rng.uniform(0, 0.15))
    child.send_signal(signal.SIGKILL)
    started = int((child.stdout.read().splitlines() or [started])[-1])
    child.wait()
    found = ckpt.restore(tmp_path, target)
    assert found.skipped == ()
    assert found.step >= max(started - 1, before + 2)
    assert int(found.state['step']) == found.step
    assert (np.asarray(found.state['x']) == found.step).all()
    before = found.step
  with ckpt.Checkpointer(tmp_path, cfg.Checkpoint(keep=2)) as saver:
    left = sorted(int(p.name) for p in tmp_path.iterdir())  # no half-written step among them
    assert left == saver.steps()


# --- Meshes ----------------------------------------------------------------------------------

MESH = """
  import json, pathlib, sys
  import jax, jax.numpy as jnp, numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
  from jaxrl_pt import checkpoint, config
  directory, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
  n = jax.device_count()
  mesh = Mesh(np.array(jax.devices()).reshape(max(n // 2, 1), min(n, 2)), ('fsdp', 'tensor'))
  specs = {'w': P('fsdp', 'tensor'), 'e': P(('fsdp', 'tensor')), 'b': P(), 'step': P()}
  shard = {k: NamedSharding(mesh, s) for k, s in specs.items()}
  full = {'w': jnp.sin(jnp.arange(64.0 * 32)).reshape(64, 32),
          'e': jnp.arange(16 * 3, dtype=jnp.float32).astype(jnp.bfloat16).reshape(16, 3),
          'b': jnp.arange(7) % 3 == 0, 'step': jnp.int32(9)}
  if mode == 'save':
    state = jax.device_put(full, shard)
    with checkpoint.Checkpointer(directory, config.Checkpoint()) as saver:
      saver.save(9, state, {'devices': n})
  else:
    target = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shard[k])
              for k, x in full.items()}
    found = checkpoint.restore(directory, target)
    state = found.state
    assert found.skipped == () and found.extras == {'devices': 8}
    for k in full:
      assert state[k].sharding == shard[k] and len(state[k].sharding.device_set) == n
      np.testing.assert_array_equal(np.asarray(state[k]), np.asarray(full[k]))
  print(json.dumps(checkpoint.checksum(state)))
"""


def test_restores_8_devices_on_4_and_on_1(tmp_path):
  sums = []
  for devices, mode in ((8, 'save'), (4, 'restore'), (1, 'restore')):
    result = run_child(MESH, tmp_path, mode, devices=devices)
    assert result.returncode == 0, result.stderr
    sums.append(json.loads(result.stdout))
  assert sums[0] == sums[1] == sums[2] and len(sums[0]) == 4


# --- Checksums ---------------------------------------------------------------------------------


def slow_checksum(x: np.ndarray) -> int:
  """The definition, one element after the other in Python's integers."""
  def mix(v: int) -> int:
    v = ((v ^ v >> 16) * 0x9E3779B1) % 2**32
    v = ((v ^ v >> 15) * 0x85EBCA77) % 2**32
    return v ^ v >> 16
  bits = x.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
  return sum(mix(int(b) ^ mix((i + 1) % 2**32)) for i, b in enumerate(bits)) % 2**32


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'int32', 'uint32', 'int8',
                                   'uint8', 'bool', 'float8_e4m3fn'])
def test_checksum_equals_its_definition(dtype):
  x = (jax.random.normal(jax.random.key(0), (3, 5, 7)) * 50).astype(dtype)
  assert ckpt.checksum({'x': x}) == {'x': slow_checksum(np.asarray(x))}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'complex64'])
@pytest.mark.parametrize('piece', [1, 50, 104])
def test_a_large_array_has_the_same_checksum_in_pieces(monkeypatch, dtype, piece):
  x = (jax.random.normal(jax.random.key(0), (3, 5, 7)) * 50).astype(dtype)
  tree = {'x': x, 'small': jnp.float32(1), 'flat': x.reshape(-1)}
  whole = ckpt.checksum(tree)
  monkeypatch.setattr(checksum, '_PIECE', piece)
  assert ckpt.checksum(tree) == whole and list(whole) == ['flat', 'small', 'x']


def test_checksum_of_narrow_scalar_and_empty_leaves():
  tree = {'i4': jnp.arange(-8, 8).astype(jnp.int4), 'i2': jnp.array([-2, 1], jnp.int2),
          'scalar': jnp.float32(2.5), 'empty': jnp.zeros((0, 3))}
  sums = ckpt.checksum(tree)
  assert sums['empty'] == 0
  assert sums['scalar'] == slow_checksum(np.float32([2.5]))
  assert sums['i4'] == slow_checksum(np.arange(-8, 8, dtype=np.int32))
  assert ckpt.checksum({}) == {}


def test_every_single_bit_and_every_pair_of_signs_changes_the_checksum():
  x = np.asarray(jax.random.normal(jax.random.key(1), (6,)))
  base = ckpt.checksum({'x': x})['x']
  for i in range(x.size):
    for bit in range(32):
      y = x.copy()
      y.view(np.uint32)[i] ^= np.uint32(1) << np.uint32(bit)
      assert ckpt.checksum({'x': y})['x'] != base
  for i in range(x.size):
    for j in range(i):
      y, z = x.copy(), x.copy()
      y[[i, j]] *= -1
      z[[i, j]] = z[[j, i]]
      assert base not in (ckpt.checksum({'x': y})['x'], ckpt.checksum({'x': z})['x'])


def test_negative_zero_and_nan_payloads_are_told_apart():
  a, b = ckpt.checksum({'a': jnp.float32(0.0), 'b': jnp.float32(-0.0)}).values()
  assert a != b
