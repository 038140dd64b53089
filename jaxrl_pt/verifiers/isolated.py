"""What a process does between its fork and the isolated Python that it becomes (`isolation.py`).

It runs in namespaces of its own, as root of them, and gives up step by step: the file system, its
user, its limits and at last all but a list of system calls.
"""

from collections.abc import Mapping, Sequence
import ctypes
from dataclasses import dataclass
import os
import resource
import signal
import struct
import sys
import traceback
from typing import NoReturn

from jaxrl_pt import config as cfg
from jaxrl_pt.verifiers import seccomp

MAX_REASON = 4096  # bytes of the reason why the process did not become Python
_STATUS = 3  # the descriptor on which the reason is told; it closes when Python starts
_NOSUID, _NODEV, _NOEXEC, _BIND, _RECURSIVE, _PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18  # of mount
_DETACH = 2  # of umount2
_READ_ONLY, _NO_SET_ID, _NO_DEVICES = 1, 2, 4  # attributes of mount_setattr
_HERE, _WHOLE_TREE = -100, 0x8000
_MOUNT_SETATTR = 442
_PR_SET_PDEATHSIG = 1
_TOP, _HOST = '/tmp', '/.host'  # where the new root is made, and the old one seen from there
_NUM_FILES = 4096
_ENVIRONMENT = {'HOME': '/tmp', 'LANG': 'C.UTF-8', 'PYTHONHASHSEED': '0'}
# No bytecode is written, no path is added to the module path, no site or user packages are there.
_PYTHON_FLAGS = ('-B', '-P', '-s', '-S', '-X', 'utf8')


@dataclass(frozen=True)
class Caller:
  """The process that asks for an isolated one.

  process, user, group: its ids.
  python: the real path of the Python that runs it.
  readable: what this Python reads: its library, itself, and the shared libraries of the system.
  """

  process: int
  user: int
  group: int
  python: str
  readable: tuple[str, ...]

  @property
  def is_root(self) -> bool:
    """Whether it may take any user."""
    return self.user == 0


def this_process() -> Caller:
  """This process as a caller."""
  python = os.path.realpath(sys.executable)
  seen: list[str] = []
  for path in (os.path.realpath(os.path.dirname(os.__file__)),
               os.path.realpath(f'{sys.base_prefix}/lib'), python, '/lib', '/lib64', '/usr/lib',
               '/usr/lib64', '/etc/ld.so.cache'):
    if os.path.lexists(path) and path not in seen:
      seen.append(path)
  # What lies in a folder that is shown is shown with it.
  outer = [p for p in seen if not any(p.startswith(f'{q}/') for q in seen)]
  return Caller(os.getpid(), os.geteuid(), os.getegid(), python, tuple(outer))


