"""Sandboxes of the processes that verify, which the kernel enforces; no library is needed.

`enter_tight` is for the verifiers of this package, whose libraries read hostile text. The process
may compute, read files and write its result. It may start no process or thread, open no file for
writing, open no socket, send no signal, and change no limit. `enter_open` is for a user's own
function, which may do all that the user may, within a bound on memory and without core files.

The tight sandbox is a list of allowed system calls (seccomp, on Linux on x86-64 and ARM64) and
resource limits (on every Unix).
"""

import ctypes
import os
import resource
import signal
import sys
import tempfile
import time

from jaxrl_pt.verifiers import seccomp

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_REAP_SECONDS = 2.0


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
  return seccomp.install(seccomp.TIGHT)


def _limit(which: int, value: int) -> None:
  _, hard = resource.getrlimit(which)
  if hard != resource.RLIM_INFINITY:
    value = min(value, hard)
  resource.setrlimit(which, (value, value))
