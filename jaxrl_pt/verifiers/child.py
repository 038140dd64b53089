"""The child process of the pool: `python -m jaxrl_pt.verifiers.child FD`.

Reads requests from a socket and answers them until the parent closes it. It starts clean (no
fork of a process with JAX in it), imports no JAX, and is bounded by the kernel: memory by
RLIMIT_AS, the processor time of a response by a timer whose signal kills. It ends with its
parent.
"""

import ctypes
import json
import os
import random
import resource
import signal
import socket
import struct
import sys
import traceback
from typing import Any

from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import build
from jaxrl_pt.verifiers.judgement import HostVerifier, Judgement, Outcome

_LENGTH = struct.Struct('>I')
_PR_SET_PDEATHSIG = 1


def send(channel: socket.socket, message: dict[str, Any]) -> None:
  """Writes one message: its length, then JSON.

  Raises:
    OSError: the other side is gone or does not read in time.
  """
  data = json.dumps(message).encode()
  channel.sendall(_LENGTH.pack(len(data)) + data)


def receive(channel: socket.socket) -> dict[str, Any] | None:
  """Reads one message; None where the other side has closed or died.

  Raises:
    TimeoutError: nothing came in time.
  """
  header = _exactly(channel, _LENGTH.size)
  data = _exactly(channel, _LENGTH.unpack(header)[0]) if header else None
  message: dict[str, Any] | None = json.loads(data) if data else None
  return message


def _exactly(channel: socket.socket, num_bytes: int) -> bytes | None:
  found = bytearray()
  while len(found) < num_bytes:
    try:
      part = channel.recv(min(num_bytes - len(found), 1 << 20))
    except ConnectionResetError:
      return None
    if not part:
      return None
    found += part
  return bytes(found)


def _bind_life(parent: int, memory_mib: int) -> None:
  """Ends with the parent, keeps off the memory of others, leaves no core file."""
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:  # it was gone before we asked
    os._exit(0)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  limit = memory_mib << 20
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _judge(verify: HostVerifier, names: tuple[str, ...], request: dict[str, Any],
           cpu_seconds: float) -> Judgement:
  random.seed(0)  # a verifier that draws draws the same, whatever was judged before
  signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
  try:
    return build.checked(verify(request['response'], request['reference']), names)
  except Exception as error:  # whatever a verifier raises is an outcome
    where = traceback.extract_tb(error.__traceback__)[-1]
    return Judgement(Outcome.CRASH, detail=f'{type(error).__name__}: {error} '
                                           f'({os.path.basename(where.filename)}:{where.lineno})')
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)


def serve(channel: socket.socket) -> None:
  """Answers requests until the channel closes."""
  settings = receive(channel)
  if settings is None:
    return
  verifier = build.from_json(settings['verifier'])
  try:
    verify = build.host_verifier(verifier)
  except UserError as error:
    send(channel, {'error': str(error)})
    return
  _bind_life(settings['parent'], settings['memory_mib'])
  names = build.part_names(verifier)
  send(channel, {})
  while (request := receive(channel)) is not None:
    judgement = _judge(verify, names, request, settings['cpu_seconds'])
    send(channel, {'outcome': judgement.outcome.value, 'parts': dict(judgement.parts),
                   'detail': judgement.detail})


if __name__ == '__main__':
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  serve(socket.socket(fileno=int(sys.argv[1])))
