"""Sandboxes of the processes that verify, which the kernel enforces; no library is needed.

`enter_tight` is for the verifiers of this package, whose libraries read hostile text. The process
may compute, read files and write its result. It may start no process or thread, open no file for
writing, open no socket, send no signal, and change no limit. `enter_open` is for a user's own
function, which may do all that the user may, within a bound on memory and without core files.

The tight sandbox is a list of allowed system calls (seccomp, on Linux on x86-64 and ARM64) and
resource limits (on every Unix).
"""

from collections.abc import Mapping
import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import tempfile
import time

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
_SECCOMP_MODE_FILTER = 2
# Instructions of classic BPF: load a word, jump if equal, jump if a bit is set, return.
_LOAD, _JUMP_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _FAIL, _KILL = 0x7fff0000, 0x00050000, 0x80000000
_EPERM = 1
_REAP_SECONDS = 2.0
# Offsets in struct seccomp_data of the call's number, its ABI and the low half of argument n.
_NUMBER, _ABI, _ARGUMENT = 0, 4, lambda n: 16 + 8 * n
# Flags that open a file for anything but reading: O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND,
# and the bit that only O_TMPFILE has.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000

# System calls that a computing Python makes, with their numbers on (x86-64, ARM64); None where an
# ABI lacks the call.
_CALLS: Mapping[str, tuple[int | None, int | None]] = {
    'read': (0, 63), 'write': (1, 64), 'close': (3, 57), 'stat': (4, None), 'fstat': (5, 80),
    'lstat': (6, None), 'poll': (7, None), 'ppoll': (271, 73), 'lseek': (8, 62),
    'pread64': (17, 67), 'readv': (19, 65), 'newfstatat': (262, 79), 'statx': (332, 291),
    'access': (21, None), 'faccessat': (269, 48), 'faccessat2': (439, 439),
    'readlink': (89, None), 'readlinkat': (267, 78), 'getdents64': (217, 61), 'getcwd': (79, 17),
    'mmap': (9, 222), 'mprotect': (10, 226), 'munmap': (11, 215), 'brk': (12, 214),
    'mremap': (25, 216), 'madvise': (28, 233), 'membarrier': (324, 283),
    'rt_sigaction': (13, 134), 'rt_sigprocmask': (14, 135), 'rt_sigreturn': (15, 139),
    'sigaltstack': (131, 132), 'restart_syscall': (219, 128), 'setitimer': (38, 103),
    'getitimer': (36, 102), 'futex': (202, 98), 'set_robust_list': (273, 99), 'rseq': (334, 293),
    'sched_yield': (24, 124), 'sched_getaffinity': (204, 123), 'getcpu': (309, 168),
    'getrandom': (318, 278), 'clock_gettime': (228, 113), 'clock_getres': (229, 114),
    'clock_nanosleep': (230, 115), 'nanosleep': (35, 101), 'gettimeofday': (96, 169),
    'time': (201, None), 'times': (100, 153), 'getrusage': (98, 165), 'sysinfo': (99, 179),
    'uname': (63, 160), 'getpid': (39, 172), 'getppid': (110, 173), 'gettid': (186, 178),
    'getuid': (102, 174), 'geteuid': (107, 175), 'getgid': (104, 176), 'getegid': (108, 177),
    'exit': (60, 93), 'exit_group': (231, 94),
}
# Machine → (column of `_CALLS`, the kernel's number of the ABI, numbers of open and openat).
MACHINES: Mapping[str, tuple[int, int, int | None, int]] = {
    'x86_64': (0, 0xc000003e, 2, 257), 'aarch64': (1, 0xc00000b7, None, 56)}


# --- The life of a process ----------------------------------------------------------


def _prctl(option: int, argument: int) -> None:
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(option, argument, 0, 0, 0)


def die_with_parent(parent: int) -> None:
  """Makes the death of this process's parent kill this process, too.

  Args:
    parent: process id of the parent.
  """
  _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:  # The parent died before this call.
    os._exit(0)


def adopt_orphans() -> None:
  """Makes descendants whose parent dies children of this process, whatever their session."""
  _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int) -> list[int]:
  """Ids of the processes below `pid`, at any depth, from /proc; [] where there is no /proc."""
  children: dict[int, list[int]] = {}
  try:
    names = os.listdir('/proc')
  except OSError:
    return []
  for name in filter(str.isdecimal, names):
    try:
      with open(f'/proc/{name}/stat', 'rb') as file:
        parent = int(file.read().rpartition(b')')[2].split()[1])
    except (OSError, IndexError, ValueError):  # The process has just ended.
      continue
    children.setdefault(parent, []).append(int(name))
  below, todo = [], [pid]
  while todo:
    for child in children.get(todo.pop(), []):
      below.append(child)
      todo.append(child)
  return below


