"""Messages between processes: a length, then JSON, with a bound on time and size.

    deadline = Deadline(seconds)              # one deadline for request and answer together
    send(fd, {'response': text}, deadline)
    message = receive(fd, deadline, MAX_RESULT)

The other side may be hostile: it may announce gigabytes, send a byte a second, or send nonsense.
"""

from collections.abc import Mapping
import json
import os
import select
import struct
import time
from typing import Any, Protocol

# Bytes of a message with verdicts; none is longer, names of parts and reasons of crashes included.
MAX_RESULT = 1 << 16
# Bytes of a message that comes from a trusted process: responses of any length pass.
MAX_REQUEST = (1 << 32) - 1
_LENGTH = struct.Struct('>I')
_CHUNK = 1 << 17  # bytes that one system call writes or reads
_LONGEST = 3600.0  # seconds of one wait, which is repeated until the deadline


class Closed(Exception):
  """The other side has closed the channel or died."""


class Malformed(Exception):
  """The bytes that came are no message: they are too many, or not JSON."""


class Deadline:
  """The moment at which all waiting ends, `seconds` from now; None waits for ever. Final."""

  def __init__(self, seconds: float | None) -> None:
    self._end = None if seconds is None else time.monotonic() + seconds

  def check(self) -> None:
    """Raises TimeoutError where the deadline has passed."""
    if self._end is not None and time.monotonic() >= self._end:
      raise TimeoutError

  def poll(self, poller: select.poll, longest: float | None = None) -> list[tuple[int, int]]:
    """Waits for one of the poller's descriptors, for at most `longest` seconds (None: an hour).

    Returns:
      (descriptor, events) as `select.poll` gives them; [] where nothing happened.

    Raises:
      TimeoutError: the deadline has passed.
    """
    self.check()
    waits = [_LONGEST if longest is None else longest]
    if self._end is not None:
      waits.append(self._end - time.monotonic())
    # A millisecond is added, since a wait of 0.4 ms would be rounded to 0 and repeated at once.
    return poller.poll(max(0.0, min(waits)) * 1000 + 1)


class Watch(Protocol):
  """What else is watched while a process waits for a message."""

  def descriptors(self) -> Mapping[int, int]:
    """Descriptors and the events of `select.poll` to watch for; 0 watches only for the other end
    to close."""

  def happened(self, fd: int) -> None:
    """Called when an event has happened at `fd`; an exception that it raises ends the wait."""

  def tick(self) -> None:
    """Called at least once a second; an exception that it raises ends the wait."""


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

  A sender waits for the answer before it sends again, so that bytes behind the message are an
  error.

  Raises:
    TimeoutError: the message was not whole in time.
    Closed: the other side is gone.
    Malformed: the message is longer or not a JSON object, or bytes follow it.
  """
  data = bytearray()
  length: int | None = None
  while length is None or len(data) < length:
    data += _some(fd, deadline, watch)
    if length is None and len(data) >= _LENGTH.size:
      num_bytes, = _LENGTH.unpack(data[:_LENGTH.size])
      if num_bytes > most:
        raise Malformed(f'a message of {num_bytes:,} bytes, where {most:,} are the most')
      length = _LENGTH.size + num_bytes
  if len(data) > length:
    raise Malformed('more than one message')
  try:
    message = json.loads(data[_LENGTH.size:])
  except (ValueError, RecursionError) as error:
    raise Malformed('a message that is not JSON') from error
  if not isinstance(message, dict):
    raise Malformed('a message that is not a JSON object')
  return message


def _some(fd: int, deadline: Deadline, watch: Watch | None) -> bytes:
  """Waits for at least one byte and returns those that have come."""
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
  """Waits until `fd` is ready, and calls the watch meanwhile."""
  while True:
    poller = select.poll()
    poller.register(fd, event)
    for other, events in watch.descriptors().items() if watch is not None else ():
      poller.register(other, events)
    ready = [number for number, _ in deadline.poll(poller, None if watch is None else 1.0)]
    if watch is not None:
      watch.tick()
      for other in ready:
        if other != fd:
          watch.happened(other)
    if fd in ready:
      return
