"""The supervisor of a verifying process: `python -m jaxrl_pt.verifiers.child FD`.

    trainer ── socket ── supervisor ── pipes ── worker (`worker.py`), which runs the verifier

The supervisor runs no verifier. It forks the worker, hands it one response at a time, ends it at
the deadline and starts another. It adopts every process that the worker leaves behind, in whatever
session, and ends it with the worker. It imports the libraries of the built-in verifiers once, so
that a new worker costs only a fork. A worker that has evaluated a response as an expression is
replaced.

The supervisor ignores the signals that stop a run (SIGTERM, SIGINT and SIGHUP, which a service
manager sends to every process), because the trainer finishes its step first. It ends with the
trainer.
"""

from collections.abc import Mapping, Sequence
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
from jaxrl_pt.verifiers import build, sandbox, worker
from jaxrl_pt.verifiers.channel import (
  MAX_REQUEST,
  MAX_RESULT,
  Closed,
  Deadline,
  Malformed,
  receive,
  send,
)
from jaxrl_pt.verifiers.response_verdict import Outcome, ResponseVerdict

START_SECONDS = 120.0  # A busy machine may take long to import a verifier's libraries.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MAX_WORDS = 1500  # How many of the last bytes of the worker's error output are kept.
# Signals that come from outside: from an operator, a service manager, or the kernel when memory is
# short.
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class _LostError(Exception):
  """The worker was killed from outside or did not start: its response may be verified again."""


class _OrphanedError(Exception):
  """The trainer has died or closed the channel."""


