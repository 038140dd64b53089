"""Block sizes of the ternary product."""

from pathlib import Path
from typing import NamedTuple

from pallas_kernels import tuning
from pallas_kernels.dispatch import Generation

FOLDER = Path(__file__).parent
LANES = 128
_BUCKETS = (32, 64, 128, 512, 2048)
# What a kernel may take of VMEM; chips have 16, 128, 64, 128 and 64 MiB.
VMEM_BYTES: dict[Generation, int] = {
    'v4': 12 << 20, 'v5e': 96 << 20, 'v5p': 48 << 20, 'v6e': 96 << 20, 'tpu7x': 48 << 20}


class Blocks(NamedTuple):
  """rows, columns: of the output in a grid step, the whole contraction with them.

  rows: all M, or a multiple of 128 (of 64 where M is at most 128).
  columns: a multiple of 128.
  chunk: rows whose sums are finished before the next rows'; a multiple of 128 where M is more.
  """

  rows: int
  columns: int
  chunk: int


def vmem_bytes(blocks: Blocks, K: int) -> int:
  """An upper estimate: operands twice, converted weights, and what is finished."""
  rows, columns, chunk = blocks
  rows = -(-rows // 64) * 64
  operands = rows * K + columns * K // 4 + rows * columns * 4
  return 2 * operands + 2 * columns * K + 4 * chunk * columns


def default(M: int, K: int, N: int, generation: Generation) -> Blocks:
  """Blocks that compile for any shape the kernel takes.

  Raises:
    NotImplementedError: not even the smallest block fits.
  """
  columns = min(256, -(-N // LANES) * LANES)
  for rows in (2048, 1024, 512, 256, 128):
    blocks = Blocks(min(rows, M), columns, min(256, M))
    if (rows < 2 * M or rows == 128) and vmem_bytes(blocks, K) <= VMEM_BYTES[generation]:
      return blocks
  raise NotImplementedError(f'a contraction over {K} does not fit into VMEM')


def key(M: int, K: int, N: int, activations: str) -> str:
  rows = next((bucket for bucket in _BUCKETS if M <= bucket), _BUCKETS[-1])
  return f'{rows} rows {K}->{N} {activations}'


def blocks(M: int, K: int, N: int, activations: str, generation: Generation) -> Blocks:
  """The tuner's choice for a shape, or the default."""
  choice = tuning.tuned(FOLDER, generation).get(key(M, K, N, activations))
  if choice is None:
    return default(M, K, N, generation)
  chosen = Blocks(**choice)
  return chosen._replace(rows=min(chosen.rows, M), chunk=min(chosen.chunk, M))
