"""The HTTP server: OpenAI's completions, chats and rankings by a judge, answered by one `Worker`.

    POST /v1/completions, /v1/chat/completions, /v1/rerank, /tokenize, /detokenize
    GET /v1/models, /tokenizer_info, /health, /metrics

A request that is wrong, too large or more than the queue takes gets an error and disturbs no other
request. When a client goes away, its responses are cancelled, and their slots and pages are free
again.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
import contextlib
import hmac
import json
import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxrl_pt.errors import UserError
from jaxrl_pt.sampling.engine import Request as EngineRequest
from jaxrl_pt.sampling.engine import Response as Sampled
from jaxrl_pt.serving import protocol, reranking, tokens
from jaxrl_pt.serving.addresses import is_loopback
from jaxrl_pt.serving.answers import Answer, Delta
from jaxrl_pt.serving.bodies import read_body
from jaxrl_pt.serving.fields import ApiError, read_json
from jaxrl_pt.serving.protocol import Ask, Service
from jaxrl_pt.serving.telemetry import Telemetry
from jaxrl_pt.serving.worker import Busy, Job, Stopped, Worker

_RETRY_SECONDS = 1


def make_app(service: Service, worker: Worker, token: str | None = None,
             log: Callable[[str], None] | None = None) -> ASGIApp:
  """The ASGI application, which starts the worker at its start and stops it at its end.

  Args:
    service: the model that is served and the limits of a request.
    worker: a worker that has not been started.
    token: what clients must send as `Authorization: Bearer TOKEN`. Without it, only requests that
      name this machine as their host are answered, which the web page of another host cannot do.
    log: a function that gets one line for each request when it has been answered or its client
      has gone.
  """
  telemetry = Telemetry()
  server = _Server(service, worker, telemetry)

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncIterator[None]:
    del app
    worker.start()
    try:
      yield
    finally:
      await asyncio.to_thread(worker.stop)

  app = Starlette(lifespan=lifespan, routes=[
      Route('/v1/completions', server.completions, methods=['POST']),
      Route('/v1/chat/completions', server.chat, methods=['POST']),
      Route('/v1/rerank', server.rerank, methods=['POST']),
      Route('/tokenize', server.tokenize, methods=['POST']),
      Route('/detokenize', server.detokenize, methods=['POST']),
      Route('/tokenizer_info', server.tokenizer_info),
      Route('/v1/models', server.models), Route('/v1/models/{name}', server.model),
      Route('/health', server.health), Route('/metrics', server.metrics)],
      exception_handlers={ApiError: _api_error, HTTPException: _http_error,
                          ClientDisconnect: _nobody, Exception: _defect})
  guard = _Guard(app, token, telemetry, [route.path for route in app.routes
                                         if isinstance(route, Route)])
  return guard if log is None else _AccessLog(guard, log)


def _error(error: ApiError) -> Response:
  return JSONResponse(error.body, error.status, error.headers)


def _api_error(request: Request, error: Exception) -> Response:
  del request
  assert isinstance(error, ApiError)
  return _error(error)


def _http_error(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  return _error(ApiError(error.status_code, f'{request.method} {request.url.path}: '
                         f'{error.detail}.'))


def _nobody(request: Request, error: Exception) -> Response:
  del request, error
  return Response(status_code=499)  # The client has gone; this status only enters the counts.


def _defect(request: Request, error: Exception) -> Response:
  del request, error  # uvicorn writes the traceback to its log.
  return _error(ApiError(500, 'The server failed; its log says how.'))


class _Guard:
  """Refuses requests without the right token or host, and counts all answers."""

  def __init__(self, app: ASGIApp, token: str | None, telemetry: Telemetry,
               paths: list[str]) -> None:
    self._app, self._telemetry, self._paths = app, telemetry, frozenset(paths)
    self._expected = None if token is None else f'Bearer {token}'.encode()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    path = scope['path'] if scope['path'] in self._paths else 'other'

    async def counted(message: Message) -> None:
      if message['type'] == 'http.response.start':
        self._telemetry.requests.labels(path, message['status']).inc()
      await send(message)

    refusal = self._refusal(dict(scope['headers']), scope['path'])
    await (_error(refusal) if refusal else self._app)(scope, receive, counted)

  def _refusal(self, headers: dict[bytes, bytes], path: str) -> ApiError | None:
    if self._expected is None:
      host = headers.get(b'host', b'').decode('latin-1').rpartition(':')
      if is_loopback(host[0] if host[2].isdecimal() else ''.join(host)):
        return None
      return ApiError(403, 'Without a token this server answers only requests to this machine.')
    if path == '/health' or hmac.compare_digest(headers.get(b'authorization', b''),
                                                self._expected):
      return None
    return ApiError(401, 'Send the server\'s token as "Authorization: Bearer TOKEN".',
                    code='invalid_api_key', headers={'WWW-Authenticate': 'Bearer'})


class _AccessLog:
  """Logs one line for each request: time, client, method, path, status, seconds, answer's bytes.

  The line holds neither secrets nor texts. A status of 499 says that the client went away first.
  """

  def __init__(self, app: ASGIApp, log: Callable[[str], None]) -> None:
    self._app, self._log = app, log

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    began, status, num_bytes = time.monotonic(), 499, 0

    async def noted(message: Message) -> None:
      nonlocal status, num_bytes
      if message['type'] == 'http.response.start':
        status = message['status']
      num_bytes += len(message.get('body', b''))
      await send(message)

    try:
      await self._app(scope, receive, noted)
    finally:
      client = scope['client'][0] if scope.get('client') else '-'
      stamp = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
      # The path is escaped: it could hold line breaks or characters that command a terminal.
      self._log(f'{stamp} {client} {scope["method"]} {ascii(scope["path"])[1:-1]} {status} '
                f'{time.monotonic() - began:.3f} s {num_bytes} bytes')


class _News:
  """The newest state of each response of a job, brought from the worker's thread.

  It keeps no older state, since a response holds all its tokens so far. A slow client therefore
  costs no memory.
  """

  def __init__(self) -> None:
    self._loop = asyncio.get_running_loop()
    self._changed = asyncio.Event()
    self._latest: dict[tuple[int, int], Sampled] = {}
    self._failure: Exception | None = None

  def listen(self, number: int, response: Sampled | Exception) -> None:
    """The listener that is called from the worker's thread."""
    with contextlib.suppress(RuntimeError):  # The event loop is closed, and nobody waits any more.
      self._loop.call_soon_threadsafe(self._put, number, response)

  def _put(self, number: int, response: Sampled | Exception) -> None:
    if isinstance(response, Exception):
      self._failure = response
    else:
      self._latest[number, response.sample] = response
    self._changed.set()

  async def get(self) -> list[tuple[int, Sampled]]:
    """Waits for news and returns the responses that have changed since the last call."""
    await self._changed.wait()
    self._changed.clear()
    if self._failure is not None:
      raise ApiError(503, f'The answer was broken off: {self._failure}.') from self._failure
    news, self._latest = self._latest, {}
    return [(number, response) for (number, _), response in news.items()]


