"""Host verifiers in killable child processes, while the device goes on.

    with Pool(settings, limits) as pool:
      pending = pool.submit([(response, reference), …])  # returns at once
      …                                                 # generate the next batch
      verdicts = pending.result()                      # in order

A response whose verifier loops, crashes, eats memory or sends nonsense costs its process, which
is replaced; the others go on, and its own outcome is TIMEOUT or CRASH. An answer whose process
was killed from outside is verified again. Each worker is a thread that owns one supervisor
(`child.py`) and believes nothing that comes back from it beyond what the verifier declares.
No process outlives the pool, nor its process, however that ends.
"""

from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
import dataclasses
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
from types import TracebackType
from typing import Any, Self

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import build, sandbox
from jaxrl_pt.verifiers.channel import MAX_RESULT, Closed, Deadline, Malformed, receive, send
from jaxrl_pt.verifiers.child import START_SECONDS, STOP_SIGNALS
from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict

_ATTEMPTS = 3  # at an answer whose process is killed from outside, or cannot be started
_END_SECONDS = 5.0  # a supervisor ends its worker's whole tree in less
# The order of sets must not depend on the process, nor a verifier take the device's cores.
_ENVIRONMENT = {'PYTHONHASHSEED': '0', 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}
_MARK = 'JAXRL_PT_VERIFIER'


@dataclass(frozen=True)
class PendingVerdicts:
  """Responses handed to the pool."""

  futures: Sequence[Future[ResponseVerdict]]

  def done(self) -> bool:
    """Whether `result` would return at once."""
    return all(future.done() for future in self.futures)

  def result(self) -> list[ResponseVerdict]:
    """Waits for the verdicts, in the order in which the responses were submitted.

    Raises:
      CancelledError: the pool was closed before.
    """
    return [future.result() for future in self.futures]


@dataclass(frozen=True)
class _Job:
  response: str
  reference: str
  future: Future[ResponseVerdict]


class _LostError(Exception):
  """The process that verified an answer was killed from outside, or did not start."""


