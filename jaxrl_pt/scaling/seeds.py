"""Results over seeds: rows that an interrupted experiment keeps, and intervals of their means."""

from collections.abc import Sequence
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats


def finished_rows(path: Path) -> list[dict[str, Any]]:
  """The rows that `append_row` has written whole, in their order; none where there is no file.

  A row that a kill tore is left out, so that whoever reads the rows makes it again.
  """
  rows = []
  for line in path.read_text(encoding='utf-8').splitlines() if path.is_file() else ():
    try:
      rows.append(json.loads(line))
    except ValueError:
      continue
  return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
  """Appends a row by one write that is on disk when this returns.

  The row gets a line of its own even if a kill has torn the line before it.
  """
  with open(path, 'ab', buffering=0) as file:
    file.write(b'\n' + json.dumps(row).encode() + b'\n')
    os.fsync(file.fileno())


def interval(values: Sequence[float] | np.ndarray, digits: int = 4) -> dict[str, float | None]:
  """Mean over seeds, and half the width of its 95 % interval.

    half width = t(0.975, K − 1) · s / √K

  Args:
    values: f[K], one for each seed; the difference of two arms with the same seeds gives a paired
      interval. One value has no interval: with K = 1 the half width is None, which JSON writes
      as null.
    digits: decimal places of both results.

  Returns:
    'mean' and 'half_width_95'.
  """
  values = np.asarray(values, float)
  mean, half = round(float(values.mean()), digits), None
  if len(values) > 1:
    spread = values.std(ddof=1) / np.sqrt(len(values))
    half = round(float(stats.t.ppf(0.975, len(values) - 1) * spread), digits)
  return {'mean': mean, 'half_width_95': half}


def shown(found: dict[str, float | None], decimals: int = 3) -> str:
  """An `interval` as text: `0.970 ± 0.041`, or the mean alone where there is one seed."""
  half = found['half_width_95']
  return f'{found["mean"]:.{decimals}f}' + ('' if half is None else f' ± {half:.{decimals}f}')
