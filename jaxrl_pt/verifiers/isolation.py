"""Runs Python in a process that sees and reaches nothing of this machine.

    finished = isolation.run(['/main.py'], {'/main.py': b'print(6 * 7)'}, cfg.Interpreter())

Each run is one fresh process, pid 1 of namespaces of its own, and is never reused:

    mounts      the standard library and the shared libraries, read-only; the given files; an empty
                /tmp in memory. No home, no /etc, no /proc, no program but Python
    network     a namespace without an interface
    processes   a namespace of its own, so that whatever it starts ends with it
    user        where root starts it, a user that nobody else is; else a user namespace
    limits      memory, processor time, threads, sizes of files
    calls       `seccomp.PROGRAM`: no fork, no socket, no mount, no tracing, no new namespace

Where one of these cannot be had nothing runs: `run` raises NotIsolatedError. It needs Linux 5.12 or
later on x86-64 or ARM64, and a caller with a single thread.
"""

from collections.abc import Mapping, Sequence
import ctypes
from dataclasses import dataclass
import os
import select
import signal
import time

from jaxrl_pt import config as cfg
from jaxrl_pt.verifiers import isolated, seccomp

# Flags of clone: new mounts, host name, IPC, process ids and network; and a new user namespace.
_NEW_NAMESPACES = 0x20000 | 0x4000000 | 0x8000000 | 0x20000000 | 0x40000000
_NEW_USER = 0x10000000
_START_SECONDS = 60.0  # A busy machine may take long until Python starts.
_CHUNK = 1 << 16


class NotIsolatedError(Exception):
  """This machine does not give the isolation; the message says what is missing."""


class KilledError(Exception):
  """Somebody, or the kernel for want of memory, has killed the process: it says nothing of it."""


@dataclass(frozen=True)
class Finished:
  """How a run has ended.

  output: the first bytes that it wrote to standard output and error.
  is_cut: whether it wrote more.
  code: its exit code; −n where signal n has ended it.
  is_late: whether it was ended because its time of the processor or of the clock was used up.
  """

  output: bytes
  is_cut: bool
  code: int
  is_late: bool


def run(arguments: Sequence[str], files: Mapping[str, bytes], limits: cfg.Interpreter,
        most_output: int) -> Finished:
  """Runs this Python with `arguments` in isolation and waits for its end.

  Args:
    arguments: what follows the interpreter's name, with paths as the process sees them.
    files: content of read-only files by absolute path.
    limits: what the process may cost.
    most_output: how many bytes of its output are kept; it may write more.

  Raises:
    NotIsolatedError: this machine does not give the isolation; nothing has run.
    KilledError: the process was killed from outside.
  """
  if not seccomp.is_known():
    raise NotIsolatedError('it needs Linux on x86-64 or ARM64')
  caller = isolated.this_process()
  out, out_w = os.pipe()
  status, status_w = os.pipe()
  try:
    pid = _cloned(caller)
    if pid == 0:
      isolated.become(caller, arguments, files, limits, out_w, status_w)
  except NotIsolatedError:
    os.close(out)
    os.close(status)
    raise
  finally:
    os.close(out_w)
    os.close(status_w)
  process = os.pidfd_open(pid)
  try:
    _await_start(status)
    output, is_cut, in_time = _heard(process, out, time.monotonic() + limits.wall_seconds,
                                     most_output)
  finally:
    os.kill(pid, signal.SIGKILL)  # It has not been waited for, so that the id is still its own.
    _, how, used = os.wait4(pid, 0)
    for fd in (process, out, status):
      os.close(fd)
  code = os.waitstatus_to_exitcode(how)
  # The kernel counts the limit in ticks of its clock, which may run ahead of the time used. Nothing
  # in the process can send it this signal, since it is the first of its namespace.
  used_up = code == -signal.SIGKILL and used.ru_utime + used.ru_stime > limits.cpu_seconds / 2
  if code == -signal.SIGKILL and in_time and not used_up:
    raise KilledError('the isolated process was killed from outside')
  return Finished(output, is_cut, code, not in_time or used_up)


def probe() -> None:
  """Runs a small program in isolation.

  Raises:
    NotIsolatedError: this machine does not give the isolation.
  """
  finished = run(['-c', 'print(6 * 7)'], {}, cfg.Interpreter(), 1000)
  if finished.output != b'42\n':
    said = finished.output.decode(errors='replace').strip()[-200:]
    raise NotIsolatedError(f'Python does not start there (code {finished.code}: {said})')


def _cloned(caller: isolated.Caller) -> int:
  """Forks into new namespaces: 0 in the child, its process id here.

  `unshare` would take a second process, which would have to be watched too. PyDLL keeps the
  interpreter's lock, so that the child has it.
  """
  flags = _NEW_NAMESPACES | (0 if caller.is_root else _NEW_USER) | signal.SIGCHLD
  libc = ctypes.PyDLL(None, use_errno=True)
  libc.syscall.restype = ctypes.c_long
  pid = int(libc.syscall(*map(ctypes.c_long, (seccomp.machine().clone, flags, 0, 0, 0, 0))))
  if pid < 0:
    raise NotIsolatedError('the kernel refuses new namespaces '
                           f'({os.strerror(ctypes.get_errno())})')
  return pid


def _await_start(status: int) -> None:
  """Waits until the child has become Python, which closes its end of `status`.

  Raises:
    NotIsolatedError: it could not; the child has said why.
  """
  poller = select.poll()
  poller.register(status, select.POLLIN)
  if not poller.poll(_START_SECONDS * 1000):
    raise NotIsolatedError(f'Python did not start there in {_START_SECONDS:g} s')
  if reason := os.read(status, isolated.MAX_REASON):
    raise NotIsolatedError(reason.decode(errors='replace'))


def _heard(process: int, out: int, end: float, most: int) -> tuple[bytes, bool, bool]:
  """Reads what a process writes until it ends or the time is up.

  Returns:
    The first `most` bytes, whether there were more, and whether it ended in time.
  """
  os.set_blocking(out, False)
  poller = select.poll()
  poller.register(process, select.POLLIN)
  poller.register(out, select.POLLIN)
  output, num_bytes = bytearray(), 0
  has_ended = False
  while not has_ended:
    ready = dict(poller.poll(max(0.0, end - time.monotonic()) * 1000 + 1))
    has_ended = process in ready
    while out in ready:
      try:
        part = os.read(out, _CHUNK)
      except BlockingIOError:
        break
      if not part:  # It has closed its output and may still be running.
        poller.unregister(out)
        break
      num_bytes += len(part)
      output += part[:most - len(output)]
      if time.monotonic() > end:
        break
    if not has_ended and time.monotonic() > end:
      return bytes(output), num_bytes > most, False
  return bytes(output), num_bytes > most, True