def kill_descendants() -> None:
  """Ends all processes below this one, which has called `adopt_orphans`.

  All are stopped before any is killed, so that none can start others faster than they die.
  """
  me = os.getpid()
  stopped: set[int] = set()
  while fresh := set(descendants(me)) - stopped:
    for pid in fresh:
      _signal(pid, signal.SIGSTOP)
    stopped |= fresh
  for pid in stopped:
    _signal(pid, signal.SIGKILL)
  deadline = time.monotonic() + _REAP_SECONDS  # A process that changed its user cannot be killed.
  try:
    while time.monotonic() < deadline:
      if os.waitpid(-1, os.WNOHANG)[0] == 0:
        time.sleep(0.001)
  except ChildProcessError:  # No child is left.
    pass


def kill_marked(mark: str) -> None:
  """Ends the processes whose environment holds `mark`, which a killed supervisor has left."""
  if not os.path.isdir('/proc'):
    return
  for name in filter(str.isdecimal, os.listdir('/proc')):
    try:
      with open(f'/proc/{name}/environ', 'rb') as file:
        is_marked = mark.encode() in file.read()
    except OSError:  # The process is another user's, or has just ended.
      continue
    if is_marked:
      _signal(int(name), signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
  try:
    os.kill(pid, number)
  except (ProcessLookupError, PermissionError):  # It has ended or changed its user.
    pass


# --- The sandboxes ------------------------------------------------------------------


def enter_open(memory_mib: int) -> None:
  """Enters the sandbox for a user's own function: bounded memory and no core file."""
  _limit(resource.RLIMIT_CORE, 0)
  _limit(resource.RLIMIT_AS, memory_mib << 20)


def enter_tight(memory_mib: int) -> bool:
  """Enters the sandbox for libraries that read hostile text.

  Returns:
    Whether the kernel filters system calls too.
  """
  enter_open(memory_mib)
  sys.dont_write_bytecode = True
  empty = tempfile.mkdtemp()
  os.chdir(empty)
  os.rmdir(empty)  # Nothing can be created in a directory that is gone.
  _limit(resource.RLIMIT_FSIZE, 0)
  _limit(resource.RLIMIT_NPROC, 0)
  return _filter_calls()


def _limit(which: int, value: int) -> None:
  _, hard = resource.getrlimit(which)
  if hard != resource.RLIM_INFINITY:
    value = min(value, hard)
  resource.setrlimit(which, (value, value))


def _filter_calls() -> bool:
  if sys.platform != 'linux' or platform.machine() not in MACHINES or sys.maxsize < 2**32:
    return False
  program = _program(platform.machine())
  code = ctypes.create_string_buffer(b''.join(program), 8 * len(program))
  header = struct.pack('HxxxxxxP', len(program), ctypes.addressof(code))
  argument = ctypes.create_string_buffer(header, len(header))
  libc = ctypes.CDLL(None, use_errno=True)
  pointer = ctypes.c_void_p(ctypes.addressof(argument))
  if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
    return False
  return int(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointer, 0, 0)) == 0


def _program(machine: str) -> list[bytes]:
  """The filter's instructions.

  They kill on a foreign ABI, allow the listed calls and opening for reading, and fail all other
  calls with EPERM.
  """
  column, abi, open_number, openat_number = MACHINES[machine]
  numbers = sorted(n for pair in _CALLS.values() if (n := pair[column]) is not None)

  def step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack('HBBI', code, then, otherwise, value)

  program = [step(_LOAD, _ABI), step(_JUMP_EQUAL, abi, 1), step(_RETURN, _KILL),
             step(_LOAD, _NUMBER)]
  opens = [(openat_number, 2)] + ([] if open_number is None else [(open_number, 1)])
  for number, flags in opens:
    program += [step(_JUMP_EQUAL, number, 0, 4), step(_LOAD, _ARGUMENT(flags)),
                step(_JUMP_SET, _WRITING, 0, 1), step(_RETURN, _FAIL | _EPERM),
                step(_RETURN, _ALLOW)]
  for number in numbers:
    program += [step(_JUMP_EQUAL, number, 0, 1), step(_RETURN, _ALLOW)]
  return [*program, step(_RETURN, _FAIL | _EPERM)]
