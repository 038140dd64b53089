"""Metrics: one JSON row a step, lines on the console, TensorBoard, and model FLOP/s.

All keys of a row in `metrics.jsonl` but those under `time/` are functions of the run's settings and
the step, so two runs can be compared row by row. JSON has no NaN: non-finite numbers are written as
"NaN", "Infinity" and "-Infinity" and read back as floats.
"""

from collections.abc import Callable, Mapping
import json
import math
import os
from pathlib import Path
import sys
from typing import Self

import jax
import numpy as np
from rich import progress
from rich.console import Console as RichConsole

from jaxrl_pt import config as cfg
from jaxrl_pt import files
from jaxrl_pt.errors import Unwritable, UserError
from jaxrl_pt.events import EventFile
from jaxrl_pt.types import Weighted

FILE = 'metrics.jsonl'
TIME = 'time/'  # what the keys of times and speeds begin with

Row = dict[str, float]


def host_values(values: Mapping[str, Weighted]) -> dict[str, float]:
  """{name: sum / count} on the host, fetched in one transfer; 0 if nothing was counted."""
  fetched = jax.device_get({name: (v.sum, v.count) for name, v in values.items()})
  return {name: float(total) / max(float(count), 1e-9) for name, (total, count) in fetched.items()}


def deterministic(row: Row) -> Row:
  """The row without its `time/` keys: what a resumed run must repeat exactly."""
  return {key: value for key, value in row.items() if not key.startswith(TIME)}


def interval(statistic: Callable[..., np.ndarray], columns: tuple[np.ndarray, ...], resamples: int,
             seed: int) -> tuple[float, float]:
  """The bootstrap's 95 % interval of a statistic: percentiles over resamples of rows.

  Args:
    statistic: f[R, P, ...] columns → f[R]; what is NaN is left out.
    columns: f[P, ...] values of each of P prompts, games or whatever else is resampled.
    resamples: R.
    seed: equal seeds draw equal resamples.

  Returns:
    (2.5 %, 97.5 %), NaN where the statistic is.
  """
  rng, found = np.random.default_rng(seed), []
  num = len(columns[0])
  # A block at a time: many rows in many resamples are more than fits.
  for start in range(0, resamples, 100):
    rows = rng.integers(num, size=(min(100, resamples - start), num))
    found.append(statistic(*(column[rows] for column in columns)))
  values = np.concatenate(found)
  values = values[~np.isnan(values)]
  if not len(values):
    return float('nan'), float('nan')
  low, high = np.percentile(values, (2.5, 97.5))
  return float(low), float(high)


# --- Rows -----------------------------------------------------------------------------


def _dump(row: Mapping[str, float]) -> str:
  names = {'nan': 'NaN', 'inf': 'Infinity', '-inf': '-Infinity'}
  plain = {k: v if math.isfinite(v) else names[str(v)] for k, v in row.items()}
  return json.dumps(plain, allow_nan=False) + '\n'


def _parse(line: str) -> Row:
  row = json.loads(line)
  if not isinstance(row, dict) or type(row.get('step')) is not int:
    raise ValueError('no object with a whole number as "step"')
  for key, value in row.items():
    if type(value) not in (int, float) and value not in ('NaN', 'Infinity', '-Infinity'):
      raise ValueError(f'{key!r} is no number')
  return {key: value if isinstance(value, int) else float(value) for key, value in row.items()}


def read_rows(path: Path) -> list[Row]:
  """The rows of a metrics file; a last line without a newline, which a kill tore, is left out.

  Raises:
    UserError: the file cannot be read, or a line is not a row.
  """
  try:
    lines = path.read_bytes().split(b'\n')
  except OSError as error:
    raise UserError(f'cannot read {path} ({error.strerror}): give the work directory of a '
                    'run.') from error
  rows = []
  for number, line in enumerate(lines[:-1], 1):  # The last line is torn or empty.
    try:
      rows.append(_parse(line.decode()))
    except (ValueError, RecursionError, OverflowError) as error:
      raise UserError(f'line {number} of {path} is not a row of metrics ({error}): remove it or '
                      'use another work directory.') from error
  return rows


