"""Python programs, which a policy has written, in isolation (`isolation.py`).

`run` is a tool: it gives back what a program prints. `evaluate` is for a verifier: it gives back
the values of expressions, and the program does not learn what they should be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import json
from pathlib import Path
from typing import Any

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.verifiers import isolation

_MAX_VALUES = 1 << 16  # bytes of the encoded values of one program
_HARNESS = Path(__file__).with_name('harness.py').read_bytes()


def check(owner: str) -> None:
  """Runs a small program.

  Args:
    owner: the settings that need the interpreter, for the message.

  Raises:
    UserError: this machine does not isolate programs, so that none may run.
  """
  try:
    isolation.probe()
  except isolation.NotIsolatedError as error:
    raise UserError(
        f'{owner} runs programs only in isolation, which is not to be had here: {error}. Run on '
        'Linux as root with CAP_SYS_ADMIN, or where users may make namespaces '
        '(sysctl user.max_user_namespaces).') from error


def run(program: str, limits: cfg.Interpreter) -> str:
  """Runs a program as a script and returns what it printed, or why it ended otherwise.

  Raises:
    NotIsolatedError, KilledError: as in `isolation.run`.
  """
  finished = isolation.run(['/main.py'], {'/main.py': program.encode(errors='replace')}, limits,
                           limits.output_bytes)
  text = finished.output.decode(errors='replace')
  if finished.is_cut:
    text += f'\n[only the first {limits.output_bytes} bytes of the output are shown]'
  if finished.is_late:
    text += (f'\n[ended after {limits.cpu_seconds} s of processor time or '
             f'{limits.wall_seconds:g} s of the clock]')
  elif finished.code < 0:
    text += f'\n[ended by signal {-finished.code}]'
  elif finished.code > 0 and 'Traceback' not in text:
    text += f'\n[ended with code {finished.code}]'
  return text.strip('\n')


# --- Values ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluated:
  """What became of expressions.

  values: the values in order; fewer than there were expressions where the program went wrong.
  detail: what went wrong first, empty where nothing did.
  """

  values: Sequence[Any]
  detail: str = ''


class _Other:
  """A value of no plain type, which equals nothing, not even itself."""

  def __eq__(self, other: object) -> bool:
    return False

  __hash__ = object.__hash__


def evaluate(program: str, setup: str, expressions: Sequence[str], limits: cfg.Interpreter
             ) -> Evaluated:
  """Runs a program, then its set-up, then evaluates expressions with their names, in isolation.

  The values are rebuilt from None, bool, int, float, complex, str, bytes, list, tuple, set,
  frozenset and dict, a subclass as its base. Whatever the program does, an object of its own never
  comes out, and so no comparison that it has defined.

  Raises:
    NotIsolatedError, KilledError: as in `isolation.run`.
  """
  request = json.dumps({'program': program, 'setup': setup, 'expressions': list(expressions)})
  finished = isolation.run(['/main.py'], {'/main.py': _HARNESS, '/input.json': request.encode()},
                           limits, _MAX_VALUES)
  if finished.is_late:
    return Evaluated((), 'its time was used up')
  try:
    results = json.loads(finished.output)
    assert isinstance(results, list)
    values: list[Any] = []
    for result in results[:len(expressions)]:
      if set(result) != {'value'}:
        return Evaluated(values, str(result['error'])[:200])
      values.append(decoded(result['value']))
  except (ValueError, TypeError, KeyError, AssertionError, RecursionError):
    return Evaluated((), f'it ended with code {finished.code} and gave no values')
  if len(values) < len(expressions):
    return Evaluated(values, 'it gave too few values')
  return Evaluated(values)


def decoded(data: Any) -> Any:
  """The value that `harness.encoded` has written, read as data of a hostile process.

  Raises:
    ValueError, TypeError, RecursionError: the data are no such value.
  """
  if data is None or isinstance(data, (bool, str)):
    return data
  if not isinstance(data, list) or len(data) != 2:
    raise ValueError('not a value')
  kind, content = data
  match kind, content:
    case 'int', str():
      return int(content, 16)
    case 'float', str():
      return float.fromhex(content)
    case 'complex', [str(real), str(imaginary)]:
      return complex(float.fromhex(real), float.fromhex(imaginary))
    case 'bytes', str():
      return bytes.fromhex(content)
    case 'dict', list():
      return {decoded(key): decoded(value) for key, value in content}
    case 'other', str():
      return _Other()
    case _, list():
      return _COLLECTIONS[kind](map(decoded, content))
  raise ValueError('not a value')


_COLLECTIONS: dict[str, Any] = {'list': list, 'tuple': tuple, 'set': set, 'frozenset': frozenset}
