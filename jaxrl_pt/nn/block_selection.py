"""Which blocks a sparse step reads: those of the n highest scores, as a list and as bits."""

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array
from pallas_kernels.sparse_decode import Selection

WORD = 32  # bits


def select(scores_BKP: Array, blocks_B: Array, selection: Selection) -> tuple[Array, Array]:
  """The n highest-scored of each row's M blocks in ascending order; the first of equal scores win.

  The result is that of `pallas_kernels.sparse_decode.select_blocks`, but nothing is sorted: the
  n-th highest score is found by bisection on the bits of the scores, which counts a row 32 times.

  Args:
    scores_BKP: f32[B, K, P], without NaN in a row's blocks.
    blocks_B: i32[B] M, the number of blocks of each row.
    selection: the rule that gives n and the last blocks that are always selected.

  Returns:
    blocks i32[B, K, N], which are P from a row's count on, and the counts n, i32[B].
  """
  capacity = scores_BKP.shape[-1]
  counts_B = selection.num_selected(blocks_B).astype(jnp.int32)
  num_listed = selection.num_selected(capacity)
  index, blocks = jnp.arange(capacity), blocks_B[:, None, None]
  lowest, highest = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
  # Integers with the order of the scores. Adding 0 turns −0 into the 0 that it equals.
  bits = jax.lax.bitcast_convert_type(scores_BKP.astype(jnp.float32) + 0.0, jnp.int32)
  order = jnp.where(bits < 0, bits ^ highest, bits)
  order = jnp.where(index >= blocks - selection.local_blocks, highest, order)
  order = jnp.where(index >= blocks, lowest, order)
  threshold = _nth_highest(order, counts_B[:, None])[..., None]
  above, equal = order > threshold, (order == threshold) & (index < blocks)
  still_free = counts_B[:, None, None] - above.sum(-1, keepdims=True)
  chosen = above | (equal & (_running_count(equal) <= still_free))
  place = jnp.where(chosen, _running_count(chosen) - 1, num_listed)
  listed = jnp.full((*scores_BKP.shape[:2], num_listed), capacity, jnp.int32)
  put = lambda row, at: row.at[at].set(index.astype(jnp.int32), mode='drop')
  return jax.vmap(jax.vmap(put))(listed, place), counts_B


def _nth_highest(order_BKP: Array, counts_B1: Array) -> Array:
  """i32[B, K]: the largest t that at least `count` entries of a row reach."""
  def halve(bit: Array, threshold: Array) -> Array:
    # The threshold rises from the lowest integer; adding the highest bit wraps round to 0.
    higher = threshold + jnp.left_shift(1, 31 - bit)
    enough = (order_BKP >= higher[..., None]).sum(-1) >= counts_B1
    return jnp.where(enough, higher, threshold)

  return jax.lax.fori_loop(0, 32, halve,
                           jnp.full(order_BKP.shape[:2], jnp.iinfo(jnp.int32).min))


def _running_count(mask_BKP: Array, width: int = 128) -> Array:
  """The inclusive running sum of booleans, as two products with triangles; exact below 2²⁴."""
  capacity = mask_BKP.shape[-1]
  padded = jnp.pad(mask_BKP, ((0, 0), (0, 0), (0, -capacity % width))).astype(jnp.float32)
  parts = padded.reshape(*mask_BKP.shape[:2], -1, width)
  inside = parts @ jnp.triu(jnp.ones((width, width)))
  totals = inside[..., -1]
  before = totals @ jnp.triu(jnp.ones((totals.shape[-1], totals.shape[-1])), 1)
  return (inside + before[..., None]).reshape(padded.shape)[..., :capacity].astype(jnp.int32)


# --- The choice as bits -----------------------------------------------------------


def num_words(num_blocks: int) -> int:
  """Words of 32 bits that hold one bit for each block."""
  return -(-num_blocks // WORD)


def packed(blocks: Array, num_blocks: int) -> Array:
  """u32[..., W]: bit b % 32 of word b // 32 says whether b is among the listed blocks.

  A bit for each block takes M / 8 bytes, a list of 16-bit numbers 2 M p: fewer where p < 1 / 16.

  Args:
    blocks: i32[..., N] distinct; numbers from `num_blocks` on stand for no block.
    num_blocks: M.
  """
  words = num_words(num_blocks)
  word = jnp.where(blocks < num_blocks, blocks // WORD, words)
  bit = jnp.left_shift(jnp.uint32(1), (blocks % WORD).astype(jnp.uint32))
  put = lambda word, bit: jnp.zeros(words, jnp.uint32).at[word].add(bit, mode='drop')
  flat = jax.vmap(put)(word.reshape(-1, word.shape[-1]), bit.reshape(-1, bit.shape[-1]))
  return flat.reshape(*blocks.shape[:-1], words)


def unpacked(bits: Array) -> Array:
  """bool[..., 32 W]: whether each block is among those of `packed`."""
  shifted = jnp.right_shift(bits[..., None], jnp.arange(WORD, dtype=jnp.uint32))
  return (shifted & 1).astype(bool).reshape(*bits.shape[:-1], -1)