class _Worker:
  """One forked worker process and the pipes to it. Final."""

  def __init__(self, parts: Sequence[cfg.HostVerifier], limits: cfg.VerifierPool,
               channel: socket.socket, trainer: int) -> None:
    """Forks the worker and waits until it is ready.

    Args:
      parts: verifiers that share a sandbox.
      limits: what verifying one response may cost.
      channel: the socket to the trainer; when it closes, all waiting ends.
      trainer: process id of the trainer; when it dies, all waiting ends.

    Raises:
      UserError: the worker refuses the verifier's settings.
      _LostError: the worker did not start.
      _OrphanedError: the trainer is gone.
    """
    self._parts, self._limits = parts, limits
    self._channel, self._trainer = channel.fileno(), trainer
    self._words = b''
    pipes = [os.pipe() for _ in range(3)]
    (requests, self._requests), (self._results, results), (self._errors, errors) = pipes
    self._pid = _forked(parts, limits, requests, results, errors)
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
      raise _LostError(f'a verifier process did not start: '
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

  # --- Verifying --------------------------------------------------------------------------

  @property
  def alive(self) -> bool:
    """Whether the worker can verify another response."""
    return self._reap(os.WNOHANG) is None

  def verify(self, request: dict[str, Any], deadline: Deadline) -> list[ResponseVerdict]:
    """The verdict of each of the worker's verifiers on one response.

    If the worker fails, all verdicts are TIMEOUT or CRASH, and the worker is dead.

    Raises:
      _LostError: the worker was killed from outside.
      _OrphanedError: the trainer is gone.
    """
    nonce = secrets.token_hex(16)
    try:
      send(self._requests, {**request, 'nonce': nonce}, deadline, self)
      answer = receive(self._results, deadline, MAX_RESULT, self)
      verdicts = answer.get('verdicts')
      if answer.get('nonce') != nonce or not isinstance(verdicts, list):
        raise Malformed('a message that is not a verdict')
      return [build.decoded(data, part) for data, part in zip(verdicts, self._parts, strict=True)]
    except TimeoutError:
      self.end(0.0)
      return self._all(Outcome.TIMEOUT, f'{self._limits.wall_seconds:g} s went by')
    except (Malformed, ValueError) as error:
      self.end(0.0)
      return self._all(Outcome.CRASH, f'the verifier process sent {error}')
    except Closed:
      return self._explained(self.end(1.0))

  def _explained(self, code: int | None) -> list[ResponseVerdict]:
    """The verdicts on the response during which the worker ended.

    Args:
      code: the worker's exit code; None if it had to be killed.

    Raises:
      _LostError: the worker was killed from outside.
    """
    if code == -signal.SIGPROF:
      return self._all(Outcome.TIMEOUT, f'{self._limits.cpu_seconds:g} s of processor time used')
    words = self._last_words()
    said = f': {words}' if words else ''
    if code is None:
      return self._all(Outcome.CRASH, f'the verifier process closed its channel{said}')
    detail = f'the verifier process ended with code {code}{said}'
    if -code in _FROM_OUTSIDE:
      raise _LostError(detail)
    return self._all(Outcome.CRASH, detail)

  def _all(self, outcome: Outcome, detail: str) -> list[ResponseVerdict]:
    return [ResponseVerdict(outcome, detail=detail)] * len(self._parts)

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


def _forked(parts: Sequence[cfg.HostVerifier], limits: cfg.VerifierPool, *pipes: int) -> int:
  """Forks a worker and returns its process id."""
  me = os.getpid()
  pid = os.fork()
  if pid == 0:
    try:
      worker.run(parts, limits, me, *pipes)
    except BaseException:
      traceback.print_exc()
    finally:
      os._exit(1)
  return pid


class _Supervisor:
  """The workers of one verifier: two where a Composite needs both sandboxes, else one."""

  def __init__(self, settings: cfg.HostVerifier, limits: cfg.VerifierPool,
               channel: socket.socket, trainer: int) -> None:
    self._settings, self._limits = settings, limits
    self._channel, self._trainer = channel, trainer
    parts = build.parts_of(settings)
    by_sandbox = [[i for i, part in enumerate(parts) if build.is_tight(part) == tight]
                  for tight in (True, False)]
    self._places = [places for places in by_sandbox if places]  # in `_parts`, for each worker
    self._parts = parts
    self._workers: list[_Worker] = []

  def ready(self) -> None:
    """Starts all workers again if one is not alive; it raises what `_Worker` raises."""
    if len(self._workers) == len(self._places) and all(w.alive for w in self._workers):
      return
    self.end()
    for places in self._places:
      self._workers.append(_Worker([self._parts[i] for i in places], self._limits, self._channel,
                                   self._trainer))

  def verify(self, request: dict[str, Any]) -> ResponseVerdict:
    """The verdict on one response, under one deadline; it raises what `_Worker.verify` raises."""
    self.ready()
    deadline = Deadline(self._limits.wall_seconds)
    verdicts: dict[int, ResponseVerdict] = {}
    for process, places in zip(self._workers, self._places, strict=True):
      verdicts |= dict(zip(places, process.verify(request, deadline), strict=True))
    return build.combined(self._settings, [verdicts[i] for i in range(len(self._parts))])

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
        answer = build.encoded(self.verify(request))
      except (_LostError, UserError) as error:
        answer = {'lost': str(error)}
      send(fd, answer, Deadline(None), _Trainer(self._trainer))
      if build.evaluates(self._settings, request['reference']):
        self.end()
      try:
        self.ready()  # The trainer is busy meanwhile. `verify` tries again what fails here.
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


def main(channel: socket.socket) -> None:
  """Serves the trainer at the other end of `channel`, then ends every process below this one."""
  for number in STOP_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
  sandbox.adopt_orphans()
  channel.setblocking(False)
  fd = channel.fileno()
  try:
    first = receive(fd, Deadline(None), MAX_REQUEST)
    settings, limits = build.from_json(first['verifier']), cfg.VerifierPool(**first['limits'])
    supervisor = _Supervisor(settings, limits, channel, first['parent'])
    try:
      build.preload(settings)
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
  main(socket.socket(fileno=int(sys.argv[1])))
