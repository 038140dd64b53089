"""Filters of system calls, which the Linux kernel enforces; no library is needed.

A filter is a list of allowed calls: all others fail with EPERM, and a call of a foreign ABI kills
the process. `install(TIGHT)` is for code of ours that reads hostile text: it may compute and read
files. `install(PROGRAM)` is for a whole program in a file system of its own: it may also write
files and start threads, and execute what that file system holds.

The numbers are those of the kernel's asm/unistd_64.h (x86-64) and asm-generic/unistd.h (ARM64).
"""

from collections.abc import Mapping
import ctypes
from dataclasses import dataclass
import platform
import struct
import sys

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2
# Instructions of classic BPF: load a word, jump if equal, jump if a bit is set, return.
_LOAD, _JUMP_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _FAIL, _KILL = 0x7fff0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
# Offsets in struct seccomp_data of the call's number, its ABI and the low half of argument n.
_NUMBER, _ABI, _ARGUMENT = 0, 4, lambda n: 16 + 8 * n
# Flags that open a file for anything but reading: O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND,
# and the bit that only O_TMPFILE has.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000
_CLONE_THREAD = 0x10000
# CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
_CLONE_NEW = 0x80 | 0x20000 | 0x7e000000

# FIOCLEX, FIONCLEX, FIONBIO and TCGETS: what a descriptor does at execve, whether it waits, and
# whether it is a terminal.
_HARMLESS_CONTROLS = (0x5451, 0x5450, 0x5401, 0x5421)

# System calls that a computing Python makes, with their numbers on (x86-64, ARM64); None where an
# ABI lacks the call.
_Calls = Mapping[str, tuple[int | None, int | None]]
_COMPUTING: _Calls = {
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
# What a program of its own makes beside these: it is executed, writes files, waits, lowers limits.
_RUNNING: _Calls = {
    'execve': (59, 221), 'set_tid_address': (218, 96), 'arch_prctl': (158, None),
    'prlimit64': (302, 261), 'getrlimit': (97, 163), 'setrlimit': (160, 164),
    'pwrite64': (18, 68), 'writev': (20, 66), 'preadv': (295, 69), 'pwritev': (296, 70),
    'sendfile': (40, 71), 'copy_file_range': (326, 285), 'fallocate': (285, 47),
    'truncate': (76, 45), 'ftruncate': (77, 46), 'fsync': (74, 82), 'fdatasync': (75, 83),
    'fadvise64': (221, 223), 'flock': (73, 32), 'msync': (26, 227),
    'dup': (32, 23), 'dup2': (33, None), 'dup3': (292, 24), 'pipe': (22, None), 'pipe2': (293, 59),
    'fcntl': (72, 25), 'close_range': (436, 436), 'chdir': (80, 49), 'fchdir': (81, 50),
    'mkdir': (83, None), 'mkdirat': (258, 34), 'rmdir': (84, None), 'unlink': (87, None),
    'unlinkat': (263, 35), 'rename': (82, None), 'renameat': (264, 38), 'renameat2': (316, 276),
    'link': (86, None), 'linkat': (265, 37), 'symlink': (88, None), 'symlinkat': (266, 36),
    'chmod': (90, None), 'fchmod': (91, 52), 'fchmodat': (268, 53), 'umask': (95, 166),
    'utimensat': (280, 88), 'statfs': (137, 43), 'fstatfs': (138, 44),
    'select': (23, None), 'pselect6': (270, 72), 'epoll_create': (213, None),
    'epoll_create1': (291, 20), 'epoll_ctl': (233, 21), 'epoll_wait': (232, None),
    'epoll_pwait': (281, 22), 'eventfd2': (290, 19), 'socketpair': (53, 199),
    'sendto': (44, 206), 'recvfrom': (45, 207),
    'kill': (62, 129), 'tgkill': (234, 131), 'alarm': (37, None), 'pause': (34, None),
    'rt_sigpending': (127, 136), 'rt_sigsuspend': (130, 133), 'rt_sigtimedwait': (128, 137),
    'wait4': (61, 260), 'waitid': (247, 95), 'getpgid': (121, 155), 'getpgrp': (111, None),
    'getsid': (124, 156), 'getgroups': (115, 158), 'getresuid': (118, 148),
    'getresgid': (120, 150), 'getpriority': (140, 141),
    'sched_getparam': (143, 121), 'sched_getscheduler': (145, 120),
}


@dataclass(frozen=True)
class Machine:
  """What differs between machines: the column of a table of calls, the ABI, and some numbers."""

  column: int
  abi: int
  open: int | None
  openat: int
  clone: int
  clone3: int
  ioctl: int
  pivot_root: int


MACHINES: Mapping[str, Machine] = {
    'x86_64': Machine(0, 0xc000003e, 2, 257, 56, 435, 16, 155),
    'aarch64': Machine(1, 0xc00000b7, None, 56, 220, 435, 29, 41)}


@dataclass(frozen=True)
class Filter:
  """Which system calls are allowed.

  calls: tables of calls that are always allowed.
  whole: whether it is for a whole program, which opens files for writing, starts threads and asks
    whether a descriptor is a terminal. Opening for reading is always allowed, a process never.
  """

  calls: tuple[_Calls, ...]
  whole: bool


TIGHT = Filter((_COMPUTING,), whole=False)
PROGRAM = Filter((_COMPUTING, _RUNNING), whole=True)


def is_known() -> bool:
  """Whether this machine is one whose system calls this file knows: Linux on x86-64 or ARM64."""
  return sys.platform == 'linux' and platform.machine() in MACHINES and sys.maxsize > 2**32


def machine() -> Machine:
  """The numbers of this machine, which `is_known`."""
  return MACHINES[platform.machine()]


def install(allowed: Filter) -> bool:
  """Puts this process and all that it starts under a filter, which nothing takes away again.

  Returns:
    Whether the kernel does filter; False on an unknown machine.
  """
  if not is_known():
    return False
  program = _program(machine(), allowed)
  code = ctypes.create_string_buffer(b''.join(program), 8 * len(program))
  header = struct.pack('HxxxxxxP', len(program), ctypes.addressof(code))
  argument = ctypes.create_string_buffer(header, len(header))
  libc = ctypes.CDLL(None, use_errno=True)
  pointer = ctypes.c_void_p(ctypes.addressof(argument))
  if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
    return False
  return int(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointer, 0, 0)) == 0


