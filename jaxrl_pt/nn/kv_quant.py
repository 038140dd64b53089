"""Keys and values of 8, 4 and 3 bits: codes with one scale per token and head (`nn.absmax`).

Keys are quantised after RoPE. The token at position 0, the [BOS] of a text that begins with one,
keeps 8 bits where the others have fewer: every later token attends to it.

Source: 2504.18415 section 3 and its table of KV-cache bits: post-RoPE, per head, absmax, unsigned
integers, no calibration, [BOS] at 8 bits. The paper leaves the granularity along time, the zero
point and the levels open: here a token has a scale of its own, and all levels are used.
"""

from collections.abc import Callable

from flax import struct
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.config import KV
from jaxrl_pt.errors import UserError
from jaxrl_pt.nn.absmax import levels, quantise, together, unpack
from jaxrl_pt.types import Array

BITS: dict[KV, int] = {'int8': 8, 'int4': 4, 'int3': 3}


@struct.dataclass
class PackedPages:
  """A pool of pages whose keys and values have 4 or 3 bits."""

  codes: Array  # u8[K, N, 2, page, E · bits / 8] keys, then values
  # i8[K, N, 2, 1, E] the first token of a page, which is read where its position is 0.
  first: Array
  bits: int = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """[K, N, 2, page, E], as of pages that are not packed."""
    return *self.codes.shape[:-1], self.first.shape[-1]


def empty(shape: tuple[int, ...], bits: int) -> PackedPages:
  """A pool of the shape [K, N, 2, page, E].

  Raises:
    UserError: E channels do not fill whole bytes.
  """
  *outer, page_size, width = shape
  least = together(bits)
  if width % least:
    raise UserError(f"kv = 'int{bits}' packs {least} channels of a head together, and "
                    f"Model.head_dim = {width} is no multiple of them: set kv = 'int8'.")
  return PackedPages(jnp.zeros((*outer, page_size, width * bits // 8), jnp.uint8),
                     jnp.zeros((*outer, 1, width), jnp.int8), bits)


def as_stored(x_BSKE: Array, positions_BS: Array, kv: KV) -> Array:
  """The definition of every quantised cache: keys or values as a reader gets them back.

  Args:
    x_BSKE: f[B, S, K, E].
    positions_BS: i32[B, S] positions of the tokens.
    kv: how they are stored; with 'model' they come back as they are.

  Returns:
    f[B, S, K, E] in x's dtype.
  """
  if kv == 'model':
    return x_BSKE

  def back(bits: int) -> Array:
    codes, scale = quantise(x_BSKE, bits)
    return (levels(codes, bits, jnp.float32) * scale[..., None]).astype(x_BSKE.dtype)

  return jnp.where((positions_BS == 0)[..., None, None], back(8), back(BITS[kv]))


def read(pages: Array | PackedPages, scales: Array | None, take: Callable[[Array], Array],
         is_first: Array, dtype: DTypeLike) -> Array:
  """The numbers of some pages, as a reader gets them.

  Args:
    pages: f or i8[K, N, 2, page, E], or packed ones.
    scales: f32[K, N, 2, page] where pages are quantised, else None.
    take: takes the pages in question out of an array [K, N, 2, page, …], giving [..., page, …].
    is_first: bool, to be broadcast to [...]; whether position 0 is the page's first.
    dtype: of the numbers.

  Returns:
    dtype[..., page, E].
  """
  if isinstance(pages, PackedPages):
    numbers = levels(unpack(take(pages.codes), pages.bits), pages.bits, dtype)
    has_8_bits = is_first[..., None, None] & (jnp.arange(numbers.shape[-2]) == 0)[:, None]
    numbers = jnp.where(has_8_bits, take(pages.first).astype(dtype), numbers)
  else:
    numbers = take(pages).astype(dtype)
  return numbers if scales is None else numbers * take(scales)[..., None].astype(dtype)
