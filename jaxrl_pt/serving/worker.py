"""The thread that owns the engine, and the jobs that other threads give it.

The engine takes one caller at a time. Here this caller is a thread that alternates between the
commands of an inbox and `Engine.advance`, and calls the listeners of the jobs.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
import logging
import queue
import threading

from jaxrl_pt.errors import UserError
from jaxrl_pt.sampling.engine import Engine, Request, Response

# listener(number of the request in its job, the response so far or what broke the engine) is called
# from the worker's thread.
Listener = Callable[[int, Response | Exception], None]


class Busy(Exception):
  """The engine has no room for more responses now."""


class Stopped(Exception):
  """The server is going down, or its engine has failed."""


class Job:
  """Requests that were submitted together; made by `Worker.submit`."""

  def __init__(self, requests: Sequence[Request], listener: Listener) -> None:
    self.requests, self.listener = requests, listener
    self.handles: list[int] = []  # Only the worker's thread reads and writes it.
    self.is_cancelled = False


class Worker:
  """A thread that answers jobs with one engine."""

  def __init__(self, engine: Engine) -> None:
    self._engine = engine
    self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._room = engine.room()  # rows that are not promised to any job
    self._masks = engine.config.constrained  # of these, rows that may have a constraint
    self._jobs: dict[int, tuple[Job, int]] = {}  # handle → job, number of the request in it
    self._left: dict[int, int] = {}  # handle → responses under way
    self._has_begun = self._is_short = False
    self.failure: Exception | None = None
    self._thread = threading.Thread(target=self._work, name='engine', daemon=True)

  def start(self) -> None:
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread after the present call of the engine, and tells the listeners."""
    self._inbox.put(None)
    self._thread.join()

  # --- For other threads ----------------------------------------------------------------

  def submit(self, requests: Sequence[Request], listener: Listener) -> Job:
    """Queues all of the requests, or none.

    Raises:
      UserError: a request cannot be answered.
      Busy: the engine has no room now.
      Stopped: the engine answers nothing any more.
    """
    for request in requests:
      self._engine.check(request)  # Any thread may call it, since it reads only constants.
    num, most = sum(r.num_samples for r in requests), self._engine.config.queue
    if num > most:
      raise UserError(f'{num} responses are asked for at once and at most {most} are taken.')
    num_held, most_held = sum(map(_num_held, requests)), self._engine.config.constrained
    if num_held > most_held:
      raise UserError(f'{num_held} responses of a format are asked for at once and at most '
                      f'{most_held} are taken.')
    with self._lock:
      if self.failure is not None:
        raise Stopped(str(self.failure)) from self.failure
      if num > self._room:
        raise Busy(f'{most - self._room} responses are under way and at most {most} are taken')
      if num_held > self._masks:
        raise Busy(f'{most_held - self._masks} responses of a format are under way and at most '
                   f'{most_held} are taken')
      self._room -= num
      self._masks -= num_held
      job = Job(requests, listener)
      self._inbox.put(lambda: self._begin(job))
    return job

  def cancel(self, job: Job) -> None:
    """Ends a job, whose listener is not called any more; a job that has ended stays as it is."""
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
    except Exception as e:  # Whatever broke the engine, the listeners must be told.
      logging.getLogger(__name__).exception('The engine has failed.')
      failure = e
    with self._lock:
      self.failure = failure
    self._obey(wait=False)  # `failure` is set, so that no command comes after these.
    for job, number in self._jobs.values():
      if not job.is_cancelled:
        job.listener(number, failure)

  def _obey(self, *, wait: bool = True) -> bool:
    """Runs the commands that have arrived; with `wait` and no job it waits for one first.

    Returns:
      Whether the thread goes on.
    """
    commands = [self._inbox.get()] if wait and not self._jobs else []
    while not self._inbox.empty():
      commands.append(self._inbox.get())
    for command in commands:
      if command is not None:
        command()
    return None not in commands

  def _steps(self) -> int | None:
    """Decode steps of the next call: one where a job has just begun, for an early first token.

    Two calls in a row are never this short, or many new jobs would slow all others down.
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
        self._give_back(request, request.num_samples)
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
      self._give_back(job.requests[number], 1)
      self._left[handle] -= 1
      if not self._left[handle]:
        del self._left[handle], self._jobs[handle]
    if not job.is_cancelled:
      job.listener(number, response)

  def _give_back(self, request: Request, num: int) -> None:
    with self._lock:
      self._room += num
      self._masks += num if request.constraint is not None else 0


def _num_held(request: Request) -> int:
  """The responses of a request that are held to a constraint."""
  return request.num_samples if request.constraint is not None else 0
