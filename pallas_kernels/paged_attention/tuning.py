"""Block sizes of paged attention."""

from typing import Any, NamedTuple


class Shape(NamedTuple):
  """What a call's blocks depend on.

  beside: whether keys lie beside values, in pages [K, N, page, 2E].
  """

  num_new: int
  num_groups: int
  group: int
  head_dim: int
  page_size: int
  pages: str
  beside: bool


class Blocks(NamedTuple):
  """keys: keys of a step. queries: new tokens of an item. heads: key/value heads of an item."""

  keys: int
  queries: int
  heads: int


def shape_of(q_BSHE: Any, pages: Any) -> Shape:
  _, num_new, num_heads, head_dim = q_BSHE.shape
  beside = len(pages.shape) == 4
  return Shape(num_new, pages.shape[0], num_heads // pages.shape[0], head_dim, pages.shape[-2],
               str(pages.dtype), beside)
