"""Metrics: one JSON row a step, one console line a step, TensorBoard, and model FLOP/s.

`metrics.jsonl` is the record. All keys but those under `time/` are functions of the
run's settings and the step, so two runs can be compared row by row. JSON has no NaN:
non-finite numbers are written as "NaN", "Infinity" and "-Infinity" and read back as floats.
"""

from collections.abc import Mapping
import json
import math
import os
from pathlib import Path
import sys
from typing import Any, Self, TextIO

import jax
from rich import progress
from rich.console import Console as RichConsole

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.types import Weighted

FILE = 'metrics.jsonl'
TIME = 'time/'

Row = dict[str, float]


def host_values(values: Mapping[str, Weighted]) -> dict[str, float]:
  """{name: sum / count} on the host, fetched in one transfer; 0 where nothing was counted."""
  fetched = jax.device_get({name: (v.sum, v.count) for name, v in values.items()})
  return {name: float(total) / max(float(count), 1e-9) for name, (total, count) in fetched.items()}


def deterministic(row: Row) -> Row:
  """The row without its `time/` keys: what a resumed run must repeat exactly."""
  return {key: value for key, value in row.items() if not key.startswith(TIME)}


# --- Rows -----------------------------------------------------------------------------


def _dump(row: Mapping[str, float]) -> str:
  names = {'nan': 'NaN', 'inf': 'Infinity', '-inf': '-Infinity'}
  plain = {k: v if math.isfinite(v) else names[str(v)] for k, v in row.items()}
  return json.dumps(plain, allow_nan=False) + '\n'


def _parse(line: str) -> Row:
  row = json.loads(line)
  if not isinstance(row, dict) or not isinstance(row.get('step'), int):
    raise ValueError('no step')
  return {key: value if isinstance(value, int) else float(value) for key, value in row.items()}


def read_rows(path: Path) -> list[Row]:
  """Rows of a metrics file; a last line torn by a kill is left out.

  Raises:
    UserError: the file cannot be read, or another line is not a row.
  """
  try:
    lines = path.read_bytes().split(b'\n')
  except OSError as error:
    raise UserError(f'cannot read {path} ({error.strerror}): give the work directory of a '
                    'run.') from error
  rows = []
  for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn or empty
    try:
      rows.append(_parse(line.decode()))
    except ValueError as error:
      raise UserError(f'line {number} of {path} is not a row of metrics ({error}): remove it or '
                      'use another work directory.') from error
  return rows


class Writer:
  """Writes each step's row to `metrics.jsonl`, TensorBoard and the console. Final.

  Only process 0 writes. A context manager; leaving it closes the files.
  """

  def __init__(self, workdir: Path, *, resume_step: int, num_steps: int, tensorboard: bool,
               log_every: int = 1):
    """Opens the file and drops the rows a killed run wrote after `resume_step`.

    Args:
      workdir: receives metrics.jsonl and, if asked for, tensorboard/.
      resume_step: step of the checkpoint resumed from; 0 starts a new file.
      num_steps: last step of the run, for the progress bar.
      tensorboard: whether to write TensorBoard events too.
      log_every: steps per console line; every step has its row in any case.

    Raises:
      UserError: the file cannot be written, or it is not a metrics file.
    """
    self._path = workdir / FILE
    self._file: TextIO | None = None
    self._events: Any = None
    self._console: Console | None = None
    self._log_every, self._num_steps = log_every, num_steps
    if jax.process_index() != 0:
      return
    rows = read_rows(self._path) if self._path.exists() else []
    try:
      self._file = _reopen(self._path, [row for row in rows if row['step'] <= resume_step])
    except OSError as error:
      raise _unwritable(self._path, error) from error
    self._console = Console(resume_step, num_steps)
    if tensorboard:
      from tensorboardX import SummaryWriter  # here: its import costs 0.3 s
      self._events = SummaryWriter(str(workdir / 'tensorboard'), purge_step=resume_step + 1)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
    """Writes the row of `step`; `timing` is what differs from run to run.

    Raises:
      UserError: the row cannot be written (disk full).
    """
    if self._file is None:
      return
    row: Row = {'step': step, **values, **{TIME + key: v for key, v in timing.items()}}
    try:
      self._file.write(_dump(row))
      self._file.flush()
    except OSError as error:
      raise _unwritable(self._path, error) from error
    if self._events is not None:
      for key, value in row.items():
        if key != 'step':
          self._events.add_scalar(key, value, step)
    if self._console is not None:
      self._console.step(row, shown=step % self._log_every == 0 or step == self._num_steps)

  def close(self) -> None:
    """Closes the files and takes the progress bar down."""
    if self._console is not None:
      self._console.close()
    if self._events is not None:
      self._events.close()
    if self._file is not None:
      self._file.close()
    self._file = self._events = self._console = None


