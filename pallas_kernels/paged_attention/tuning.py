"""Block sizes of paged attention."""

from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels import tuning
from pallas_kernels.dispatch import Generation

FOLDER = Path(__file__).parent
_STEP_BYTES = 2 << 20  # of the pages of one step; two are there at a time
_ROWS = 256  # queries times heads of an item, beside which scores of every key of a step lie
_HEADS = 8  # key/value heads of an item: the kernel is written out for each of them
_SUBLANES = 8


class Shape(NamedTuple):
  """What a call's blocks depend on.

  num_new: S. num_groups: K. group: H / K. head_dim: E. pages: their dtype.
  beside: whether keys lie beside values, in pages [K, N, page, 2E].
  """

  num_new: int
  num_groups: int
  group: int
  head_dim: int
  page_size: int
  pages: str
  beside: bool

  @property
  def key(self) -> str:
    return (f'S{self.num_new} {self.num_groups * self.group}:{self.num_groups}x{self.head_dim} '
            f'page {self.page_size} {self.pages}{" beside" if self.beside else ""}')


class Blocks(NamedTuple):
  """How the work is cut.

  keys: keys of a step, the pages of which are copied together.
  queries: new tokens of an item.
  heads: key/value heads of an item; divides K.
  """

  keys: int
  queries: int
  heads: int


def shape_of(q_BSHE: Any, pages: Any) -> Shape:
  _, num_new, num_heads, head_dim = q_BSHE.shape
  return Shape(num_new, pages.shape[0], num_heads // pages.shape[0], head_dim, pages.shape[-2],
               str(pages.dtype), pages.ndim == 4)


def default(shape: Shape) -> Blocks:
  """Blocks that compile for any shape the kernel takes."""
  pieces = -(-shape.num_new * shape.group // max(_ROWS, shape.group))
  queries = -(-shape.num_new // pieces)
  rows = -(-queries * shape.group // _SUBLANES) * _SUBLANES
  heads = max(n for n in range(1, _HEADS + 1)
              if shape.num_groups % n == 0 and (n == 1 or n * rows <= _ROWS))
  token_bytes = heads * 2 * shape.head_dim * {'int8': 1, 'bfloat16': 2}.get(shape.pages, 4)
  keys = 1 << (max(1, _STEP_BYTES // token_bytes).bit_length() - 1)
  most = 2048 if heads * rows <= 64 else 1024
  return Blocks(max(128, min(most, keys)), queries, heads)


def blocks(shape: Shape, generation: Generation) -> Blocks:
  """The tuner's choice for a shape, or the default."""
  choice = tuning.tuned(FOLDER, generation).get(shape.key)
  return Blocks(**choice) if choice else default(shape)
