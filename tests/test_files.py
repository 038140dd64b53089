"""Files appear whole, and a lock goes with the process that holds it."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxrl_pt import files
from jaxrl_pt.errors import Unwritable, UserError

HOLD = """
  import pathlib, sys
  from jaxrl_pt import files
  with files.locked(pathlib.Path(sys.argv[1]), 'the other one') as supported:
    print(supported, flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
  process = subprocess.Popen([sys.executable, '-c', textwrap.dedent(HOLD), str(path)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  assert process.stdout is not None and process.stdout.readline() == 'True\n'
  return process


def test_a_lock_keeps_others_out_until_its_holder_is_dead(tmp_path: Path):
  path = tmp_path / '.lock'
  process = holder(path)
  with pytest.raises(files.HeldError, match='the other one'):
    with files.locked(path):
      pass
  process.send_signal(signal.SIGKILL)
  process.wait()
  with files.locked(path, 'me') as supported:
    assert supported and path.read_text() == 'me'
    with pytest.raises(files.HeldError, match='me'):  # also within a process
      with files.locked(path):
        pass


def test_a_lock_does_not_outlive_its_holder_in_a_child(tmp_path: Path):
  """Verifiers and loaders run on for a moment when their parent is killed."""
  path = tmp_path / '.lock'
  with files.locked(path):
    child = subprocess.Popen(['sleep', '60'], close_fds=False)
  try:
    with files.locked(path) as supported:
      assert supported
  finally:
    child.kill()
    child.wait()


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch):
  path = tmp_path / '.lock'
  lock = files.fcntl.flock

  def removed_first(descriptor: int, operation: int) -> None:
    path.unlink()
    lock(descriptor, operation)

  monkeypatch.setattr(files.fcntl, 'flock', removed_first)
  with pytest.raises(files.HeldError, match='removed'):
    with files.locked(path):
      pass


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path):
  path = tmp_path / 'new' / 'a.txt'
  files.write_text(path, 'é' * 1000)
  assert path.read_text(encoding='utf-8') == 'é' * 1000
  assert [p.name for p in path.parent.iterdir()] == ['a.txt']
  (tmp_path / 'file').write_text('')
  with pytest.raises(Unwritable, match='cannot write .*file/a.txt'):
    files.write_text(tmp_path / 'file' / 'a.txt', '')


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path):
  code = """
    import pathlib, resource, signal, sys
    from jaxrl_pt import errors, files
    path = pathlib.Path(sys.argv[1])
    files.write_bytes(path, b'old')
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
      files.write_bytes(path, bytes(5000))
    except errors.Unwritable as error:
      print(error.problem)
  """
  done = subprocess.run([sys.executable, '-c', textwrap.dedent(code), str(tmp_path / 'a')],
                        capture_output=True, text=True)
  assert done.stdout == f'cannot write {tmp_path}/a (File too large)\n', done.stderr
  assert [p.name for p in tmp_path.iterdir()] == ['a'] and (tmp_path / 'a').read_bytes() == b'old'


def test_what_a_kill_left_is_removed(tmp_path: Path):
  for name in ('.a.json.0123456789ab.tmp', 'b.json', '.lock'):
    (tmp_path / name).write_text('')
  files.remove_temporaries(tmp_path)
  assert sorted(os.listdir(tmp_path)) == ['.lock', 'b.json']


def test_arrays_come_back(tmp_path: Path):
  path = tmp_path / 'a.npz'
  files.write_bytes(path, files.npz_bytes({'x/y': np.arange(3)}))
  with np.load(path, allow_pickle=False) as found:
    np.testing.assert_array_equal(found['x/y'], np.arange(3))


@pytest.mark.parametrize('error, reason', [
    (OSError(28, 'x'), 'No space left on device'),
    (ValueError('UNAVAILABLE: writing "d" [OS error 30: EROFS Read-only file system]'),
     'Read-only file system'),
    (ValueError('NOT_FOUND: Error writing "x/0" in OCDBT database'), 'No such file or directory'),
    (ValueError('EVERYTHING is wrong'), None)])
def test_the_system_s_reason_is_found_behind_an_error(error: Exception, reason: str | None):
  assert files.reason_of(error) == reason
  wrapped = RuntimeError('save failed')
  wrapped.__cause__ = error
  assert files.reason_of(wrapped) == reason


def test_a_file_of_others_is_an_object_or_named_with_advice(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text('\ufeff{"a": [1]}', encoding='utf-8')
  assert files.read_object(path) == {'a': [1]}
  for content, words in ((b'[]', 'holds no JSON object'), (b'{', 'is not JSON'),
                         (b'"\xff"', 'is not JSON'), (b'[' * 99999, 'is not JSON')):
    path.write_bytes(content)
    with pytest.raises(UserError, match=f'a.json {words}.*: buy another.$'):
      files.read_object(path, 'buy another')
  with pytest.raises(UserError, match=r'cannot be read \(No such file .*: download it again.$'):
    files.read_object(tmp_path / 'b.json')


def test_a_whole_file_is_there_at_the_end_or_not_at_all(tmp_path):
  final = tmp_path / 'deep' / 'a.bin'
  with pytest.raises(ZeroDivisionError), files.whole_file(final) as path:
    path.write_bytes(b'half')
    1 / 0  # noqa: B018
  assert list(final.parent.iterdir()) == []
  killed = final.parent / '.a.bin-0123'  # as a killed process leaves it
  killed.mkdir()
  (killed / 'a.bin').write_bytes(b'half')
  (final.parent / '.a.bin-0123.lock').touch()
  with files.whole_file(final) as path:
    path.write_bytes(b'whole')
    assert not final.exists() and not killed.exists()
  assert final.read_bytes() == b'whole' and list(final.parent.iterdir()) == [final]
  # As a process leaves it that is killed once the file has its name.
  killed.mkdir()
  (final.parent / '.a.bin-0123.lock').touch()
  with pytest.raises(UserError, match='exists already'), files.whole_file(final):
    pass
  assert final.read_bytes() == b'whole' and list(final.parent.iterdir()) == [final]