def _whole(path: Path, rows: list[Row], resume_step: int, incomplete: bool) -> list[Row]:
  """The rows of the steps up to `resume_step`, once each and in order.

  Args:
    path: the metrics file, for messages.
    rows: the file's rows.
    resume_step: the last step whose row is kept.
    incomplete: whether rows may be missing or repeated.

  Raises:
    UserError: rows are missing, repeated or out of order, and `incomplete` is False.
  """
  kept = [row for row in rows if row['step'] <= resume_step]
  steps = [int(row['step']) for row in kept]
  # Row 0 is the evaluation before the first step, which pretraining does not make.
  expected = list(range(0 if 0 in steps else 1, resume_step + 1))
  if steps == expected:
    return kept
  if incomplete:
    return list({row['step']: row for row in sorted(kept, key=lambda r: r['step'])}.values())
  wrong = next(i for i in range(len(steps) + 1)
               if i == len(steps) or steps[i:i + 1] != expected[i:i + 1])
  found = f'step {steps[wrong]}' if wrong < len(steps) else 'the end of the file'
  wanted = f'step {expected[wrong]}' if wrong < len(expected) else 'the end of the file'
  raise UserError(
      f'{path} does not hold the rows of steps 1 to {resume_step} once each and in order (row '
      f'{wrong + 1} should be {wanted}, but is {found}): put the missing rows back, or add '
      f'--allow_changes {FILE} to go on with those that are there.')


class Writer:
  """Writes each step's row to `metrics.jsonl`, TensorBoard and the console. Final.

  Only process 0 writes. Leaving it as a context manager closes the files.
  """

  def __init__(self, workdir: Path, *, resume_step: int, num_steps: int, tensorboard: bool,
               log_every: int = 1, incomplete: bool = False):
    """Opens the file and drops the rows that a killed run wrote after `resume_step`.

    Args:
      workdir: receives metrics.jsonl and, if asked for, tensorboard/.
      resume_step: the step of the checkpoint resumed from. 0 drops all rows but that of step 0, and
        −1 drops that too.
      num_steps: the last step of the run, for the progress bar.
      tensorboard: whether to write TensorBoard events too.
      log_every: steps per console line; every step has its row in any case.
      incomplete: whether rows of steps up to `resume_step` may be missing or repeated.

    Raises:
      UserError: the file is not a metrics file, or does not hold the row of each step up to
        `resume_step` once.
      Unwritable: the file cannot be written.
    """
    self._path = workdir / FILE
    self._file: int | None = None  # a descriptor, since closing a file without buffer cannot fail
    self._events: EventFile | None = None
    self._console: Console | None = None
    self._log_every, self._num_steps = log_every, num_steps
    if jax.process_index() != 0:
      return
    rows = read_rows(self._path) if self._path.exists() else []
    rows = _whole(self._path, rows, resume_step, incomplete)
    # The file is replaced by one rename, so that a kill here loses nothing.
    files.write_text(self._path, ''.join(map(_dump, rows)))
    with files.writing(self._path):
      self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
      self._directory = os.stat(workdir)
    self._console = Console(resume_step, num_steps)
    if tensorboard:
      self._events = EventFile(workdir / 'tensorboard', purge_step=resume_step + 1)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
    """Writes the row of a step.

    Args:
      step: the step's number, from 1; 0 is the evaluation before the first step.
      values: metrics that depend on nothing but the settings and the step.
      timing: times and speeds, whose keys get `TIME` in front.

    Raises:
      Unwritable: the row cannot be written (disk full), or the file is no longer in its place.
    """
    if self._file is None:
      return
    row: Row = {'step': step, **values, **{TIME + key: v for key, v in timing.items()}}
    with files.writing(self._path):
      files.write_all(self._file, _dump(row).encode())
    self._check_place()
    if self._events is not None:
      self._events.write(step, {key: value for key, value in row.items() if key != 'step'})
    if self._console is not None:
      self._console.step(row, shown=step % self._log_every == 0 or step == self._num_steps)

  def sync(self) -> None:
    """Blocks until all rows are on disk, as they must be before a checkpoint is saved.

    Raises:
      Unwritable: the disk does not take the rows.
    """
    if self._file is not None:
      with files.writing(self._path):
        os.fsync(self._file)

  def _check_place(self) -> None:
    """Checks that the open file is still the one under its name.

    If the name is gone but the work directory is not, the rows are put back from the open
    descriptor.

    Raises:
      Unwritable: the file or its directory was deleted, renamed or replaced.
    """
    assert self._file is not None
    open_file = os.fstat(self._file)
    try:
      named_file = os.stat(self._path)
    except OSError as error:
      # The save of a checkpoint may have made the deleted directory again.
      parent = self._path.parent
      if not parent.is_dir() or not os.path.samestat(os.stat(parent), self._directory):
        raise Unwritable(f'cannot write {self._path} (the work directory {parent} was deleted '
                         'or renamed)') from error
      files.write_text(self._path, os.pread(self._file, open_file.st_size, 0).decode())
      raise Unwritable(f'cannot go on writing {self._path} (it was deleted or renamed while the '
                       'run was writing it; its rows have been put back)') from error
    # Some network file systems give a file a new number, so it must have another size too.
    if (not os.path.samestat(open_file, named_file)
        and open_file.st_size != named_file.st_size):
      raise Unwritable(f'cannot go on writing {self._path} (another file has taken its place)')

  def close(self) -> None:
    """Closes the files and takes the progress bar down."""
    if self._console is not None:
      self._console.close()
    if self._events is not None:
      self._events.close()
    if self._file is not None:
      os.close(self._file)
    self._file = self._events = self._console = None


