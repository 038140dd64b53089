"""Host verifiers in killable child processes, while the device goes on.

    with Pool(settings, limits) as pool:
      ticket = pool.submit([(response, reference), …])  # returns at once
      …                                                 # generate the next batch
      judgements = ticket.result()                      # in order

A response whose verifier loops, crashes, or eats memory costs its child, which is replaced;
the others go on, and its own outcome is TIMEOUT or CRASH. Each worker is a thread that owns one
child at a time and talks to it over a socket. No child outlives the pool, nor its process,
however that ends.
"""

from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
import os
import queue
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
from jaxrl_pt.verifiers import build
from jaxrl_pt.verifiers.child import receive, send
from jaxrl_pt.verifiers.judgement import Judgement, Outcome

_START_SECONDS = 120.0  # a busy machine may take long to import a verifier's libraries
# The order of sets must not depend on the process, nor a verifier take the device's cores.
_ENVIRONMENT = {'PYTHONHASHSEED': '0', 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}


@dataclass(frozen=True)
class Ticket:
  """Responses handed to the pool."""

  futures: Sequence[Future[Judgement]]

  def done(self) -> bool:
    """Whether `result` would return at once."""
    return all(future.done() for future in self.futures)

  def result(self) -> list[Judgement]:
    """Waits for the judgements, in the order in which the responses were submitted.

    Raises:
      CancelledError: the pool was closed before.
      RuntimeError: a child that was to replace another could not be started.
    """
    return [future.result() for future in self.futures]


@dataclass(frozen=True)
class _Job:
  response: str
  reference: str
  future: Future[Judgement]


class _Child:
  """One process that judges; `judge` kills it where it fails to answer."""

  def __init__(self, verifier: cfg.HostVerifier, limits: cfg.VerifierPool) -> None:
    self._channel, other = socket.socketpair()
    self._limits = limits
    with other, tempfile.TemporaryFile() as errors:
      self._process = subprocess.Popen(
          [sys.executable, '-m', 'jaxrl_pt.verifiers.child', str(other.fileno())],
          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
          pass_fds=[other.fileno()], env={**os.environ, **_ENVIRONMENT},
          start_new_session=True)  # Ctrl-C is the parent's
      other.close()
      started = self._start(verifier)
      if started is None or 'error' in started:
        self.kill()
        errors.seek(0)
        said = errors.read().decode(errors='replace').strip()[-2000:]
        if started is not None:
          raise UserError(str(started['error']))
        raise RuntimeError(f'a verifier process did not start: {said or "it said nothing"}')

  def _start(self, verifier: cfg.HostVerifier) -> dict[str, Any] | None:
    self._channel.settimeout(_START_SECONDS)
    try:
      send(self._channel, {'verifier': build.to_json(verifier), 'parent': os.getpid(),
                           'memory_mib': self._limits.memory_mib,
                           'cpu_seconds': self._limits.cpu_seconds})
      return receive(self._channel)
    except OSError:
      return None

  def judge(self, response: str, reference: str) -> Judgement:
    """The child's judgement, or what became of the child; then it is dead."""
    self._channel.settimeout(self._limits.wall_seconds)
    try:
      send(self._channel, {'response': response, 'reference': reference})
      answer = receive(self._channel)
    except TimeoutError:
      self.kill()
      return Judgement(Outcome.TIMEOUT, detail=f'{self._limits.wall_seconds:g} s went by')
    except (OSError, ValueError):
      answer = None
    if answer is not None:
      return Judgement(Outcome(answer['outcome']), answer['parts'], answer['detail'])
    self.kill(1.0)  # it is ending: let it say how
    code = self._process.returncode
    if code == -signal.SIGPROF:
      return Judgement(Outcome.TIMEOUT, detail=f'{self._limits.cpu_seconds:g} s of processor '
                                               'time used')
    return Judgement(Outcome.CRASH, detail=f'the verifier process ended with code {code}')

  @property
  def alive(self) -> bool:
    """Whether it can judge another response."""
    return self._process.poll() is None

  def interrupt(self) -> None:
    """From another thread: ends the process, so that `judge` returns at once."""
    if self.alive:
      os.killpg(self._process.pid, signal.SIGKILL)

  def kill(self, seconds: float = 0.0) -> None:
    """Ends the process and what it started, after at most `seconds` to end by itself."""
    self._channel.close()
    try:
      self._process.wait(seconds)
    except subprocess.TimeoutExpired:
      pass
    try:
      os.killpg(self._process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    self._process.wait()


class Pool:
  """Child processes that judge responses; see the module's docstring."""

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
    # A child dies with the thread that started it: so the workers start their own.
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
    """Names of the parts of every judgement."""
    return build.part_names(self._verifier)

  def submit(self, items: Sequence[tuple[str, str]]) -> Ticket:
    """Hands over (response, reference) pairs and returns at once."""
    if self._closing.is_set():
      raise RuntimeError('the verifier pool is closed')
    jobs = [_Job(response, reference, Future()) for response, reference in items]
    for job in jobs:
      self._jobs.put(job)
    return Ticket([job.future for job in jobs])

  def _work(self) -> None:
    me = threading.get_ident()
    try:
      child = self._children[me] = _Child(self._verifier, self._limits)
    except Exception as error:  # the constructor waits for it
      self._ready.put(error)
      return
    self._ready.put(None)
    while (job := self._jobs.get()) is not None:
      if not job.future.set_running_or_notify_cancel():
        continue
      try:
        if not child.alive:
          child = self._children[me] = _Child(self._verifier, self._limits)
        judgement = child.judge(job.response, job.reference)
        if self._closing.is_set():
          raise CancelledError
        job.future.set_result(judgement)
      except BaseException as error:  # whoever waits for the result must hear of it
        job.future.set_exception(error)
    child.kill()

  def close(self) -> None:
    """Ends all children at once; what is not yet judged is cancelled. May be called twice."""
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

