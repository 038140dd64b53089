"""The recorder, which takes each step's metrics from the devices to the run's files."""

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

# check(metrics of a step, step of the last good checkpoint or None), which raises to stop the run.
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

  A metric that is not finite stops the run before that step can reach a checkpoint.
  """

  def __init__(self, writer: metrics.Writer, checkpointer: Checkpointer, mesh: Mesh,
               flops_per_token: float) -> None:
    """Starts the clock.

    Args:
      writer: takes the rows.
      checkpointer: knows the last good checkpoint.
      mesh: the devices, for the model FLOP/s utilisation.
      flops_per_token: the model FLOPs of a step by the tokens that it works on.
    """
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
    """Notes that a step is under way, and writes the row of the step before it.

    Args:
      step: the step's number, from 1.
      values: the step's metrics, on the devices.
      ids: i32[N], the ids of the examples of all hosts, as a global array.
      num_tokens: the number of tokens of all hosts.
      check: is called with the step's metrics once they have arrived.

    Raises:
      UserError: as `flush`.
    """
    self.flush()
    self._pending = _Pending(step, values, ids, num_tokens, check)

  def sync(self) -> None:
    """Writes the pending row and waits until all rows are on disk, as a checkpoint requires.

    Raises:
      UserError: as `flush`.
    """
    self.flush()
    self._writer.sync()

  def add(self, values: Mapping[str, float]) -> None:
    """Adds evaluation results to the row of the pending step."""
    self._extra.update(values)

  def time(self, values: Mapping[str, float]) -> None:
    """Adds times and speeds of the pending step's stages to its row."""
    self._timing.update(values)

  def restart_clock(self) -> None:
    """Leaves out of the next step's time what has been done since the last row was written."""
    self._last = time.perf_counter()

  def flush(self) -> None:
    """Writes the row of the pending step, if there is one, and waits for its metrics.

    Raises:
      UserError: a metric is not finite, or the step's check stops the run.
      Unwritable: the row cannot be written.
    """
    if self._pending is None:
      return
    pending, self._pending = self._pending, None
    values = metrics.host_values(pending.values)
    nonfinite = sorted(k for k, v in values.items() if not np.isfinite(v))
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    self._busy += seconds
    speed = float(pending.num_tokens) / max(seconds, 1e-9)
    timing = {'seconds': seconds, 'tokens_per_second': speed,
              'model_flops_per_second': speed * self._flops_per_token,
              'goodput': self._busy / max(now - self._started, 1e-9)}
    mfu = metrics.mfu(timing['model_flops_per_second'], self._devices)
    if mfu is not None:  # None means that the device's peak is not known.
      timing['mfu'] = mfu
    self._writer.write(pending.step, {**values, **self._extra}, {**timing, **self._timing})
    self._extra, self._timing = {}, {}
    if nonfinite:
      last = self._checkpointer.latest_step()
      raise UserError(
          f'{", ".join(nonfinite)} became non-finite at step {pending.step} on examples '
          f'{hosts.on_host(pending.ids).tolist()}: the last good checkpoint is '
          f'{"none" if last is None else f"step {last}"}; lower the learning rate or the clip, '
          'then run the same command again to go on from there.')
    if pending.check is not None:
      pending.check(values, self._checkpointer.latest_step())
