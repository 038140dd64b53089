"""The process that runs verifiers: the pool's supervisor forks it, bounds it and does not trust it.

It reads requests from one pipe and writes verdicts to another. Each verdict carries the nonce of
its request, so that bytes which other code writes there are not taken for a verdict. The only other
open descriptor is its error output, of which the supervisor keeps the last bytes.
"""

from collections.abc import Sequence
import os
import random
import signal
import traceback
from typing import Any, NoReturn

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import build, sandbox
from jaxrl_pt.verifiers.channel import MAX_REQUEST, Closed, Deadline, receive, send
from jaxrl_pt.verifiers.response_verdict import HostVerifier, Outcome, ResponseVerdict

_REQUESTS, _RESULTS = 3, 4  # descriptors


def run(parts: Sequence[cfg.HostVerifier], limits: cfg.VerifierPool, parent: int, requests: int,
        results: int, errors: int) -> NoReturn:
  """Verifies until the requests end. It is called in a fresh fork and never returns.

  Args:
    parts: verifiers that share a sandbox.
    limits: what verifying one response may cost.
    parent: process id of the supervisor.
    requests, results, errors: descriptors of the pipes to the supervisor.
  """
  sandbox.die_with_parent(parent)
  os.setsid()
  _keep_only(requests, results, errors)
  try:
    verifiers = [build.host_verifier(part) for part in parts]
  except UserError as error:
    send(_RESULTS, {'error': str(error)}, Deadline(None))
    os._exit(0)
  if all(build.is_tight(part) for part in parts):
    sandbox.enter_tight(limits.memory_mib)
  else:
    sandbox.enter_open(limits.memory_mib)
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  send(_RESULTS, {'ready': True}, Deadline(None))
  try:
    while True:
      request = receive(_REQUESTS, Deadline(None), MAX_REQUEST)
      verdicts = [_verify(verify, part, request, limits.cpu_seconds)
                  for verify, part in zip(verifiers, parts, strict=True)]
      send(_RESULTS, {'nonce': request['nonce'], 'verdicts': list(map(build.encoded, verdicts))},
           Deadline(None))
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


def _verify(verify: HostVerifier, part: cfg.HostVerifier, request: dict[str, Any],
            cpu_seconds: float) -> ResponseVerdict:
  random.seed(0)  # A verifier's random numbers must not depend on what was verified before.
  try:
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    verdict = verify(request['response'], request['reference'])
    if not isinstance(verdict, ResponseVerdict):
      return ResponseVerdict(
          Outcome.CRASH, detail=f'the verifier returned {type(verdict).__name__}, '
                                'not a ResponseVerdict')
    return build.checked(verdict, part)
  except Exception as error:  # Whatever a verifier raises is an outcome.
    where = traceback.extract_tb(error.__traceback__)[-1]
    detail = (f'{type(error).__name__}: {error} '
              f'({os.path.basename(where.filename)}:{where.lineno})')
    return ResponseVerdict(Outcome.CRASH, detail=detail)
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