class _Child:
  """One supervisor; it is started by, and used from, one thread. Final."""

  def __init__(self, verifier: cfg.HostVerifier, limits: cfg.VerifierPool) -> None:
    """Starts it and waits until its worker is ready.

    Raises:
      UserError: what it says of the verifier's settings.
      _LostError: it did not start.
    """
    self._verifier, self._limits = verifier, limits
    self._has_ended, self._words = False, ''
    self._mark = f'{_MARK}={secrets.token_hex(16)}'
    self._channel, other = socket.socketpair()
    self._channel.setblocking(False)
    self._errors = tempfile.TemporaryFile()  # what the supervisor itself says, never a worker
    name, value = self._mark.split('=')
    with other:
      self._process = subprocess.Popen(
          [sys.executable, '-m', 'jaxrl_pt.verifiers.child', str(other.fileno())],
          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors,
          pass_fds=[other.fileno()], env={**os.environ, **_ENVIRONMENT, name: value},
          start_new_session=True)  # Ctrl-C is the parent's
    said = self._asked({'verifier': build.to_json(verifier), 'parent': os.getpid(),
                        'limits': dataclasses.asdict(limits)}, 2 * START_SECONDS)
    if said:
      self.end()
      raise UserError(str(said['error'])) if 'error' in said else _LostError(str(said['lost']))

  def _asked(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the supervisor answers.

    Raises:
      _LostError: it is dead, or does not answer; then it is ended.
    """
    deadline, fd = Deadline(seconds), self._channel.fileno()
    try:
      send(fd, message, deadline)
      return receive(fd, deadline, MAX_RESULT)
    except (TimeoutError, Closed, Malformed) as error:
      self.end()
      words = self._words
      raise _LostError('a verifier process did not start or was killed'
                       + (f': {words}' if words else '')) from error

  def verify(self, response: str, reference: str) -> ResponseVerdict:
    """Its verdict.

    Raises:
      _LostError: it was killed from outside.
    """
    # The supervisor keeps the deadline. This one, which it may need to start a worker first, is
    # for a supervisor that somebody stopped.
    answer = self._asked({'response': response, 'reference': reference},
                         START_SECONDS + self._limits.wall_seconds)
    if 'lost' in answer:
      raise _LostError(str(answer['lost']))
    try:
      return build.decoded(answer, self._verifier)
    except ValueError as error:
      raise _LostError(str(error)) from error

  @property
  def alive(self) -> bool:
    """Whether it can verify another response."""
    return not self._has_ended and self._process.poll() is None

  def interrupt(self) -> None:
    """From another thread: it ends itself and all below it, and `verify` returns at once."""
    try:
      self._channel.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is dead already, or closed
      pass

  def end(self) -> None:
    """Ends it and everything that its workers have started. May be called again."""
    if self._has_ended:
      return
    self._has_ended = True
    self.interrupt()
    try:
      is_orderly = self._process.wait(_END_SECONDS) == 0
    except subprocess.TimeoutExpired:
      is_orderly = False
    if not is_orderly:  # it could not clean up
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


class Pool:
  """Child processes that verify responses; see the module's docstring."""

  def __init__(self, verifier: cfg.HostVerifier, limits: cfg.VerifierPool) -> None:
    """Starts `limits.num_workers` children and waits until they are ready.

    Raises:
      UserError: the verifier needs an extra, or a function that cannot be imported.
      RuntimeError: a child does not start.
    """
    self._verifier, self._limits = verifier, limits
    self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
    self._closing = threading.Event()
    self._children: dict[int, _Child] = {}  # of each worker thread
    self._ready: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    self._workers = [threading.Thread(target=self._work, name='verifier', daemon=True)
                     for _ in range(limits.num_workers)]
    for worker in self._workers:
      worker.start()
    failures = [self._ready.get() for _ in self._workers]
    for failure in failures:
      if failure is not None:
        self.close()
        raise failure

  @property
  def parts(self) -> tuple[str, ...]:
    """Names of the parts of every verdict."""
    return build.part_names(self._verifier)

  def submit(self, items: Sequence[tuple[str, str]]) -> PendingVerdicts:
    """Hands over (response, reference) pairs and returns at once."""
    if self._closing.is_set():
      raise RuntimeError('the verifier pool is closed')
    jobs = [_Job(response, reference, Future()) for response, reference in items]
    for job in jobs:
      self._jobs.put(job)
    return PendingVerdicts([job.future for job in jobs])

  def _work(self) -> None:
    # Blocked here and so, until it ignores them, in the child: signals that stop a run go to
    # every process, and are the main thread's to answer.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    me = threading.get_ident()
    try:
      self._children[me] = self._started()
    except Exception as error:  # the constructor waits for it
      self._ready.put(error)
      return
    self._ready.put(None)
    while (job := self._jobs.get()) is not None:
      if not job.future.set_running_or_notify_cancel():
        continue
      try:
        job.future.set_result(self._verified(me, job))
      except BaseException as error:  # whoever waits for the result must hear of it
        job.future.set_exception(error)
    self._children[me].end()

  def _started(self) -> _Child:
    """A child, tried again where one is killed as it starts."""
    for _ in range(_ATTEMPTS):
      try:
        return _Child(self._verifier, self._limits)
      except _LostError as error:
        last = error
    raise RuntimeError(str(last)) from last

  def _verified(self, me: int, job: _Job) -> ResponseVerdict:
    """The verdict of one answer, begun again where its process is killed from outside.

    Raises:
      CancelledError: the pool is closed.
    """
    last: Exception | None = None
    for _ in range(_ATTEMPTS):
      child = self._children[me]
      try:
        if not child.alive:
          child.end()
          child = self._children[me] = _Child(self._verifier, self._limits)
        return child.verify(job.response, job.reference)
      except (_LostError, UserError) as error:  # settings that were right once
        last = error
      if self._closing.is_set():
        raise CancelledError
    return ResponseVerdict(Outcome.CRASH, detail=f'{_ATTEMPTS} times over: {last}')

  def close(self) -> None:
    """Ends all children at once; what is not yet verified is cancelled. May be called twice."""
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

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
               trace: TracebackType | None) -> None:
    self.close()
