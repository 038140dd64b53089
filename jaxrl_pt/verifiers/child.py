"""The supervisor of worker processes: `python -m jaxrl_pt.verifiers.child FD` for verifiers.

    trainer ── socket ── supervisor ── pipes ── worker (`worker.py`), which runs the handler

The supervisor runs no handler. It forks the workers, hands them one request at a time, ends them at
the deadline and starts others. It adopts every process that a worker leaves behind, in whatever
session, and ends it with the worker. It imports the libraries of the built-in handlers once, so
that a new worker costs only a fork. A worker that has evaluated a response as an expression is
replaced.

The supervisor ignores the signals that stop a run (SIGTERM, SIGINT and SIGHUP, which a service
manager sends to every process), because the trainer finishes its step first. It ends with the
trainer.
"""

from collections.abc import Callable, Mapping
import os
import secrets
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import sandbox, settings_json, worker
from jaxrl_pt.verifiers.channel import (
  MAX_REQUEST,
  MAX_RESULT,
  Closed,
  Deadline,
  Malformed,
  receive,
  send,
)
from jaxrl_pt.verifiers.service import Failure, Role, Service
from jaxrl_pt.verifiers.verifying import Verifying

START_SECONDS = 120.0  # A busy machine may take long to import a verifier's libraries.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MAX_WORDS = 1500  # How many of the last bytes of the worker's error output are kept.
# Signals that come from outside: from an operator, a service manager, or the kernel when memory is
# short.
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class _LostError(Exception):
  """The worker was killed from outside or did not start: its request may be asked again."""


class _OrphanedError(Exception):
  """The trainer has died or closed the channel."""


class _Worker:
  """One forked worker process and the pipes to it. Final."""

  def __init__(self, service: Service, role: Role, limits: cfg.VerifierPool,
               channel: socket.socket, trainer: int) -> None:
    """Forks the worker and waits until it is ready.

    Args:
      service: for its name and the size of its answers.
      role: what the worker does.
      limits: what one answer may cost.
      channel: the socket to the trainer; when it closes, all waiting ends.
      trainer: process id of the trainer; when it dies, all waiting ends.

    Raises:
      UserError: the worker refuses the service's settings.
      _LostError: the worker did not start.
      _OrphanedError: the trainer is gone.
    """
    self._noun, self._most, self._limits = service.kind.noun, service.max_answer, limits
    self._channel, self._trainer = channel.fileno(), trainer
    self._words = b''
    pipes = [os.pipe() for _ in range(3)]
    (requests, self._requests), (self._results, results), (self._errors, errors) = pipes
    self._pid = _forked(role, limits, requests, results, errors)
    for fd in (requests, results, errors):
      os.close(fd)
    for fd in (self._requests, self._results, self._errors):
      os.set_blocking(fd, False)
    self._hears_errors = True
    self._code: int | None = None
    try:
      said = receive(self._results, Deadline(START_SECONDS), MAX_RESULT, self)
    except (TimeoutError, Closed, Malformed) as error:
      self.end(1.0)
      raise _LostError(f'a {self._noun} process did not start: '
                       f'{self._last_words() or "it said nothing"}') from error
    if 'error' in said:
      raise UserError(str(said['error']))

  # --- What is watched while the worker is waited for (`channel.Watch`) -----------------

  def descriptors(self) -> Mapping[int, int]:
    """The channel to the trainer, for its end, and the worker's error output."""
    return {self._channel: 0} | ({self._errors: select.POLLIN} if self._hears_errors else {})

  def happened(self, fd: int) -> None:
    """Keeps the last of the worker's error output.

    Raises:
      _OrphanedError: the trainer has closed the channel.
    """
    if fd == self._channel:
      raise _OrphanedError
    try:
      said = os.read(fd, 1 << 16)
    except BlockingIOError:
      return
    self._words = (self._words + said)[-_MAX_WORDS:]
    self._hears_errors = bool(said)

  def tick(self) -> None:
    """Notices the trainer's death, even if a process that it forked holds the channel open.

    Raises:
      _OrphanedError: the trainer has died.
    """
    if os.getppid() != self._trainer:
      raise _OrphanedError

  # --- Answers ----------------------------------------------------------------------------

  @property
  def alive(self) -> bool:
    """Whether the worker can answer another request."""
    return self._reap(os.WNOHANG) is None

  def ask(self, request: Any, deadline: Deadline) -> Any:
    """The worker's answer to a request.

    Raises:
      Failure: it gave none, and is dead unless the reason is 'raised'.
      _LostError: the worker was killed from outside.
      _OrphanedError: the trainer is gone.
    """
    nonce = secrets.token_hex(16)
    try:
      send(self._requests, {'request': request, 'nonce': nonce}, deadline, self)
      answer = receive(self._results, deadline, self._most, self)
      if answer.get('nonce') != nonce or not answer.keys() & {'answer', 'raised'}:
        raise Malformed('a message that is not an answer')
    except TimeoutError as error:
      self.end(0.0)
      raise Failure('timeout', f'{self._limits.wall_seconds:g} s went by') from error
    except Malformed as error:
      self.end(0.0)
      raise Failure('crash', f'the {self._noun} process sent {error}') from error
    except Closed as error:
      raise self._explained(self.end(1.0)) from error
    if 'raised' in answer:
      raise Failure('raised', str(answer['raised'])[:worker.MAX_REASON])
    return answer['answer']

  def _explained(self, code: int | None) -> Exception:
    """Why there is no answer: a Failure, or _LostError where the worker was killed from outside.

    Args:
      code: the worker's exit code; None if it had to be killed.
    """
    if code == -signal.SIGPROF:
      return Failure('timeout', f'{self._limits.cpu_seconds:g} s of processor time used')
    words = self._last_words()
    said = f': {words}' if words else ''
    if code is None:
      return Failure('crash', f'the {self._noun} process closed its channel{said}')
    detail = f'the {self._noun} process ended with code {code}{said}'
    return _LostError(detail) if -code in _FROM_OUTSIDE else Failure('crash', detail)

  def _last_words(self) -> str:
    return self._words.decode(errors='replace').strip()

  # --- The worker's end -----------------------------------------------------------------

  def end(self, seconds: float) -> int | None:
    """Ends the worker, which has `seconds` to end by itself, and every process it started.

    Returns:
      The worker's exit code, −n for signal n; None where it had to be killed.
    """
    until = time.monotonic() + seconds
    while (code := self._reap(os.WNOHANG)) is None and time.monotonic() < until:
      time.sleep(0.002)
    if code is None:
      os.kill(self._pid, signal.SIGKILL)
      self._reap(0)
    sandbox.kill_descendants()
    self._hear_out()
    return code

  def _reap(self, options: int) -> int | None:
    if self._code is None:
      pid, status = os.waitpid(self._pid, options)
      self._code = os.waitstatus_to_exitcode(status) if pid else None
    return self._code

  def _hear_out(self) -> None:
    """Reads what is left of the worker's error output, and closes the pipes."""
    if self._errors < 0:
      return
    before = None
    while self._hears_errors and before != self._words:
      before = self._words
      self.happened(self._errors)
    for fd in (self._requests, self._results, self._errors):
      os.close(fd)
    self._errors, self._hears_errors = -1, False


