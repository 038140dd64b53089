"""Each step's metrics, from the devices to the run's files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
import time

from jax.sharding import Mesh
import numpy as np

from jaxrl_pt import metrics
from jaxrl_pt.checkpoint import Checkpointer
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel import hosts
from jaxrl_pt.types import Array, Weighted

# May stop the run for what (metrics of a step, last good checkpoint) tell.
Check = Callable[[dict[str, float], int | None], None]


@dataclass
class _Pending:
  """A dispatched step whose metrics are still on their way."""

  step: int
  values: dict[str, Weighted]
  ids: Array
  num_tokens: Array | int
  check: Check | None


class Recorder:
  """Fetches each step's metrics one step late, so that the device never waits for the host.

  A non-finite loss or gradient stops the run before that step can reach a checkpoint.
  """

  def __init__(self, writer: metrics.Writer, checkpointer: Checkpointer, mesh: Mesh,
               flops_per_token: float) -> None:
    self._writer = writer
    self._devices = list(mesh.devices.flat)
    self._flops_per_token = flops_per_token
    self._checkpointer = checkpointer
    self._pending: _Pending | None = None
    self._extra: dict[str, float] = {}
    self._timing: dict[str, float] = {}
    self._started = self._last = time.perf_counter()
    self._busy = 0.0

  def dispatched(self, step: int, values: dict[str, Weighted], ids: Array,
                 num_tokens: Array | int,
                 check: Check | None = None) -> None:
    """Notes that step `step` (counted from 1) is under way; writes the one before it.

    Args:
      ids: of the examples of all hosts, a global array.
      num_tokens: of all hosts.
      check: gets the step's metrics when they are there, with the number of the last good
        checkpoint or None, and may stop the run.
    """
    self.flush()
    self._pending = _Pending(step, values, ids, num_tokens, check)

  def sync(self) -> None:
    """Writes the pending row and waits until all rows are on disk: a checkpoint comes next.

    Raises:
      UserError: as `flush`; a non-finite step never reaches a checkpoint.
    """
    self.flush()
    self._writer.sync()

  def add(self, values: Mapping[str, float]) -> None:
    """Adds evaluation results to the row of the pending step."""
    self._extra.update(values)

  def time(self, values: Mapping[str, float]) -> None:
    """Adds times and speeds of its stages to the row of the pending step."""
    self._timing.update(values)

  def restart_clock(self) -> None:
    """Leaves out of the step time what has just been done (evaluation, compilation)."""
    self._last = time.perf_counter()

  def flush(self) -> None:
    """Writes the pending row.

    Raises:
      UserError: a metric of the step is not finite; names step, batch, last checkpoint.
    """
    if self._pending is None:
      return
    pending, self._pending = self._pending, None
    values = metrics.host_values(pending.values)
    bad = sorted(k for k, v in values.items() if not np.isfinite(v))
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    self._busy += seconds
    speed = float(pending.num_tokens) / max(seconds, 1e-9)
    timing = {'seconds': seconds, 'tokens_per_second': speed,
              'model_flops_per_second': speed * self._flops_per_token,
              'goodput': self._busy / max(now - self._started, 1e-9)}
    mfu = metrics.mfu(timing['model_flops_per_second'], self._devices)
    if mfu is not None:  # Only where the device's peak is known.
      timing['mfu'] = mfu
    self._writer.write(pending.step, {**values, **self._extra}, {**timing, **self._timing})
    self._extra, self._timing = {}, {}
    if bad:
      good = self._checkpointer.latest_step()
      raise UserError(
          f'{", ".join(bad)} became non-finite at step {pending.step} on examples '
          f'{hosts.on_host(pending.ids).tolist()}: the last good checkpoint is '
          f'{"none" if good is None else f"step {good}"}; lower the learning rate or the clip, '
          'then run the same command again to go on from there.')
    if pending.check is not None:
      pending.check(values, self._checkpointer.latest_step())
