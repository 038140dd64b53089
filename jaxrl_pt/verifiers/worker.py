"""The process that runs a handler: the pool's supervisor forks it, bounds it and does not trust it.

It reads requests from one pipe and writes answers to another. Each answer carries the nonce of its
request, so that bytes which other code writes there are not taken for an answer. The only other
open descriptor is its error output, of which the supervisor keeps the last bytes.
"""

import os
import random
import signal
import traceback
from typing import Any, NoReturn

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import sandbox
from jaxrl_pt.verifiers.channel import MAX_REQUEST, Closed, Deadline, receive, send
from jaxrl_pt.verifiers.service import Handle, Role

_REQUESTS, _RESULTS = 3, 4  # descriptors
MAX_REASON = 2000  # characters of the reason why a handler raised an exception


def run(role: Role, limits: cfg.VerifierPool, parent: int, requests: int, results: int,
        errors: int) -> NoReturn:
  """Answers requests until they end. It is called in a fresh fork and never returns.

  Args:
    role: makes the handler, and says which sandbox it needs.
    limits: what one answer may cost.
    parent: process id of the supervisor.
    requests, results, errors: descriptors of the pipes to the supervisor.
  """
  sandbox.die_with_parent(parent)
  os.setsid()
  _keep_only(requests, results, errors)
  try:
    handle = role.make()
  except UserError as error:
    send(_RESULTS, {'error': str(error)}, Deadline(None))
    os._exit(0)
  if role.is_tight:
    sandbox.enter_tight(limits.memory_mib)
  else:
    sandbox.enter_open(limits.memory_mib)
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  send(_RESULTS, {'ready': True}, Deadline(None))
  try:
    while True:
      request = receive(_REQUESTS, Deadline(None), MAX_REQUEST)
      answer = _answered(handle, request['request'], limits.cpu_seconds)
      send(_RESULTS, {'nonce': request['nonce'], **answer}, Deadline(None))
  except Closed:
    os._exit(0)


def _keep_only(requests: int, results: int, errors: int) -> None:
  """Leaves the three pipes open, the errors as standard error, and closes all else.

  Standard input and output lead nowhere.
  """
  nowhere = os.open(os.devnull, os.O_RDWR)
  # The pipes move to high numbers first, since one may have the number that another shall have.
  moved = [os.dup(fd) for fd in (requests, results, errors)]
  high = max(*moved, 10) + 1
  requests, results, errors = (os.dup2(fd, high + i) for i, fd in enumerate(moved))
  for fd, place in ((nowhere, 0), (nowhere, 1), (errors, 2), (requests, _REQUESTS),
                    (results, _RESULTS)):
    os.dup2(fd, place, inheritable=place <= 2)
  os.closerange(_RESULTS + 1, os.sysconf('SC_OPEN_MAX'))


def _answered(handle: Handle, request: Any, cpu_seconds: float) -> dict[str, Any]:
  """{"answer": …}, or {"raised": why} where the handler raised an exception."""
  random.seed(0)  # A handler's random numbers must not depend on what was asked before.
  try:
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    return {'answer': handle(request)}
  except Exception as error:  # Whatever a handler raises is an outcome.
    where = traceback.extract_tb(error.__traceback__)[-1]
    return {'raised': f'{type(error).__name__}: {error} '
                      f'({os.path.basename(where.filename)}:{where.lineno})'[:MAX_REASON]}
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