def _forked(role: Role, limits: cfg.VerifierPool, *pipes: int) -> int:
  """Forks a worker and returns its process id."""
  me = os.getpid()
  pid = os.fork()
  if pid == 0:
    try:
      worker.run(role, limits, me, *pipes)
    except BaseException:
      traceback.print_exc()
    finally:
      os._exit(1)
  return pid


class _Supervisor:
  """The workers of one service."""

  def __init__(self, service: Service, limits: cfg.VerifierPool, channel: socket.socket,
               trainer: int) -> None:
    self._service, self._limits = service, limits
    self._channel, self._trainer = channel, trainer
    self._roles = service.roles()
    self._workers: list[_Worker] = []

  def ready(self) -> None:
    """Starts all workers again if one is not alive; it raises what `_Worker` raises."""
    if len(self._workers) == len(self._roles) and all(w.alive for w in self._workers):
      return
    self.end()
    for role in self._roles:
      self._workers.append(_Worker(self._service, role, self._limits, self._channel,
                                   self._trainer))

  def answer(self, request: Any) -> dict[str, Any]:
    """The answer to a request, under one deadline; it raises what `_Worker.ask` raises of others.
    """
    self.ready()
    deadline = Deadline(self._limits.wall_seconds)
    try:
      return self._service.serve(lambda role, asked: self._workers[role].ask(asked, deadline),
                                 request)
    except Failure as failure:
      return self._service.failed(failure)
    except ValueError as error:
      self.end()
      return self._service.failed(
          Failure('crash', f'the {self._service.kind.noun} process sent {error}'))

  def end(self) -> None:
    """Ends the workers and every process that they started."""
    for process in self._workers:
      process.end(0.0)
    self._workers = []

  def serve(self) -> None:
    """Answers requests until the channel closes.

    Raises:
      Closed, _OrphanedError: the trainer is gone.
    """
    fd = self._channel.fileno()
    while True:
      request = receive(fd, Deadline(None), MAX_REQUEST, _Trainer(self._trainer))
      try:
        answer = self.answer(request)
      except (_LostError, UserError) as error:
        answer = {'lost': str(error)}
      send(fd, answer, Deadline(None), _Trainer(self._trainer))
      if self._service.is_spent(request):
        self.end()
      try:
        self.ready()  # The trainer is busy meanwhile. `answer` tries again what fails here.
      except (_LostError, UserError):
        pass


class _Trainer:
  """A `channel.Watch` that notices the death of the trainer."""

  def __init__(self, process: int) -> None:
    self._process = process

  def descriptors(self) -> Mapping[int, int]:
    """No descriptors: the caller waits for the channel itself."""
    return {}

  def happened(self, fd: int) -> None:
    """Never called, since there are no descriptors."""

  def tick(self) -> None:
    """Raises _OrphanedError where the trainer is not the parent any more."""
    if os.getppid() != self._process:
      raise _OrphanedError


def main(channel: socket.socket, make: Callable[[Any], Service]) -> None:
  """Serves the trainer at the other end of `channel`, then ends every process below this one.

  Args:
    channel: the socket to the trainer, whose first message holds the settings.
    make: makes the service from its settings.
  """
  for number in STOP_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
  sandbox.adopt_orphans()
  channel.setblocking(False)
  fd = channel.fileno()
  try:
    first = receive(fd, Deadline(None), MAX_REQUEST)
    service = make(settings_json.decoded(first['settings']))
    limits = settings_json.decoded(first['limits'])
    supervisor = _Supervisor(service, limits, channel, first['parent'])
    try:
      service.preload()
      supervisor.ready()
    except UserError as error:
      send(fd, {'error': str(error)}, Deadline(None))
    except _LostError as error:
      send(fd, {'lost': str(error)}, Deadline(None))
    else:
      send(fd, {}, Deadline(None))
      supervisor.serve()
  except (Closed, _OrphanedError):
    pass
  sandbox.kill_descendants()


if __name__ == '__main__':
  main(socket.socket(fileno=int(sys.argv[1])), Verifying)
