"""Killable child processes that answer requests, while the caller goes on.

The pool does not know what is asked (`service.py`). If the handler loops, crashes, eats memory or
sends nonsense on a request, its process is replaced, and the service says what that request's
answer is; the other requests are not affected. A request whose process was killed from outside is
asked again. Each worker thread of the pool owns one supervisor process (`child.py`). No process of
the pool outlives the pool or the trainer, however it ends.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import Any, Generic, TypeVar

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import sandbox, settings_json
from jaxrl_pt.verifiers.channel import Closed, Deadline, Malformed, receive, send
from jaxrl_pt.verifiers.child import START_SECONDS, STOP_SIGNALS
from jaxrl_pt.verifiers.service import Kind

Result = TypeVar('Result')

# How often a request is asked whose process is killed from outside or cannot be started.
_ATTEMPTS = 3
_END_SECONDS = 5.0  # A supervisor ends its worker's whole process tree in less time.
# The order of sets must not depend on the process, and a handler must not take all cores.
_ENVIRONMENT = {'PYTHONHASHSEED': '0', 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}
_MARK = 'JAXRL_PT_WORKER'


@dataclass(frozen=True)
class Pending(Generic[Result]):
  """The future of the answers to the requests that one `submit` has handed over."""

  futures: Sequence[Future[Result]]

  def done(self) -> bool:
    """Whether `result` would return at once."""
    return all(future.done() for future in self.futures)

  def result(self) -> list[Result]:
    """Waits for the answers, in the order in which the requests were submitted.

    Raises:
      CancelledError: the pool was closed before they were answered.
    """
    return [future.result() for future in self.futures]


@dataclass(frozen=True)
class Asked(Generic[Result]):
  """A request and how its answer is read.

  request: as JSON.
  decode: the result from an answer of a hostile process; it raises ValueError.
  crashed: the result where there is no answer, from the reason.
  """

  request: dict[str, Any]
  decode: Callable[[dict[str, Any]], Result]
  crashed: Callable[[str], Result]


@dataclass(frozen=True)
class _Job:
  asked: Asked[Any]
  future: Future[Any]


class _LostError(Exception):
  """The process that was asked was killed from outside, or did not start."""


class _Child:
  """A supervisor process, which one worker thread starts and uses. Final."""

  def __init__(self, kind: Kind, settings: Any, limits: cfg.VerifierPool, most: int) -> None:
    """Starts the supervisor and waits until its workers are ready.

    Raises:
      UserError: the supervisor refuses the settings.
      _LostError: the supervisor did not start.
    """
    self._noun, self._limits, self._most = kind.noun, limits, most
    self._has_ended, self._words = False, ''
    self._mark = f'{_MARK}={secrets.token_hex(16)}'
    self._channel, other = socket.socketpair()
    self._channel.setblocking(False)
    self._errors = tempfile.TemporaryFile()  # The supervisor writes here, but no worker does.
    name, value = self._mark.split('=')
    with other:
      self._process = subprocess.Popen(
          [sys.executable, '-m', kind.module, str(other.fileno())],
          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors,
          pass_fds=[other.fileno()], env={**os.environ, **_ENVIRONMENT, name: value},
          start_new_session=True)  # Ctrl-C reaches the trainer alone.
    said = self._asked({'settings': settings_json.encoded(settings), 'parent': os.getpid(),
                        'limits': settings_json.encoded(limits)}, 2 * START_SECONDS)
    if said:
      self.end()
      raise UserError(str(said['error'])) if 'error' in said else _LostError(str(said['lost']))

  def _asked(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Sends a message to the supervisor and returns its answer.

    Raises:
      _LostError: the supervisor is dead or does not answer in time, and has been ended.
    """
    deadline, fd = Deadline(seconds), self._channel.fileno()
    try:
      send(fd, message, deadline)
      return receive(fd, deadline, self._most)
    except (TimeoutError, Closed, Malformed) as error:
      self.end()
      words = self._words
      raise _LostError(f'a {self._noun} process did not start or was killed'
                       + (f': {words}' if words else '')) from error

  def answer(self, asked: Asked[Result]) -> Result:
    """The result of one request.

    Raises:
      _LostError: the process that was asked was killed from outside.
    """
    # The supervisor keeps the request's deadline. This longer one, which has time for starting a
    # worker first, is for a supervisor that somebody has stopped.
    answer = self._asked(asked.request, START_SECONDS + self._limits.wall_seconds)
    if 'lost' in answer:
      raise _LostError(str(answer['lost']))
    try:
      return asked.decode(answer)
    except ValueError as error:
      raise _LostError(str(error)) from error

  @property
  def alive(self) -> bool:
    """Whether the supervisor can answer another request."""
    return not self._has_ended and self._process.poll() is None

  def interrupt(self) -> None:
    """Makes the supervisor end itself and its workers, so that a waiting `answer` raises at once.

    Any thread may call it.
    """
    try:
      self._channel.shutdown(socket.SHUT_RDWR)
    except OSError:  # The supervisor is dead already, or the channel is closed.
      pass

  def end(self) -> None:
    """Ends the supervisor and every process below it. It may be called again."""
    if self._has_ended:
      return
    self._has_ended = True
    self.interrupt()
    try:
      is_orderly = self._process.wait(_END_SECONDS) == 0
    except subprocess.TimeoutExpired:
      is_orderly = False
    if not is_orderly:  # The supervisor could not end its workers.
      try:
        os.killpg(self._process.pid, signal.SIGKILL)
      except ProcessLookupError:
        pass
      self._process.wait()
      sandbox.kill_marked(self._mark)
    self._channel.close()
    with self._errors as errors:
      errors.seek(0)
      self._words = errors.read(1 << 20).decode(errors='replace').strip()[-2000:]