def _reopen(path: Path, rows: list[Row]) -> TextIO:
  """Replaces the file by `rows` in one rename, so that a kill here loses nothing."""
  fresh = path.with_suffix('.jsonl.tmp')
  with fresh.open('w', encoding='utf-8') as file:
    file.writelines(_dump(row) for row in rows)
    file.flush()
    os.fsync(file.fileno())
  fresh.replace(path)
  return path.open('a', encoding='utf-8')


def _unwritable(path: Path, error: OSError) -> UserError:
  return UserError(f'cannot write {path} ({error.strerror}): free some space or choose another '
                   'work directory, then resume.')


# --- Console --------------------------------------------------------------------------

# Shown when present, in this order. Timing keys stand here as they do in the row.
_SHOWN = (
    ('loss', 'loss {:.4f}'),
    ('reward', 'reward {:.3f}'),
    ('accuracy', 'accuracy {:.3f}'),
    ('gap', 'gap {:.4f}'),
    ('staleness', 'staleness {:.4f}'),
    ('kl', 'KL {:.4f}'),
    ('validation/loss', 'validation {:.4f}'),
    ('validation/bits_per_byte', '{:.3f} bits/byte'),
    ('validation/reward', 'held-out reward {:.3f}'),
    ('time/tokens_per_second', '{:,.0f} tokens/s'),
    ('time/mfu', 'MFU {:.1%}'),
    ('time/goodput', 'goodput {:.0%}'),
)


def describe(row: Row, num_steps: int) -> str:
  """The console's line for a row: `step  12/600  loss 3.2141  9,120 tokens/s  goodput 98%`."""
  parts = [f'step {row["step"]:>{len(str(num_steps))}}/{num_steps}']
  parts += [form.format(row[key]) for key, form in _SHOWN if key in row]
  return '  '.join(parts)


class Console:
  """One line a step, under a progress bar with the time left where stdout is a terminal. Final."""

  def __init__(self, start: int, num_steps: int, rich_console: RichConsole | None = None):
    self._num_steps = num_steps
    self._bar: progress.Progress | None = None
    terminal = rich_console or RichConsole(highlight=False)
    if terminal.is_terminal:
      self._bar = progress.Progress(
          progress.BarColumn(), progress.TaskProgressColumn(), progress.MofNCompleteColumn(),
          progress.TimeElapsedColumn(), progress.TextColumn('left'),
          progress.TimeRemainingColumn(), console=terminal, transient=True)
      self._task = self._bar.add_task('steps', total=num_steps, completed=start)
      self._bar.start()

  def step(self, row: Row, shown: bool) -> None:
    """Moves the bar to the row's step and prints its line if `shown`."""
    if self._bar is not None:
      self._bar.update(self._task, completed=row['step'])
    if shown and self._bar is not None:
      self._bar.console.print(describe(row, self._num_steps), markup=False, highlight=False,
                              soft_wrap=True)
    elif shown:
      print(describe(row, self._num_steps), file=sys.stdout, flush=True)

  def close(self) -> None:
    """Takes the bar down; the lines stay."""
    if self._bar is not None:
      self._bar.stop()


# --- Model FLOP/s -----------------------------------------------------------------------

# Dense bf16 peak of one JAX device, by its device_kind. A v7x chip (2,307 TFLOP/s) shows
# as two devices.
_PEAK = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'TPU7x': 2307e12 / 2,
    'TPU7': 2307e12 / 2,
}


def peak_flops(device_kind: str) -> float | None:
  """bf16 FLOP/s of one device of this kind, None where it is not known."""
  return _PEAK.get(device_kind)


def matmul_parameters(model: cfg.Model) -> int:
  """Weights that every token is multiplied with: the blocks' matrices and the head."""
  heads = model.num_heads + model.num_kv_heads
  block = 2 * model.d_model * heads * model.head_dim + 3 * model.d_model * model.d_ff
  return model.num_layers * block + model.d_model * model.vocab_size


def flops_per_token(model: cfg.Model, context: float, *, backward: bool = True) -> float:
  """Model FLOPs of one token: forward 2·N + 4·L·H·E·C, with the backward pass 3 times that.

  N counts `matmul_parameters`; recomputation and quantisation are not model FLOPs.

  Args:
    model: its shape.
    context: C, mean number of keys a query attends to: (T + 1) / 2 in causal rows of T.
    backward: whether gradients are taken too.
  """
  attention = 4 * model.num_layers * model.num_heads * model.head_dim * context
  return (3 if backward else 1) * (2 * matmul_parameters(model) + attention)


def mfu(flops_per_second: float, devices: list[jax.Device]) -> float | None:
  """Share of the devices' bf16 peak, None where the peak is not known."""
  peak = peak_flops(devices[0].device_kind)
  return None if peak is None else flops_per_second / (peak * len(devices))
