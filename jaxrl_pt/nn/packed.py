"""Weights as a sampler holds them on a CPU, and tables of 8 and 4 bits.

`quant.TernaryWeight` has codes of the type int2, which XLA keeps in two bits on a TPU. On a CPU it
keeps each of them in a byte and multiplies by them slowly, so that there a weight is an array of
bytes, four codes in each, and the products below read these.
"""

from collections.abc import Callable

from flax import struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.config import Table
from jaxrl_pt.errors import UserError
from jaxrl_pt.nn import absmax
from jaxrl_pt.types import Array

# What is taken at a time: bytes of a weight for one row of activations and for several, and numbers
# of a table. What is made of them fits the second cache of a CPU, or does not exceed it by much.
_BYTES_OF_ONE, _BYTES_OF_SOME, _TILE_NUMBERS = 2**19, 2**17, 2**20
# The most rows of activations whose products are integers; XLA's float products of more are faster.
_MOST_ROWS = 32


@struct.dataclass
class TernaryBytes:
  """A packed weight in the place of a latent matrix, for sampling on a CPU.

    bytes[o, r] = Σ_i (codes[r + i R, o] + 1) · 4^i,   i = 0 … 3, R = ⌈I / 4⌉

  What lies beyond the end is code −1, 0 bits.
  """

  bytes: Array  # u8[..., O, ⌈I / 4⌉]
  scale: Array  # f32[..., 1, 1]


def to_bytes(codes: Array, scale: Array) -> TernaryBytes:
  """Packs codes [..., I, O] in {−1, 0, 1} of any type."""
  missing = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-2] % 4)]
  # A code of 2, which is 1 + 1, does not fit int2.
  bits = jnp.pad((jnp.swapaxes(codes, -1, -2).astype(jnp.int8) + 1).astype(jnp.uint8), missing)
  planes = jnp.split(bits, 4, -1)
  return TernaryBytes(planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6, scale)


def to_codes(bytes_: Array, num_in: int) -> Array:
  """The inverse: i8[..., I, O]."""
  return jnp.swapaxes(_unsigned(bytes_)[..., :num_in], -1, -2) - 1


def _unsigned(bytes_: Array) -> Array:
  """i8[..., O, 4R]: codes plus 1."""
  return jnp.concatenate([(bytes_ >> 2 * i & 3).astype(jnp.int8) for i in range(4)], -1)


def product(x_codes: Array, x_scale: Array, w: TernaryBytes, is_integer: bool,
            dtype: DTypeLike) -> Array:
  """Y = (codes_x · codes_w) · scale_x · scale_w, the numbers of `nn.ops.product`.

  Sums of integers are exact in any order; of one row they are Σ x (u − 1) = Σ x u − Σ x over the
  bytes as they lie.

  Args:
    x_codes: [..., I] in any type.
    x_scale: f32[..., 1].
    w: the weight, which is not stacked.
    is_integer: whether x_codes are integers of at most 8 bits.
    dtype: type of the result.

  Returns:
    dtype[..., O].
  """
  num_in, num_out = x_codes.shape[-1], w.bytes.shape[0]
  x_MI = x_codes.reshape(-1, num_in)
  if not is_integer or len(x_MI) > _MOST_ROWS:
    sums = jnp.matmul(x_MI.astype(dtype), to_codes(w.bytes, num_in).astype(dtype),
                      preferred_element_type=jnp.float32)
  else:
    x_MI = jnp.pad(x_MI.astype(jnp.int8), ((0, 0), (0, 4 * w.bytes.shape[1] - num_in)))
    sums = (_one_row if len(x_MI) == 1 else _some_rows)(x_MI, w.bytes)
    sums -= x_MI.sum(-1, keepdims=True, dtype=jnp.int32)
  y = sums.astype(jnp.float32) * (x_scale.reshape(-1, 1) * w.scale)
  return y.astype(dtype).reshape(*x_codes.shape[:-1], num_out)


def _one_row(x_1I: Array, bytes_OR: Array) -> Array:
  """i32[1, O] Σ x u: sums over rows of bytes as they lie, for which no code is written out."""
  x_4R = x_1I.astype(jnp.int32).reshape(4, -1)

  def of_tile(bytes_TR: Array) -> Array:
    parts = (x_4R[i] * (bytes_TR >> 2 * i & 3).astype(jnp.int32) for i in range(4))
    return sum(parts, jnp.zeros((), jnp.int32)).sum(-1)[None]

  return _over_tiles(of_tile, bytes_OR, _BYTES_OF_ONE)


