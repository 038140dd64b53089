"""Messages between processes: a length, then JSON, under one deadline and a bound on their size.

    deadline = Deadline(seconds)              # once for an answer, however many bytes it takes
    send(fd, {'response': text}, deadline)
    message = receive(fd, deadline, MAX_RESULT)

The other side may be hostile: it may promise gigabytes, send a byte a second, or send nonsense.
"""

from collections.abc import Mapping
import json
import os
import select
import struct
import time
from typing import Any, Protocol

# No verdict is longer, names of parts and the reason of a crash included.
MAX_RESULT = 1 << 16
# Between the trainer and a process that it trusts: responses of any length pass.
MAX_REQUEST = (1 << 32) - 1
_LENGTH = struct.Struct('>I')
_CHUNK = 1 << 17
_LONGEST = 3600.0


class Closed(Exception):
  """The other side has closed the channel or died."""


class Malformed(Exception):
  """What came is no message: too long, or not JSON."""


class Deadline:
  """A moment from which nothing is waited for any more; `seconds` None never comes. Final."""

  def __init__(self, seconds: float | None) -> None:
    self._end = None if seconds is None else time.monotonic() + seconds

  def check(self) -> None:
    """Raises TimeoutError where the deadline is over."""
    if self._end is not None and time.monotonic() >= self._end:
      raise TimeoutError

  def poll(self, poller: select.poll, longest: float | None = None) -> list[tuple[int, int]]:
    """Waits for one of the poller's descriptors, at most `longest` seconds or an hour.

    Raises:
      TimeoutError: the deadline is over.
    """
    self.check()
    waits = [_LONGEST if longest is None else longest]
    if self._end is not None:
      waits.append(self._end - time.monotonic())
    # A millisecond more: a wait of 0.4 ms must not become one of none that is repeated at once.
    return poller.poll(max(0.0, min(waits)) * 1000 + 1)


class Watch(Protocol):
  """What is looked after while a message is waited for."""

  def descriptors(self) -> Mapping[int, int]:
    """Descriptors and the events of `select.poll` that are looked for; 0: its other end closes."""

  def happened(self, fd: int) -> None:
    """Something has, at one of them; what it raises ends the wait."""

  def tick(self) -> None:
    """Called at least once a second; what it raises ends the wait."""


def send(fd: int, message: dict[str, Any], deadline: Deadline, watch: Watch | None = None) -> None:
  """Writes one message to a descriptor.

  Raises:
    TimeoutError: the other side did not read it in time.
    Closed: the other side is gone.
  """
  text = json.dumps(message).encode()
  data = memoryview(_LENGTH.pack(len(text)) + text)
  while data:
    try:
      data = data[os.write(fd, data[:_CHUNK]):]
    except BlockingIOError:
      _wait(fd, select.POLLOUT, deadline, watch)
    except OSError as error:
      raise Closed from error


def receive(fd: int, deadline: Deadline, most: int, watch: Watch | None = None) -> dict[str, Any]:
  """Reads one message of at most `most` bytes from a descriptor.

  Who sends waits for the answer before it sends again: bytes behind the message are no message.

  Raises:
    TimeoutError: it was not whole in time.
    Closed: the other side is gone.
    Malformed: it is longer, not a JSON object, or more than one message.
  """
  found = bytearray()
  length: int | None = None
  while length is None or len(found) < length:
    found += _some(fd, deadline, watch)
    if length is None and len(found) >= _LENGTH.size:
      num_bytes, = _LENGTH.unpack(found[:_LENGTH.size])
      if num_bytes > most:
        raise Malformed(f'a message of {num_bytes:,} bytes, where {most:,} are the most')
      length = _LENGTH.size + num_bytes
  if len(found) > length:
    raise Malformed('more than one message')
  try:
    message = json.loads(found[_LENGTH.size:])
  except (ValueError, RecursionError) as error:
    raise Malformed('a message that is not JSON') from error
  if not isinstance(message, dict):
    raise Malformed('a message that is not a JSON object')
  return message


def _some(fd: int, deadline: Deadline, watch: Watch | None) -> bytes:
  """Bytes, at least one, waited for where there are none yet."""
  while True:
    deadline.check()
    try:
      part = os.read(fd, _CHUNK)
    except BlockingIOError:
      _wait(fd, select.POLLIN, deadline, watch)
      continue
    except OSError as error:
      raise Closed from error
    if not part:
      raise Closed
    return part


def _wait(fd: int, event: int, deadline: Deadline, watch: Watch | None) -> None:
  """Until `fd` is ready, looking after the watch's descriptors meanwhile."""
  while True:
    poller = select.poll()
    poller.register(fd, event)
    for other, looked_for in watch.descriptors().items() if watch is not None else ():
      poller.register(other, looked_for)
    ready = [found for found, _ in deadline.poll(poller, None if watch is None else 1.0)]
    if watch is not None:
      watch.tick()
      for other in ready:
        if other != fd:
          watch.happened(other)
    if fd in ready:
      return
