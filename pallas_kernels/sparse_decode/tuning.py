"""Block sizes of the sparse decoding kernels, by page size."""

from pathlib import Path
from typing import NamedTuple

from pallas_kernels.dispatch import Generation
from pallas_kernels.tuning import tuned


class Blocks(NamedTuple):
  """scored_blocks: descriptors that one grid step of the scores reads.
  attended_keys: keys that one step of the attention fetches and computes on."""

  scored_blocks: int = 4096
  attended_keys: int = 2048


DEFAULT = Blocks()


def key(page_size: int) -> str:
  return f'page {page_size}'


def blocks(generation: Generation, page_size: int) -> Blocks:
  """The tuned choice, or the default."""
  return Blocks(**tuned(Path(__file__).parent, generation).get(key(page_size), {}))
