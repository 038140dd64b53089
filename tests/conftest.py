"""What all tests share: the CPU as device, and one line that says what was left out."""

import importlib.util
import os

import pytest

# Before any test imports jax. Tests that need several devices start a process of their own.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

_MISSING = [name for name in ('torch', 'transformers') if importlib.util.find_spec(name) is None]
collect_ignore_glob = ['parity/*'] if _MISSING else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
  if _MISSING:
    terminalreporter.write_line(
        f'Parity tests left out: {" and ".join(_MISSING)} not installed (`make parity` adds them).')
