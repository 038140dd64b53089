"""Block sizes of the kernel that rotates and quantises."""

from pathlib import Path
from typing import NamedTuple

from pallas_kernels import tuning
from pallas_kernels.dispatch import Generation

FOLDER = Path(__file__).parent


class Target(NamedTuple):
  """What the kernel must know of a chip.

  mxu: rows and columns of an MXU.
  cores: that one program is split over.
  """

  mxu: int
  cores: int


class Blocks(NamedTuple):
  """How the work is cut.

  rows: of a group, a multiple of 32; a grid step takes two groups where there are more rows.
  tiles: of 128 lanes (256 on wide MXUs) that meet H_b in one product.
  """

  rows: int
  tiles: int


def target(generation: Generation) -> Target:
  return Target(mxu=256 if generation in ('v6e', 'tpu7x') else 128,
                cores=2 if generation in ('v4', 'v5p') else 1)


def default(M: int, D: int, generation: Generation) -> Blocks:
  """Blocks that compile for any shape the kernel takes."""
  return Blocks(64 if M > 32 and D <= 8192 and generation != 'v4' else 32, 3)


def key(M: int, D: int, activations: str) -> str:
  return f'{"many" if M > 32 else "few"} {D} {activations}'


def blocks(M: int, D: int, activations: str, generation: Generation) -> Blocks:
  """The tuner's choice for a width, or the default."""
  choice = tuning.tuned(FOLDER, generation).get(key(M, D, activations))
  return Blocks(**choice) if choice else default(M, D, generation)
