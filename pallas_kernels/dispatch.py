"""Which implementation of an op runs: the kernel of the chip at hand, or the definition.

An op's api lists its implementations from the fastest to the reference. One that cannot take
the arguments raises NotImplementedError and the next is tried; a line in the log says so,
once. Nothing is approximated on the way: all implementations of an op compute the same.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import logging
from typing import Any, Literal, NamedTuple, get_args

import jax

Generation = Literal['v4', 'v5e', 'v5p', 'v6e', 'tpu7x']
GENERATIONS: tuple[Generation, ...] = get_args(Generation)

_GENERATION_OF_KIND: dict[str, Generation] = {
    'TPU v4': 'v4',
    'TPU v5 lite': 'v5e', 'TPU v5e': 'v5e',
    'TPU v5': 'v5p', 'TPU v5p': 'v5p',
    'TPU v6 lite': 'v6e', 'TPU v6e': 'v6e',
    'TPU7x': 'tpu7x',
}
_log = logging.getLogger('pallas_kernels')


class Implementation(NamedTuple):
  """One way to compute an op. `run` raises NotImplementedError for what it cannot take."""

  name: str
  run: Callable[..., Any]


def generation_of(device: Any) -> Generation | None:
  """The TPU generation of a device (also of a topology's), None for whatever else."""
  return _GENERATION_OF_KIND.get(device.device_kind)


def first_supported(op: str, implementations: Sequence[Implementation], *args: Any,
                    **kwargs: Any) -> Any:
  """The result of the first implementation that takes these arguments.

  Raises:
    NotImplementedError: none does, not even the last.
  """
  for this, following in zip(implementations, [*implementations[1:], None], strict=True):
    try:
      return this.run(*args, **kwargs)
    except NotImplementedError as e:
      if following is None:
        raise
      shapes = ', '.join(f'{x.dtype}{list(x.shape)}' for x in jax.tree.leaves(args)
                         if isinstance(x, jax.Array))
      _say_once(op, this.name, shapes, str(e), following.name)
  raise NotImplementedError(f'{op} has no implementation')


@functools.cache
def _say_once(*what: str) -> None:
  _log.info('%s: %s does not take %s (%s); using %s.', *what)


@contextlib.contextmanager
def noting() -> Iterator[list[str]]:
  """Collects, while a program is traced inside, which kernels are passed over and why.

  Each line is said once, as `op: why its kernel does not take the shapes`.
  """
  lines: list[str] = []

  class Collect(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      assert isinstance(record.args, tuple)
      op, _, _, reason, _ = record.args
      if (line := f'{op}: {reason}') not in lines:
        lines.append(line)

  collect, level, propagate = Collect(), _log.level, _log.propagate
  _say_once.cache_clear()
  _log.addHandler(collect)
  _log.setLevel(logging.INFO)
  _log.propagate = False
  try:
    yield lines
  finally:
    _log.propagate = propagate
    _log.setLevel(level)
    _log.removeHandler(collect)
