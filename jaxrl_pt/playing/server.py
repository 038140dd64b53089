"""The HTTP server of the page: a page, the game's facts, and a few requests of JSON.

    GET / the page, GET /facts
    POST /games {"seed": 7} → its id and state
    POST /games/ID/step {"action": 2}        POST /games/ID/paint {"cell": [0, 5], "content": "red"}
    POST /games/ID/counters {"values": [7]}  POST /games/ID/switches {"map": false}
    POST /games/ID/restart {"seed": 7}       POST /games/ID/close

A tab has one request under way; a second one to the same game is answered 429 at once, so that keys
that are pressed faster than frames are drawn queue nowhere. Only requests that name this machine as
their host are answered, and only JSON is taken, which the page of another site cannot send. At any
other address than a loopback one, requests need the token that the command has printed.
"""

from collections.abc import Callable
import hmac
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
import json
import secrets
import socket
import sys
import threading
from typing import Any

from jaxrl_pt.errors import UserError
from jaxrl_pt.playing.rooms import Room, Rooms
from jaxrl_pt.serving.addresses import is_loopback

_MOST_BYTES = 2**14  # of a request
_MOST_REQUESTS = 64  # at a time; more are turned away
_SECONDS = 30.0  # for a request to come, on a connection that is kept


class Refused(Exception):
  """A request that is answered with an error; its text is for a person."""

  def __init__(self, status: HTTPStatus, text: str) -> None:
    super().__init__(text)
    self.status = status