def become(caller: Caller, arguments: Sequence[str], files: Mapping[str, bytes],
           limits: cfg.Interpreter, out: int, status: int) -> NoReturn:
  """Turns this fresh process into Python in isolation; what fails is told on `status`."""
  try:
    _place(out, status)
    os.umask(0o022)
    os.setsid()
    user = _unused_user(caller.process) if caller.is_root else None
    if user is None:
      _map_user(caller)
    _call('sethostname', b'sandbox', 7)
    _build_root(caller.readable, files, limits.disk_mib)
    _bound(limits)
    if user is not None:
      os.setgroups([])
      os.setresgid(user, user, user)
      os.setresuid(user, user, user)
    _call('prctl', _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not seccomp.install(seccomp.PROGRAM):
      raise OSError('the kernel filters no system calls')
    os.execve(caller.python, [caller.python, *_PYTHON_FLAGS, *arguments], _ENVIRONMENT)
  except OSError as error:
    place = f' of {error.filename}' if error.filename else ''
    line = traceback.extract_tb(error.__traceback__)[-1].name.strip('_').replace('_', ' ')
    _tell(f'{error.strerror or error}{place} at "{line}"')
  except BaseException:
    _tell(traceback.format_exc())
  finally:
    os._exit(1)


def _tell(reason: str) -> None:
  os.write(_STATUS, reason.encode(errors='replace')[:MAX_REASON])


def _place(out: int, status: int) -> None:
  """Leaves an empty input, the output twice, and `_STATUS`; every other descriptor is closed."""
  # Some number of each may be one that another shall have, so that all move high up first.
  nowhere = os.open(os.devnull, os.O_RDWR)
  high = max(out, status, nowhere, 10) + 1
  nowhere, out, status = (os.dup2(fd, high + i) for i, fd in enumerate((nowhere, out, status)))
  for fd, place in ((nowhere, 0), (out, 1), (out, 2), (status, _STATUS)):
    os.dup2(fd, place, inheritable=place != _STATUS)
  os.closerange(_STATUS + 1, os.sysconf('SC_OPEN_MAX'))


# --- The user -------------------------------------------------------------------------


def _unused_user(process: int) -> int:
  """A user that nothing else runs as: counted down from the last that is mapped here."""
  with open('/proc/self/uid_map', encoding='ascii') as file:
    start, _, count = map(int, file.read().splitlines()[-1].split())
  return start + count - 2 - process % max(1, min(1 << 22, count - 1000))


def _map_user(caller: Caller) -> None:
  """Maps the caller's user and group into this process's user namespace, and no other."""
  for name, text in (('setgroups', 'deny'), ('gid_map', f'{caller.group} {caller.group} 1'),
                     ('uid_map', f'{caller.user} {caller.user} 1')):
    with open(f'/proc/self/{name}', 'w', encoding='ascii') as file:
      file.write(text)


# --- The file system --------------------------------------------------------------------


def _build_root(readable: Sequence[str], files: Mapping[str, bytes], disk_mib: int) -> None:
  """Makes a root of what is `readable`, of `files` and of an empty /tmp, and leaves the old one."""
  _mount('none', '/', '', _RECURSIVE | _PRIVATE)
  num_bytes = sum(map(len, files.values()))
  _mount('tmpfs', _TOP, 'tmpfs', _NOSUID | _NODEV, f'size={num_bytes + (1 << 20)},mode=755')
  os.mkdir(_TOP + _HOST)
  _call('syscall', ctypes.c_long(seccomp.machine().pivot_root), os.fsencode(_TOP),
        os.fsencode(_TOP + _HOST))
  os.chdir('/')
  for path in readable:
    _show(path, _NO_DEVICES)
  _show(os.devnull, 0)
  for path, content in files.items():
    with open(path, 'xb') as file:
      file.write(content)
  os.makedirs('/tmp', exist_ok=True)
  _mount('tmpfs', '/tmp', 'tmpfs', _NOSUID | _NODEV | _NOEXEC,
         f'size={disk_mib}m,nr_inodes={_NUM_FILES},mode=1777')
  _call('umount2', os.fsencode(_HOST), _DETACH)
  os.rmdir(_HOST)
  _restrict('/', _NO_DEVICES, 0)
  os.chdir('/tmp')


def _show(path: str, attributes: int) -> None:
  """Shows a folder, file, device or link of the old root at its own path, read-only."""
  source = _HOST + path
  os.makedirs(os.path.dirname(path), exist_ok=True)
  if os.path.islink(source):
    os.symlink(os.readlink(source), path)
    return
  if os.path.isdir(source):
    os.mkdir(path)
  else:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL))
  _mount(source, path, '', _BIND | _RECURSIVE)
  _restrict(path, attributes, _WHOLE_TREE)


def _restrict(path: str, attributes: int, flags: int) -> None:
  """Makes a mount read-only and blind to set-user-ID bits."""
  setting = struct.pack('QQQQ', _READ_ONLY | _NO_SET_ID | attributes, 0, 0, 0)
  _call('syscall', ctypes.c_long(_MOUNT_SETATTR), ctypes.c_long(_HERE), os.fsencode(path),
        ctypes.c_long(flags), setting, ctypes.c_long(len(setting)))


def _mount(source: str, target: str, kind: str, flags: int, data: str = '') -> None:
  _call('mount', os.fsencode(source), os.fsencode(target), os.fsencode(kind),
        ctypes.c_ulong(flags), os.fsencode(data))


def _call(name: str, *arguments: object) -> None:
  """Calls a function of the C library.

  Raises:
    OSError: it returned a negative number.
  """
  if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
    number = ctypes.get_errno()
    place = next((a.decode(errors='replace') for a in arguments[1:3] if isinstance(a, bytes)), None)
    raise OSError(number, os.strerror(number), place)


# --- Limits ---------------------------------------------------------------------------


def _bound(limits: cfg.Interpreter) -> None:
  """Sets what the process may cost, for good."""
  for which, value in (
      (resource.RLIMIT_AS, limits.memory_mib << 20), (resource.RLIMIT_CPU, limits.cpu_seconds),
      (resource.RLIMIT_FSIZE, limits.disk_mib << 20), (resource.RLIMIT_NOFILE, 64),
      (resource.RLIMIT_NPROC, 1 + limits.threads), (resource.RLIMIT_CORE, 0),
      (resource.RLIMIT_MEMLOCK, 0), (resource.RLIMIT_MSGQUEUE, 0)):
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))
