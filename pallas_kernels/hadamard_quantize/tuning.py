"""Block sizes of the kernel that rotates and quantises."""

from pathlib import Path
from typing import NamedTuple

from pallas_kernels import tuning
from pallas_kernels.dispatch import Generation

FOLDER = Path(__file__).parent


class Blocks(NamedTuple):
  """rows: of a grid step, a multiple of 32."""

  rows: int


def default(M: int, D: int) -> Blocks:
  """Blocks that compile for any shape the kernel takes."""
  return Blocks(64 if M > 32 and D <= 8192 else 32)


def key(M: int, D: int, activations: str) -> str:
  return f'{"many" if M > 32 else "few"} {D} {activations}'


def blocks(M: int, D: int, activations: str, generation: Generation) -> Blocks:
  """The tuner's choice for a width, or the default."""
  choice = tuning.tuned(FOLDER, generation).get(key(M, D, activations))
  return Blocks(**choice) if choice else default(M, D)
