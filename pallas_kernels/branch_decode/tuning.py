"""Block sizes of the branch-decoding kernel."""

from pathlib import Path
from typing import NamedTuple

from pallas_kernels import tuning
from pallas_kernels.dispatch import Generation

FOLDER = Path(__file__).parent
# Branches come in whole tiles of 16-bit sublanes.
BRANCH_TILE = 16
KEY_TILE = 128
_SUFFIX_BYTES = 1 << 20  # of one block of suffix keys in VMEM; four are there at a time
_QUERY_BYTES = 1 << 18  # of the queries in VMEM, beside which float32 state several times as large


class Shape(NamedTuple):
  """What the block sizes depend on; G = H / K query heads to a key/value head."""

  num_queries: int  # G
  head_dim: int  # E
  num_branches: int  # R
  num_prefix: int  # T
  num_slots: int  # S
  dtype: str

  @property
  def key(self) -> str:
    return (f'G{self.num_queries} E{self.head_dim} R{self.num_branches} T{self.num_prefix} '
            f'S{self.num_slots} {self.dtype}')


class Blocks(NamedTuple):
  """How the work is cut.

  branches: whose queries stay in VMEM while the keys pass by; divides R.
  chunk: branches of one prefix matmul, skipped together; divides `branches`.
  keys: prefix keys of a grid step; divides T.
  suffix_branches: branches whose suffix a grid step reads; divides `branches`.
  slots: suffix slots of a grid step; divides S, and 128 divides it or it divides 128.
  """

  branches: int
  chunk: int
  keys: int
  suffix_branches: int
  slots: int


def _divisor(n: int, unit: int, most: int) -> int:
  """The largest multiple of `unit` that divides n and is at most `most`, at least `unit`."""
  return max(d for d in range(unit, max(unit, min(n, most)) + 1, unit) if n % d == 0)


def default(shape: Shape) -> Blocks:
  """Blocks that compile for any shape the kernel takes."""
  row_bytes = shape.head_dim * (4 if shape.dtype == 'float32' else 2)
  rows = min(1024, _QUERY_BYTES // row_bytes)
  branches = _divisor(shape.num_branches, BRANCH_TILE, rows // shape.num_queries)
  chunk = _divisor(branches, BRANCH_TILE, min(512, rows) // shape.num_queries)
  keys = _divisor(shape.num_prefix, KEY_TILE, 512)
  suffix_rows = _SUFFIX_BYTES // row_bytes
  slots = next(n for n in (256, 128, 64, 32, BRANCH_TILE)
               if shape.num_slots % n == 0 and n * BRANCH_TILE <= suffix_rows)
  # As many suffix tiles as key blocks, so that each grid step has some of both.
  steps = shape.num_prefix // keys
  wanted = -(-branches * (shape.num_slots // slots) // steps)
  suffix_branches = _divisor(branches, BRANCH_TILE, min(wanted, suffix_rows // slots))
  return Blocks(branches, chunk, keys, suffix_branches, slots)


def blocks(shape: Shape, generation: Generation) -> Blocks:
  """The tuner's choice for a shape, or the default."""
  choice = tuning.tuned(FOLDER, generation).get(shape.key)
  return Blocks(**choice) if choice else default(shape)