class _Server:
  """The endpoints."""

  def __init__(self, service: Service, worker: Worker, telemetry: Telemetry) -> None:
    self._service, self._worker, self._telemetry = service, worker, telemetry
    self._ids = protocol.Ids()
    self._started = int(time.time())

  async def completions(self, request: Request) -> Response:
    return await self._answer(request, protocol.completion)

  async def chat(self, request: Request) -> Response:
    return await self._answer(request, protocol.chat)

  async def tokenize(self, request: Request) -> Response:
    return JSONResponse(await self._read(request, tokens.tokenize))

  async def detokenize(self, request: Request) -> Response:
    return JSONResponse(await self._read(request, tokens.detokenize))

  async def tokenizer_info(self, request: Request) -> Response:
    del request
    return JSONResponse(tokens.info(self._service))

  async def models(self, request: Request) -> Response:
    del request
    return JSONResponse({'object': 'list', 'data': [self._model()]})

  async def model(self, request: Request) -> Response:
    if request.path_params['name'] != self._service.name:
      raise ApiError(404, 'There is no such model here.', code='model_not_found')
    return JSONResponse(self._model())

  def _model(self) -> dict[str, Any]:
    return {'id': self._service.name, 'object': 'model', 'created': self._started,
            'owned_by': 'jaxrl_pt', 'max_model_len': tokens.max_len(self._service)}

  async def health(self, request: Request) -> Response:
    del request
    failure = self._worker.failure
    return JSONResponse({'status': 'ok' if failure is None else f'failed: {failure}'},
                        200 if failure is None else 503)

  async def metrics(self, request: Request) -> Response:
    try:
      counters = await asyncio.wrap_future(self._worker.counters())
    except Stopped as e:
      raise ApiError(503, f'The engine does not run: {e}.') from e
    text, content_type = self._telemetry.exposition(counters, request.headers.get('accept', ''))
    return Response(text, headers={'Content-Type': content_type})

  async def _read(self, request: Request, understand: Callable[..., Any]) -> Any:
    """Reads a body and understands it in a thread, where a long text holds up no other request."""
    body = await read_body(request, self._service.max_body_bytes)
    return await asyncio.to_thread(lambda: understand(read_json(body), self._service))

  # --- Answers --------------------------------------------------------------------------

  async def _answer(self, request: Request, understand: Callable[..., Ask]) -> Response:
    arrived = time.monotonic()
    ask: Ask = await self._read(
        request, lambda body, service: understand(body, service, self._ids))
    news = _News()
    job = self._submit(ask.requests, news)
    answer = Answer(self._service, ask)
    deltas = self._deltas(answer, news, arrived)
    if ask.is_stream:
      return _Stream(answer, deltas, lambda: self._end(job, answer))
    try:
      return JSONResponse(answer.body(await _unless_disconnected(request, _all(deltas))))
    finally:
      self._end(job, answer)

  def _submit(self, requests: Sequence[EngineRequest], news: _News) -> Job:
    """Gives the engine requests, whose responses the news will bring.

    Raises:
      ApiError: 400 for what cannot be answered, 429 where there is no room, 503 without an engine.
    """
    try:
      job = self._worker.submit(requests, news.listen)
    except UserError as e:
      raise ApiError(400, str(e)) from e
    except Busy as e:
      raise ApiError(429, f'Too much to do: {e}. Try again later.', code='queue_full',
                     headers={'Retry-After': str(_RETRY_SECONDS)}) from e
    except Stopped as e:
      raise ApiError(503, f'The engine does not run: {e}.') from e
    self._telemetry.prompt_tokens.inc(sum(len(r.prompt) for r in requests))
    return job

  async def rerank(self, request: Request) -> Response:
    """Ranks documents by comparisons, all of which are one job of the engine."""
    ask: reranking.Rerank = await self._read(request, reranking.understand)
    if not ask.requests:  # There is one text, and nothing to compare it with.
      return JSONResponse(ask.body({}))
    news, ended = _News(), dict[tuple[int, int], Sampled]()

    async def collect() -> None:
      while len(ended) < ask.num_verdicts:
        ended.update({(number, response.sample): response
                      for number, response in await news.get() if response.finish})

    job = self._submit(ask.requests, news)
    try:
      await _unless_disconnected(request, collect())
    finally:
      self._worker.cancel(job)
      self._telemetry.tokens.inc(sum(len(response.tokens) for response in ended.values()))
      self._telemetry.disconnects.inc(len(ended) < ask.num_verdicts)
    return JSONResponse(ask.body(ended))

  async def _deltas(self, answer: Answer, news: _News, arrived: float) -> AsyncIterator[Delta]:
    is_first = True
    while not answer.is_done:
      for number, response in await news.get():
        if is_first:
          self._telemetry.first_token_seconds.observe(time.monotonic() - arrived)
          is_first = False
        yield answer.update(number, response)

  def _end(self, job: Job, answer: Answer) -> None:
    """Ends the job after its answer's last byte, or when the client has gone."""
    self._worker.cancel(job)
    self._telemetry.tokens.inc(answer.usage()['completion_tokens'])
    self._telemetry.disconnects.inc(not answer.is_done)