# --- Console --------------------------------------------------------------------------

# Keys of a row with the formats in which the console shows them, in this order.
_SHOWN = (
    ('loss', 'loss {:.4f}'),
    ('reward', 'reward {:.3f}'),
    ('accuracy', 'accuracy {:.3f}'),
    ('mismatch', 'mismatch {:.4f}'),
    ('staleness', 'staleness {:.4f}'),
    ('kl', 'KL {:.4f}'),
    ('validation/loss', 'validation {:.4f}'),
    ('validation/bits_per_byte', '{:.3f} bits/byte'),
    ('validation/margin', 'held-out margin {:.3f}'),
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
  """Prints lines for rows, above a progress bar if stdout is a terminal. Final."""

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
      with files.writing('standard output'):
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
  """The peak bf16 FLOP/s of one device of a kind, None if it is not known."""
  return _PEAK.get(device_kind)


def matmul_parameters(model: cfg.Model) -> int:
  """The number of weights that multiply every token: the blocks' matrices and the head."""
  heads = model.num_heads + model.num_kv_heads
  block = 2 * model.d_model * heads * model.head_dim + 3 * model.d_model * model.d_ff
  return model.num_layers * block + model.d_model * model.vocab_size


def flops_per_token(model: cfg.Model, context: float, *, backward: bool = True) -> float:
  """Model FLOPs of one token: forward 2·N + 4·L·H·E·C, with the backward pass 3 times that.

  N is `matmul_parameters`. The frozen weights of an adapted model have no gradient, whose 2·N are
  then left out. Recomputation, quantisation and adapters themselves are not counted.

  Args:
    model: the model's sizes.
    context: C, the mean number of keys that a query attends to: (T + 1) / 2 in causal rows of T.
    backward: whether to count the backward pass too.
  """
  attention = 4 * model.num_layers * model.num_heads * model.head_dim * context
  products = 2 * matmul_parameters(model)
  if not backward:
    return products + attention
  return (3 if model.adapter == cfg.NoAdapter() else 2) * products + 3 * attention


def mfu(flops_per_second: float, devices: list[jax.Device]) -> float | None:
  """Model FLOP/s utilisation: the share of the devices' bf16 peak, None if that is not known."""
  peak = peak_flops(devices[0].device_kind)
  return None if peak is None else flops_per_second / (peak * len(devices))