class Server(ThreadingHTTPServer):
  """One process: a thread for each connection, of which there are not many. Final."""

  daemon_threads = True
  # Two servers at one port would share out the games between them.
  allow_reuse_port = False
  request_queue_size = 128

  def __init__(self, host: str, port: int, rooms: Rooms, facts: dict[str, Any]) -> None:
    """Listens.

    Raises:
      UserError: the address is taken, or none of this machine's.
    """
    self.rooms, self.facts = rooms, facts
    self.token = '' if is_loopback(host) else secrets.token_urlsafe(16)
    self.page = resources.files('jaxrl_pt.playing').joinpath('page.html').read_bytes()
    self._free = threading.BoundedSemaphore(_MOST_REQUESTS)
    if ':' in host:
      self.address_family = socket.AF_INET6
    try:
      super().__init__((host.strip('[]'), port), _Handler)
    except (OSError, OverflowError) as e:
      raise UserError(f'Cannot listen at {host}:{port} ({e}): choose another --host or --port, or '
                      'end the server that is there.') from e

  @property
  def url(self) -> str:
    """Where a browser finds the page."""
    host, port = self.server_address[:2]
    name = f'[{host!s}]' if ':' in str(host) else str(host)
    return f'http://{name}:{port}/' + (f'#{self.token}' if self.token else '')

  def process_request(self, request: Any, client_address: Any) -> None:
    """Starts a thread for a connection, or closes it where there are too many."""
    if not self._free.acquire(blocking=False):
      self.shutdown_request(request)
      return
    try:
      super().process_request(request, client_address)
    except BaseException:
      self._free.release()
      raise

  def process_request_thread(self, request: Any, client_address: Any) -> None:
    """Answers a connection's requests."""
    try:
      super().process_request_thread(request, client_address)
    finally:
      self._free.release()

  def handle_error(self, request: Any, client_address: Any) -> None:
    """A browser that leaves in the middle of an answer is no defect of the server."""
    if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
      super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
  """Answers the requests of one connection."""

  protocol_version = 'HTTP/1.1'
  timeout = _SECONDS
  disable_nagle_algorithm = True
  server: Server

  def do_GET(self) -> None:
    """The page and the facts."""
    self._answer(self._get)

  def do_POST(self) -> None:
    """What changes a game."""
    self._answer(self._post)

  def log_message(self, format: str, *args: Any) -> None:
    """A request a frame is nothing to write down."""

  def _answer(self, act: Callable[[], tuple[str, bytes]]) -> None:
    status = HTTPStatus.OK
    try:
      self._check_sender()
      kind, body = act()
    except Refused as e:
      status, kind, body = e.status, *_json({'error': str(e)})
    except UserError as e:
      status, kind, body = HTTPStatus.BAD_REQUEST, *_json({'error': str(e)})
    self.send_response(status)
    self.send_header('Content-Type', kind)
    self.send_header('Content-Length', str(len(body)))
    self.send_header('Cache-Control', 'no-store')
    self.send_header('Content-Security-Policy',
                     "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'")
    if status != HTTPStatus.OK:  # What is left of the request is not read.
      self.send_header('Connection', 'close')
      self.close_connection = True
    self.end_headers()
    self.wfile.write(body)

  def _check_sender(self) -> None:
    """Refuses pages of other sites, and strangers.

    Raises:
      Refused: another host is named, or the token is not the one.
    """
    if not self.server.token:
      name = self.headers.get('Host', '')
      host, _, port = name.rpartition(':')
      if not is_loopback(host if port.isdecimal() else name):
        raise Refused(HTTPStatus.FORBIDDEN, 'Only requests to this machine are answered.')
    elif self.path != '/' and not hmac.compare_digest(
        self.headers.get('Authorization', '').encode(), f'Bearer {self.server.token}'.encode()):
      raise Refused(HTTPStatus.UNAUTHORIZED, 'Open the address that the command has printed.')

  def _get(self) -> tuple[str, bytes]:
    match self.path:
      case '/':
        return 'text/html; charset=utf-8', self.server.page
      case '/facts':
        return _json(self.server.facts)
    raise _unknown(self.path)

  def _post(self) -> tuple[str, bytes]:
    asked = self._body()
    match self.path.split('/')[1:]:
      case ['games']:
        name, opened = self.server.rooms.open(asked.get('seed', secrets.randbits(32)))
        return _json({'id': name, **opened.state()})
      case ['games', name, 'close']:
        self.server.rooms.close(name)
        return _json({})
      case ['games', name, verb]:
        room = self.server.rooms.find(name)
        if room is None:
          raise Refused(HTTPStatus.NOT_FOUND, 'This game has ended: start a new one.')
        return _json(_done(room, verb, asked, self.path))
    raise _unknown(self.path)

  def _body(self) -> dict[str, Any]:
    """The request's JSON object.

    Raises:
      Refused: it is none, or too large.
    """
    if self.headers.get_content_type() != 'application/json':
      raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, 'Send Content-Type: application/json.')
    length = self.headers.get('Content-Length', '')
    if not length.isdecimal() or int(length) > _MOST_BYTES:
      raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f'Send a Content-Length of at most {_MOST_BYTES}.')
    try:
      value = json.loads(self.rfile.read(int(length)))
    except (ValueError, RecursionError) as e:
      raise Refused(HTTPStatus.BAD_REQUEST, f'That is not JSON ({e}).') from e
    if not isinstance(value, dict):
      raise Refused(HTTPStatus.BAD_REQUEST, 'Send a JSON object.')
    return value


def _json(value: dict[str, Any]) -> tuple[str, bytes]:
  return 'application/json', json.dumps(value).encode()


def _unknown(path: str) -> Refused:
  return Refused(HTTPStatus.NOT_FOUND, f'There is nothing at {path[:80]}.')


def _done(room: Room, verb: str, asked: dict[str, Any], path: str) -> dict[str, Any]:
  """Does what a request asks of a game, and says what is then shown.

  Raises:
    Refused: a frame of this game is being drawn, or there is no such verb.
    UserError: the game cannot do that.
  """
  if not room.lock.acquire(blocking=False):
    raise Refused(HTTPStatus.TOO_MANY_REQUESTS, 'A frame of this game is being drawn.')
  try:
    match verb:
      case 'step':
        room.step(asked.get('action'))
      case 'paint':
        room.paint(asked.get('cell'), asked.get('content'))
      case 'counters':
        room.set_counters(asked.get('values'))
      case 'switches':
        room.switch(asked)
      case 'restart':
        room.restart(asked.get('seed', secrets.randbits(32)))
      case _:
        raise _unknown(path)
    return room.state()
  finally:
    room.lock.release()