class ProcessPool:
  """Supervised child processes that answer requests of any kind. Final."""

  def __init__(self, kind: Kind, settings: Any, limits: cfg.VerifierPool, most: int) -> None:
    """Starts `limits.num_workers` supervisors and waits until they are ready.

    Args:
      kind: what the processes do.
      settings: settings of the service, as a dataclass of `config`.
      limits: the number of supervisors, and what one answer may cost.
      most: bytes of an answer.

    Raises:
      UserError: the service needs an extra, or a function that cannot be imported.
      RuntimeError: a supervisor does not start.
    """
    self._start = lambda: _Child(kind, settings, limits, most)
    self._noun = kind.noun
    self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
    self._closing = threading.Event()
    self._children: dict[int, _Child] = {}  # worker thread → its supervisor
    self._ready: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    self._workers = [threading.Thread(target=self._work, name=kind.noun, daemon=True)
                     for _ in range(limits.num_workers)]
    for worker in self._workers:
      worker.start()
    failures = [self._ready.get() for _ in self._workers]
    for failure in failures:
      if failure is not None:
        self.close()
        raise failure

  def submit(self, requests: Sequence[Asked[Result]]) -> Pending[Result]:
    """Hands over requests, and returns at once."""
    if self._closing.is_set():
      raise RuntimeError(f'the {self._noun} pool is closed')
    jobs = [_Job(asked, Future()) for asked in requests]
    for job in jobs:
      self._jobs.put(job)
    return Pending([job.future for job in jobs])

  def _work(self) -> None:
    # Signals that stop a run go to every process, but only the trainer's main thread shall act on
    # them. The child inherits this mask and keeps it until it ignores these signals.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    me = threading.get_ident()
    try:
      self._children[me] = self._started()
    except Exception as error:  # The constructor waits for it.
      self._ready.put(error)
      return
    self._ready.put(None)
    while (job := self._jobs.get()) is not None:
      if not job.future.set_running_or_notify_cancel():
        continue
      try:
        job.future.set_result(self._answered(me, job.asked))
      except BaseException as error:  # Whoever waits for the result must get it.
        job.future.set_exception(error)
    self._children[me].end()

  def _started(self) -> _Child:
    """Starts a child, and tries again where one is killed as it starts."""
    for _ in range(_ATTEMPTS):
      try:
        return self._start()
      except _LostError as error:
        last = error
    raise RuntimeError(str(last)) from last

  def _answered(self, me: int, asked: Asked[Result]) -> Result:
    """The result of one request, asked again where its process is killed from outside.

    Raises:
      CancelledError: the pool is closed.
    """
    last: Exception | None = None
    for _ in range(_ATTEMPTS):
      child = self._children[me]
      try:
        if not child.alive:
          child.end()
          child = self._children[me] = self._start()
        return child.answer(asked)
      except (_LostError, UserError) as error:  # The same settings have worked at the start.
        last = error
      if self._closing.is_set():
        raise CancelledError
    return asked.crashed(f'{_ATTEMPTS} times over: {last}')

  def close(self) -> None:
    """Ends all children at once and cancels unanswered requests. It may be called again."""
    self._closing.set()
    try:
      while True:
        job = self._jobs.get_nowait()
        if job is not None:
          job.future.cancel()
    except queue.Empty:
      pass
    for _ in self._workers:
      self._jobs.put(None)
    for child in list(self._children.values()):
      child.interrupt()
    for worker in self._workers:
      worker.join()
