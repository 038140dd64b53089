"""Runs host verifiers in killable child processes, while the device goes on.

    with Pool(settings, limits) as pool:
      pending = pool.submit([(response, reference), …])  # returns at once
      …                                                 # draw the next batch
      verdicts = pending.result()                       # in the order of submission

If the verifier loops, crashes, eats memory or sends nonsense on a response, its process is
replaced and the response's outcome is TIMEOUT or CRASH; the other responses are not affected. A
response whose process was killed from outside is verified again. Each worker thread of the pool
owns one supervisor process (`child.py`) and accepts from it only parts and ranges that the
verifier declares. No process of the pool outlives the pool or the trainer, however it ends.
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

# How often a response is tried whose process is killed from outside or cannot be started.
_ATTEMPTS = 3
_END_SECONDS = 5.0  # A supervisor ends its worker's whole process tree in less time.
# The order of sets must not depend on the process, and a verifier must not take all cores.
_ENVIRONMENT = {'PYTHONHASHSEED': '0', 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}
_MARK = 'JAXRL_PT_VERIFIER'


@dataclass(frozen=True)
class PendingVerdicts:
  """The future of the verdicts of the responses that one `Pool.submit` has handed over."""

  futures: Sequence[Future[ResponseVerdict]]

  def done(self) -> bool:
    """Whether `result` would return at once."""
    return all(future.done() for future in self.futures)

  def result(self) -> list[ResponseVerdict]:
    """Waits for the verdicts, in the order in which the responses were submitted.

    Raises:
      CancelledError: the pool was closed before they were verified.
    """
    return [future.result() for future in self.futures]


@dataclass(frozen=True)
class _Job:
  response: str
  reference: str
  future: Future[ResponseVerdict]


class _LostError(Exception):
  """The process that verified a response was killed from outside, or did not start."""


class _Child:
  """A supervisor process, which one worker thread starts and uses. Final."""

  def __init__(self, verifier: cfg.HostVerifier, limits: cfg.VerifierPool) -> None:
    """Starts the supervisor and waits until its worker is ready.

    Raises:
      UserError: the supervisor refuses the verifier's settings.
      _LostError: the supervisor did not start.
    """
    self._verifier, self._limits = verifier, limits
    self._has_ended, self._words = False, ''
    self._mark = f'{_MARK}={secrets.token_hex(16)}'
    self._channel, other = socket.socketpair()
    self._channel.setblocking(False)
    self._errors = tempfile.TemporaryFile()  # The supervisor writes here, but no worker does.
    name, value = self._mark.split('=')
    with other:
      self._process = subprocess.Popen(
          [sys.executable, '-m', 'jaxrl_pt.verifiers.child', str(other.fileno())],
          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors,
          pass_fds=[other.fileno()], env={**os.environ, **_ENVIRONMENT, name: value},
          start_new_session=True)  # Ctrl-C reaches the trainer alone.
    said = self._asked({'verifier': build.to_json(verifier), 'parent': os.getpid(),
                        'limits': dataclasses.asdict(limits)}, 2 * START_SECONDS)
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
      return receive(fd, deadline, MAX_RESULT)
    except (TimeoutError, Closed, Malformed) as error:
      self.end()
      words = self._words
      raise _LostError('a verifier process did not start or was killed'
                       + (f': {words}' if words else '')) from error

  def verify(self, response: str, reference: str) -> ResponseVerdict:
    """The verdict on one response.

    Raises:
      _LostError: the verifying process was killed from outside.
    """
    # The supervisor keeps the response's deadline. This longer one, which has time for starting a
    # worker first, is for a supervisor that somebody has stopped.
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
    """Whether the supervisor can verify another response."""
    return not self._has_ended and self._process.poll() is None

  def interrupt(self) -> None:
    """Makes the supervisor end itself and its workers, so that a waiting `verify` raises at once.

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


class Pool:
  """Child processes that verify responses."""

  def __init__(self, verifier: cfg.HostVerifier, limits: cfg.VerifierPool) -> None:
    """Starts `limits.num_workers` children and waits until they are ready.

    Raises:
      UserError: the verifier needs an extra, or a function that cannot be imported.
      RuntimeError: a child does not start.
    """
    self._verifier, self._limits = verifier, limits
    self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
    self._closing = threading.Event()
    self._children: dict[int, _Child] = {}  # worker thread → its supervisor
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
    """The names of the parts of every verdict."""
    return build.part_names(self._verifier)

  def submit(self, items: Sequence[tuple[str, str]]) -> PendingVerdicts:
    """Hands over pairs of a response and its reference answer, and returns at once."""
    if self._closing.is_set():
      raise RuntimeError('the verifier pool is closed')
    jobs = [_Job(response, reference, Future()) for response, reference in items]
    for job in jobs:
      self._jobs.put(job)
    return PendingVerdicts([job.future for job in jobs])

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
        job.future.set_result(self._verified(me, job))
      except BaseException as error:  # Whoever waits for the result must get it.
        job.future.set_exception(error)
    self._children[me].end()

  def _started(self) -> _Child:
    """Starts a child, and tries again where one is killed as it starts."""
    for _ in range(_ATTEMPTS):
      try:
        return _Child(self._verifier, self._limits)
      except _LostError as error:
        last = error
    raise RuntimeError(str(last)) from last

  def _verified(self, me: int, job: _Job) -> ResponseVerdict:
    """The verdict on one response, begun again where its process is killed from outside.

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
      except (_LostError, UserError) as error:  # The same settings have worked at the start.
        last = error
      if self._closing.is_set():
        raise CancelledError
    return ResponseVerdict(Outcome.CRASH, detail=f'{_ATTEMPTS} times over: {last}')

  def close(self) -> None:
    """Ends all children at once and cancels unverified responses. It may be called again."""
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
