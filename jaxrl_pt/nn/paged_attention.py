"""Attention over pages: the keys and values of a sequence lie in fixed-size pages of one pool."""

import math

import jax
import jax.numpy as jnp

from jaxrl_pt.nn.attention import MASKED
from jaxrl_pt.types import Array

# Tokens that one turn of the loop reads. Fewer make the loop's own cost show, and with more a short
# sequence pays for reading what lies beyond its end. A table for long sequences is read in no more
# than so many turns.
BLOCK, MOST_TURNS = 64, 256


def pages_per_turn(table_len: int, page_size: int) -> int:
  """Pages of each row that one turn of the loop reads."""
  return min(max(1, BLOCK // page_size, -(-table_len // MOST_TURNS)), table_len)


def paged_attention(q_BSHE: Array, pages: Array, scales: Array | None, table_BP: Array,
                    starts_B: Array, counts_B: Array) -> Array:
  """Attention of S new tokens of each row to the tokens of its pages.

    out_s = softmax(q_s K[:t]ᵀ / √E) V[:t],   t = start + s + 1

  The pages of a block are read in a loop with a running softmax, up to the end of the longest row,
  so that neither memory nor time depends on the longest sequence that would fit.

  Args:
    q_BSHE: f[B, S, H, E] queries, after RoPE; H is a multiple of K.
    pages: f or i8[K, N, 2, page, E] keys, then values; those of the new tokens included.
    scales: f32[K, N, 2, page] where pages are int8, else None.
    table_BP: i32[B, P] the pages of each row, as indices into the pool.
    starts_B: i32[B] position of each row's first new token.
    counts_B: i32[B] how many of its S tokens a row has; the results of the others mean nothing.

  Returns:
    f[B, S, H, E] in q's dtype; the softmax is float32.
  """
  num_rows, num_new, num_heads, width = q_BSHE.shape
  num_groups, _, _, page_size, _ = pages.shape
  at_once = pages_per_turn(table_BP.shape[1], page_size)
  table_BP = jnp.pad(table_BP, ((0, 0), (0, -table_BP.shape[1] % at_once)))
  # Queries of one key/value head lie side by side: [B, K, H / K · S, E].
  q = q_BSHE.reshape(num_rows, num_new, num_groups, -1, width).transpose(0, 2, 3, 1, 4)
  q = q.reshape(num_rows, num_groups, -1, width)
  positions_BQ = jnp.tile(starts_B[:, None] + jnp.arange(num_new), num_heads // num_groups)

  def read(block: Array, which: int) -> Array:
    """f[B, K, C, E]: the keys (0) or the values (1) of a block.

    They are read apart: out of one copy of both, XLA would read each with a stride. Heads are
    mapped over, so that chips which hold different heads read their own and no more.
    """
    listed = jax.lax.dynamic_slice_in_dim(table_BP, block * at_once, at_once, 1)
    of_heads = jax.vmap(lambda of_head: of_head[listed, which], out_axes=1)
    numbers = of_heads(pages).astype(q.dtype)
    if scales is not None:
      numbers = numbers * of_heads(scales)[..., None].astype(q.dtype)
    return numbers.reshape(num_rows, num_groups, -1, width)

  def turn(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    highest, total, out = carry
    k, v = (read(block, which) for which in (0, 1))
    scores = jnp.einsum('bkqe,bkce->bkqc', q, k, preferred_element_type=jnp.float32)
    key_positions = block * at_once * page_size + jnp.arange(at_once * page_size)
    seen = key_positions <= positions_BQ[..., None]
    scores = jnp.where(seen[:, None], scores / math.sqrt(width), MASKED)
    now = jnp.maximum(highest, scores.max(-1))
    weights = jnp.exp(scores - now[..., None])
    fading = jnp.exp(highest - now)
    product = jnp.einsum('bkqc,bkce->bkqe', weights.astype(v.dtype), v,
                         preferred_element_type=jnp.float32)
    return now, total * fading + weights.sum(-1), out * fading[..., None] + product

  first = (jnp.full(q.shape[:-1], MASKED, jnp.float32), jnp.zeros(q.shape[:-1], jnp.float32),
           jnp.zeros(q.shape, jnp.float32))
  num_tokens = jnp.where(counts_B > 0, starts_B + counts_B, 1).max()
  num_blocks = -(-num_tokens // (at_once * page_size))
  most = table_BP.shape[1] // at_once  # A constant, from which `tpu.roofline` reads the turns.
  _, (_, total, out) = jax.lax.while_loop(
      lambda c: (c[0] < num_blocks) & (c[0] < most),
      lambda c: (c[0] + 1, turn(*c)), (jnp.zeros((), jnp.int32), first))
  out = (out / total[..., None]).astype(q_BSHE.dtype)
  out = out.reshape(num_rows, num_groups, -1, num_new, width).transpose(0, 3, 1, 2, 4)
  return out.reshape(q_BSHE.shape)