def _step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
  """One instruction: `then` and `otherwise` are how many instructions a jump leaves out."""
  return struct.pack('HBBI', code, then, otherwise, value)


def _program(of: Machine, allowed: Filter) -> list[bytes]:
  """The filter's instructions."""
  program = [_step(_LOAD, _ABI), _step(_JUMP_EQUAL, of.abi, 1), _step(_RETURN, _KILL),
             _step(_LOAD, _NUMBER)]
  opens = [(of.openat, 2)] + ([] if of.open is None else [(of.open, 1)])
  for number, flags in opens:
    refused = 0 if allowed.whole else _WRITING
    program += [_step(_JUMP_EQUAL, number, 0, 4), _step(_LOAD, _ARGUMENT(flags)),
                _step(_JUMP_SET, refused, 0, 1), _step(_RETURN, _FAIL | _EPERM),
                _step(_RETURN, _ALLOW)]
  if allowed.whole:
    # The flags of clone3 lie in memory, which no filter can read. Told that the kernel has no
    # clone3, the C library takes clone instead.
    program += [_step(_JUMP_EQUAL, of.clone3, 0, 1), _step(_RETURN, _FAIL | _ENOSYS),
                _step(_JUMP_EQUAL, of.clone, 0, 5), _step(_LOAD, _ARGUMENT(0)),
                _step(_JUMP_SET, _CLONE_NEW, 1), _step(_JUMP_SET, _CLONE_THREAD, 1),
                _step(_RETURN, _FAIL | _EPERM), _step(_RETURN, _ALLOW)]
    program += [_step(_JUMP_EQUAL, of.ioctl, 0, 2 + 2 * len(_HARMLESS_CONTROLS)),
                _step(_LOAD, _ARGUMENT(1))]
    for control in _HARMLESS_CONTROLS:
      program += [_step(_JUMP_EQUAL, control, 0, 1), _step(_RETURN, _ALLOW)]
    program += [_step(_RETURN, _FAIL | _EPERM)]
  numbers = [pair[of.column] for table in allowed.calls for pair in table.values()]
  for number in sorted(n for n in numbers if n is not None):
    program += [_step(_JUMP_EQUAL, number, 0, 1), _step(_RETURN, _ALLOW)]
  return [*program, _step(_RETURN, _FAIL | _EPERM)]