def _some_rows(x_MI: Array, bytes_OR: Array) -> Array:
  """i32[M, O] Σ x u; the codes of some outputs are written out at a time."""
  def of_tile(bytes_TR: Array) -> Array:
    return jax.lax.dot_general(x_MI, _unsigned(bytes_TR), (((1,), (1,)), ((), ())),
                               preferred_element_type=jnp.int32)

  return _over_tiles(of_tile, bytes_OR, _BYTES_OF_SOME)


def _over_tiles(of_tile: Callable[[Array], Array], rows: Array, tile_numbers: int) -> Array:
  """[M, O] of a function from some rows [T, R] to [M, T], of about so many numbers at a time.

  It is a loop, so that XLA computes what the tiles share once, and holds what it makes of one tile.
  """
  most = min(len(rows), max(1, tile_numbers // rows.shape[1]))
  dividing = [size for size in range(most, most // 4, -1) if len(rows) % size == 0]
  size = dividing[0] if dividing else most
  num_whole = len(rows) // size * size
  out_NMT = jax.lax.map(of_tile, rows[:num_whole].reshape(-1, size, rows.shape[1]))
  out = out_NMT.swapaxes(0, 1).reshape(out_NMT.shape[1], -1)
  if num_whole == len(rows):
    return out
  return jnp.concatenate([out, of_tile(rows[num_whole:])], -1)


@jax.custom_vjp
def without_gradient(x: Array, y: Array) -> Array:
  """y, a product with x; asking for the gradient of x raises NotImplementedError."""
  del x
  return y


def _backward(_: None, dy: Array) -> tuple[Array, Array]:
  raise NotImplementedError('a weight in bytes passes no gradient: use TernaryWeight')


without_gradient.defvjp(lambda x, y: (y, None), _backward)


# --- Embedding and head -----------------------------------------------------------------


TABLE_BITS: dict[Table, int] = {'int8': 8, 'int4': 4}


@struct.dataclass
class QuantizedTable:
  """An embedding or a head of 8 or 4 bits; each entry of the vocabulary has a scale, its absmax."""

  codes: Array  # i8[V, D], or u8[V, D / 2] of 4 bits
  scale: Array  # f32[V]
  bits: int = struct.field(pytree_node=False)


def to_table(table_VD: Array, bits: int) -> QuantizedTable:
  """Quantises each row.

  Raises:
    UserError: 4 bits of an odd number of channels, which do not fill whole bytes.
  """
  if bits == 4 and table_VD.shape[-1] % 2:
    raise UserError("head = 'int4' packs two channels into a byte, and Model.d_model = "
                    f"{table_VD.shape[-1]} is odd: choose head = 'int8'.")
  codes, scale = absmax.quantise(table_VD, bits)
  return QuantizedTable(codes if bits == 8 else absmax.pack(codes, bits), scale, bits)


def _numbers(codes: Array, bits: int, dtype: DTypeLike) -> Array:
  return absmax.levels(codes if bits == 8 else absmax.unpack(codes, bits), bits, dtype)


def lookup(table: QuantizedTable, tokens: Array, dtype: DTypeLike) -> Array:
  """dtype[..., D]: the rows of tokens i32[...]."""
  numbers = _numbers(table.codes[tokens], table.bits, jnp.float32)
  return (numbers * table.scale[tokens][..., None]).astype(dtype)


def dequantised(table: QuantizedTable, dtype: DTypeLike) -> Array:
  """dtype[V, D]: the numbers that all rows stand for."""
  return lookup(table, jnp.arange(len(table.scale)), dtype)


def logits(hidden: Array, table: QuantizedTable) -> Array:
  """f32[..., V]: hidden states f[..., D] times the table, whose scales multiply the sums."""
  hidden_MD = hidden.reshape(-1, hidden.shape[-1])

  def of_rows(numbers: Array) -> Array:
    return jax.lax.dot_general(hidden_MD, numbers, (((1,), (1,)), ((), ())),
                               preferred_element_type=jnp.float32)

  def whole(codes: Array) -> Array:
    return of_rows(_numbers(codes, table.bits, hidden.dtype))

  def in_tiles(codes: Array) -> Array:
    def of_tile(tile: Array) -> Array:
      # The barrier keeps the conversion out of the product, which XLA would then compute slowly.
      return of_rows(jax.lax.optimization_barrier(_numbers(tile, table.bits, hidden.dtype)))

    return _over_tiles(of_tile, codes, _TILE_NUMBERS)

  # XLA for CPUs would write all numbers of a large table out.
  sums = jax.lax.platform_dependent(table.codes, cpu=in_tiles, default=whole)
  return (sums * table.scale).reshape(*hidden.shape[:-1], -1)
