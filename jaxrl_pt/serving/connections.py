"""Limits on connections that have not yet sent a request.

uvicorn waits for a request's headers for ever and accepts as many connections as there are file
descriptors. A few hundred connections that never finish their headers would lock everyone out
before any token is checked. Here headers have to arrive in time, and where there are too many
connections, the one that has been at its headers for longest is closed.
"""

import asyncio
import resource
from typing import Any

import h11
from starlette.types import ASGIApp
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
_MOST_CONNECTIONS = 1024
# File descriptors that are kept free for the process itself, the engine and libraries.
_OTHER_DESCRIPTORS = 64

_TOO_LATE = (b'HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n')
_TOO_MANY = (b'HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n'
             b'Content-Length: 0\r\n\r\n')


def most_connections() -> int:
  """How many connections fit into the process's file descriptors, beside its own ones."""
  files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  if files == resource.RLIM_INFINITY:
    return _MOST_CONNECTIONS
  return max(1, min(_MOST_CONNECTIONS, files - _OTHER_DESCRIPTORS, files // 2))


def server_config(app: ASGIApp, *, shutdown_seconds: int, most: int | None = None,
                  header_seconds: float = HEADER_SECONDS) -> uvicorn.Config:
  """uvicorn's settings for an application, with both limits.

  Args:
    app: an ASGI application, such as `app.make_app` returns.
    shutdown_seconds: how long a server that ends waits for the answers under way.
    most: the largest number of connections at a time; None takes `most_connections`.
    header_seconds: how long a request's headers may take, counted from the start of the connection
      or from the end of the answer before.
  """
  protocol = _limited(most_connections() if most is None else most, header_seconds)
  return uvicorn.Config(app, http=protocol, ws='none', log_level='warning', access_log=False,
                        timeout_graceful_shutdown=shutdown_seconds)


def _limited(most: int, header_seconds: float) -> type[asyncio.Protocol]:
  """The class of the connections of one server."""
  # Connections that are at their headers, the longest first, and the timers that end them.
  waiting: dict[asyncio.Protocol, asyncio.TimerHandle] = {}

  class Connection(H11Protocol):
    """A connection that has to send its headers in time."""

    def connection_made(self, transport: Any) -> None:
      super().connection_made(transport)
      if len(self.connections) > most:
        oldest = next(iter(waiting), self)
        assert isinstance(oldest, Connection)
        oldest.refuse(_TOO_MANY)
      self.watch()

    def data_received(self, data: bytes) -> None:
      if not self.transport.is_closing():
        super().data_received(data)
      self.watch()

    def on_response_complete(self) -> None:
      super().on_response_complete()
      self.watch()

    def connection_lost(self, exc: Exception | None) -> None:
      self.forget()
      super().connection_lost(exc)

    def watch(self) -> None:
      """Starts the timer where headers are due, and stops it once they are there."""
      if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
        self.forget()
      elif self not in waiting:
        waiting[self] = self.loop.call_later(header_seconds, self.refuse, _TOO_LATE)

    def forget(self) -> None:
      if timer := waiting.pop(self, None):
        timer.cancel()

    def refuse(self, answer: bytes) -> None:
      self.forget()
      # Between two requests a client expects no answer, and the connection is just closed.
      if self.cycle is None:
        self.transport.write(answer)
      self.transport.close()
      # It no longer counts, although the peer may take its time to close it.
      self.connections.discard(self)

  return Connection
