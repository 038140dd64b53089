"""The thread that owns the engine, and the jobs that other threads give it.

The engine takes one caller at a time. Here that is a thread which alternates between the
commands of an inbox and `Engine.advance`; whoever waits for a response is called back from it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
import logging
import queue
import threading

from jaxrl_pt.errors import UserError
from jaxrl_pt.sampling.engine import Engine, Request, Response

# listener(number of the request in its job, a response so far | what broke the engine); called
# from the worker's thread.
Listener = Callable[[int, Response | Exception], None]


class Busy(Exception):
  """No room for more responses now."""


class Stopped(Exception):
  """The server is going down, or its engine has failed."""


class Job:
  """Requests that were submitted together; made by `Worker.submit`."""

  def __init__(self, requests: Sequence[Request], listener: Listener) -> None:
    self.requests, self.listener = requests, listener
    self.handles: list[int] = []  # the worker's thread alone reads and writes it
    self.is_cancelled = False


class Worker:
  """Answers jobs with one engine in a thread of its own."""

  def __init__(self, engine: Engine) -> None:
    self._engine = engine
    self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._room = engine.room()  # rows that are not promised to any job
    self._jobs: dict[int, tuple[Job, int]] = {}  # handle → job, number of the request in it
    self._left: dict[int, int] = {}  # handle → responses under way
    self._has_begun = self._is_short = False
    self.failure: Exception | None = None
    self._thread = threading.Thread(target=self._work, name='engine', daemon=True)

  def start(self) -> None:
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread after the step in hand; jobs under way are told."""
    self._inbox.put(None)
    self._thread.join()

  # --- For other threads ----------------------------------------------------------------

  def submit(self, requests: Sequence[Request], listener: Listener) -> Job:
    """Queues requests, all or none.

    Raises:
      UserError: a request is wrong.
      Busy: no room now.
      Stopped: never again.
    """
    for request in requests:
      self._engine.check(request)  # Reads what never changes: any thread may.
    num, most = sum(r.num_samples for r in requests), self._engine.config.queue
    if num > most:
      raise UserError(f'{num} responses are asked for at once and at most {most} are taken.')
    with self._lock:
      if self.failure is not None:
        raise Stopped(str(self.failure)) from self.failure
      if num > self._room:
        raise Busy(f'{most - self._room} responses are under way and at most {most} are taken')
      self._room -= num
      job = Job(requests, listener)
      self._inbox.put(lambda: self._begin(job))
    return job

  def cancel(self, job: Job) -> None:
    """Ends a job; its listener is not called any more. Does nothing to one that has ended."""
    job.is_cancelled = True
    self._inbox.put(lambda: self._end(job))

  def counters(self) -> Future[dict[str, float]]:
    """`Engine.counters`, and the responses that are promised or under way."""
    future: Future[dict[str, float]] = Future()
    with self._lock:
      if self.failure is not None:
        future.set_exception(Stopped(str(self.failure)))
      else:
        self._inbox.put(lambda: self._count(future))
    return future

  # --- In the thread --------------------------------------------------------------------

  def _work(self) -> None:
    failure: Exception = Stopped('the server is going down')
    try:
      while self._obey():
        if self._jobs:
          for handle, response in self._engine.advance(self._steps()):
            self._deliver(handle, response)
    except Exception as e:  # Whatever broke the engine, those who wait must be told.
      logging.getLogger(__name__).exception('The engine has failed.')
      failure = e
    with self._lock:
      self.failure = failure
    self._obey(wait=False)  # From here on nothing new comes.
    for job, number in self._jobs.values():
      if not job.is_cancelled:
        job.listener(number, failure)

  def _obey(self, *, wait: bool = True) -> bool:
    """Runs the commands that have arrived, after waiting for one if nothing is under way.

    Returns:
      Whether to go on.
    """
    commands = [self._inbox.get()] if wait and not self._jobs else []
    while not self._inbox.empty():
      commands.append(self._inbox.get())
    for command in commands:
      if command is not None:
        command()
    return None not in commands

  def _steps(self) -> int | None:
    """Steps of the next call: one where a job has just begun, for an early first token.

    Not twice in a row, so that many new jobs cannot keep the calls short.
    """
    self._is_short = self._has_begun and not self._is_short
    self._has_begun = False
    return 1 if self._is_short else None

  def _begin(self, job: Job) -> None:
    if self.failure is not None:
      job.listener(0, self.failure)
      return
    for number, request in enumerate(job.requests):
      if job.is_cancelled:
        self._give_back(request.num_samples)
        continue
      handle = self._engine.submit(request)
      job.handles.append(handle)
      self._jobs[handle] = job, number
      self._left[handle] = request.num_samples
      self._has_begun = True

  def _end(self, job: Job) -> None:
    for handle in job.handles:
      if handle in self._jobs:
        self._engine.cancel(handle)

  def _count(self, future: Future[dict[str, float]]) -> None:
    if self.failure is not None:
      future.set_exception(Stopped(str(self.failure)))
      return
    num = self._engine.config.queue - self._engine.room()
    future.set_result({**self._engine.counters(), 'responses': num})

  def _deliver(self, handle: int, response: Response) -> None:
    job, number = self._jobs[handle]
    if response.finish:
      self._give_back(1)
      self._left[handle] -= 1
      if not self._left[handle]:
        del self._left[handle], self._jobs[handle]
    if not job.is_cancelled:
      job.listener(number, response)

  def _give_back(self, num: int) -> None:
    with self._lock:
      self._room += num
