"""What all tests share: the CPU as device, and one line that says what was left out."""

from collections.abc import Iterator
import gc
import importlib.util
import os
from pathlib import Path
import signal

import pytest

from tests.xla_flags import QUICK

# Before any test imports jax. Tests that need several devices start a process of their own.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Tests compile far more than they compute.
os.environ.setdefault('XLA_FLAGS', QUICK)
# The hundreds of processes that tests start would each compile the whole package anew.
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)

def _missing(*names: str) -> list[str]:
  return [name for name in names if importlib.util.find_spec(name) is None]


_PARITY = _missing('torch', 'transformers')
_SEQIO = _missing('seqio')
_VERIFIERS = _missing('sympy', 'reasoning_gym', 'textarena')
collect_ignore_glob = ['parity/*'] if _PARITY else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
  left_out = []
  if _PARITY:
    left_out.append(f'parity tests ({" and ".join(_PARITY)} not installed: `make parity`)')
  if _SEQIO:
    left_out.append('tests of seqio tasks (seqio not installed: `make seqio`)')
  if _VERIFIERS:
    left_out.append(f'tests of verifiers ({" and ".join(_VERIFIERS)} not installed: '
                    '`make verifiers`)')
  if left_out:
    terminalreporter.write_line(f'Left out: {", ".join(left_out)}.')


# Each compiled program takes memory maps, of which Linux gives a process 65,530. When there are no
# more, XLA crashes without a word.
_MOST_MAPS = 20_000
_MAPS = Path('/proc/self/maps')


@pytest.fixture(autouse=True, scope='module')
def few_programs() -> Iterator[None]:
  """Forgets what the tests of a file have compiled where a process holds too many programs."""
  yield
  if _MAPS.exists() and _MAPS.read_bytes().count(b'\n') > _MOST_MAPS:
    import jax
    jax.clear_caches()
    gc.collect()


# A job that a shell starts in the background ignores Ctrl-C, and one under nohup a dropped
# terminal; so would the processes that tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