class _Stream(Response):
  """A response of server-sent events. `end` is called however sending them ends."""

  def __init__(self, answer: Answer, deltas: AsyncIterator[Delta],
               end: Callable[[], None]) -> None:
    super().__init__()
    self._answer, self._deltas, self._end = answer, deltas, end

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await StreamingResponse(self._events(), media_type='text/event-stream', headers={
          'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'})(scope, receive, send)
    finally:
      self._end()

  async def _events(self) -> AsyncIterator[str]:
    event = lambda value: f'data: {json.dumps(value, ensure_ascii=False)}\n\n'
    for opening in self._answer.opening():
      yield event(opening)
    try:
      async for delta in self._deltas:
        if (chunk := self._answer.chunk(delta)) is not None:
          yield event(chunk)
    except ApiError as e:  # The status has been sent already.
      yield event(e.body)
      return
    if (closing := self._answer.closing()) is not None:
      yield event(closing)
    yield 'data: [DONE]\n\n'


async def _all(deltas: AsyncIterator[Delta]) -> list[Delta]:
  return [delta async for delta in deltas]


async def _unless_disconnected(request: Request, work: Any) -> Any:
  """Awaits the work, and raises ClientDisconnect if the client goes away before its end."""
  working = asyncio.ensure_future(work)
  leaving = asyncio.ensure_future(_disconnect(request))
  try:
    await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
      raise ClientDisconnect
    return working.result()
  finally:
    for task in (working, leaving):
      task.cancel()
    await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
  while (await request.receive())['type'] != 'http.disconnect':
    pass
