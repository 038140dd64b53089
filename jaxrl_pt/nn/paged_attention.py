"""Attention over pages: the keys and values of a sequence lie in fixed-size pages of one pool."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.nn import kv_quant
from jaxrl_pt.nn.attention import MASKED
from jaxrl_pt.nn.kv_quant import PackedPages
from jaxrl_pt.types import Array

# Tokens that one turn of the loop reads. Fewer make the loop's own cost show, and with more a short
# sequence pays for reading what lies beyond its end. A table for long sequences is read in no more
# than so many turns.
BLOCK, MOST_TURNS = 64, 256
# The pages of a document are read once for many queries, so that reading too much costs little.
DOCUMENT_BLOCK = 256
# Parts of a document's rows, each of which reads up to its own longest row.
DOCUMENT_PARTS = 4


def pages_per_turn(table_len: int, page_size: int, block: int) -> int:
  """Pages of each row that one turn of the loop reads."""
  return min(max(1, block // page_size, -(-table_len // MOST_TURNS)), table_len)


def paged_attention(q_BSHE: Array, pages: Array | PackedPages, scales: Array | None,
                    table_BP: Array, starts_B: Array, counts_B: Array) -> Array:
  """Attention of S new tokens of each row to the tokens of its pages.

    out_s = softmax(q_s K[:t]ᵀ / √E) V[:t],   t = start + s + 1

  The pages of a block are read in a loop with a running softmax, up to the end of the longest row,
  so that neither memory nor time depends on the longest sequence that would fit.

  Args:
    q_BSHE: f[B, S, H, E] queries, after RoPE; H is a multiple of K.
    pages: f or i8[K, N, 2, page, E] keys, then values, or packed ones; those of the new tokens
      included.
    scales: f32[K, N, 2, page] where pages are quantised, else None.
    table_BP: i32[B, P] the pages of each row, as indices into the pool.
    starts_B: i32[B] position of each row's first new token.
    counts_B: i32[B] how many of its S tokens a row has; the results of the others mean nothing.

  Returns:
    f[B, S, H, E] in q's dtype; the softmax is float32.
  """
  q, positions_BQ = _by_group(q_BSHE, starts_B, pages)
  end = jnp.where(counts_B > 0, starts_B + counts_B, 1).max()
  return _out(_over_pages(q, positions_BQ, end, _Pool(pages, scales, table_BP, True), BLOCK),
              q_BSHE)


def paged_attention_beside(q_BSHE: Array, pages: Array | PackedPages, scales: Array | None,
                           table_BP: Array, starts_B: Array, counts_B: Array, table_DP: Array,
                           shared_B: Array) -> Array:
  """`paged_attention` of rows that lie beside one another if their pages begin alike.

  The pages that rows share with their document are read once for all of them, and the rest of each
  row's pages apart; both parts have a softmax of their own, and are joined as blocks are.

  Args:
    q_BSHE, pages, scales, table_BP, starts_B, counts_B: as for `paged_attention`; each of D
      documents has B / D rows, in its order.
    table_DP: i32[D, P'] the documents' pages.
    shared_B: i32[B] the tokens that each row reads from its document's pages, whole pages of them;
      its own table begins with these.

  Returns:
    f[B, S, H, E] in q's dtype.
  """
  page_size = pages.shape[3]
  q, positions_BQ = _by_group(q_BSHE, starts_B, pages)
  own = shared_B[:, None] // page_size + jnp.arange(table_BP.shape[1])
  own_table = jnp.take_along_axis(table_BP, jnp.minimum(own, table_BP.shape[1] - 1), 1)
  end = jnp.where(counts_B > 0, starts_B + counts_B - shared_B, 1).max()
  of_rows = _over_pages(q, positions_BQ - shared_B[:, None], end,
                        _Pool(pages, scales, own_table, shared_B == 0), BLOCK)
  of_documents = _over_documents(q, shared_B, _Pool(pages, scales, table_DP, True))
  return _out(_joined(of_rows, of_documents), q_BSHE)


class _Pool(NamedTuple):
  """Pages, and which of them some rows read."""

  pages: Array | PackedPages
  scales: Array | None
  table_BP: Array
  is_whole: Array | bool  # bool[B] whether a row's table begins with the page of position 0

  def read(self, begin: Array, num_pages: int, which: int, dtype: DTypeLike) -> Array:
    """dtype[B, K, C, E]: the keys (0) or the values (1) of some pages of each row's table.

    They are read apart: out of one copy of both, XLA would read each with a stride. Heads are
    mapped over, so that chips which hold different heads read their own and no more.
    """
    listed = jax.lax.dynamic_slice_in_dim(self.table_BP, begin, num_pages, 1)
    of_heads = jax.vmap(lambda of_head: of_head[listed, which], out_axes=1)
    is_first = (begin + jnp.arange(num_pages) == 0) & jnp.reshape(self.is_whole, (-1, 1, 1))
    numbers = kv_quant.read(self.pages, self.scales, of_heads, is_first, dtype)
    return numbers.reshape(*numbers.shape[:2], -1, numbers.shape[-1])


class _Part(NamedTuple):
  """The attention of some queries to some keys, with a softmax that is not normalised yet."""

  highest: Array  # f32[B, K, Q] the largest score; MASKED where a query sees none of the keys
  total: Array  # f32[B, K, Q] Σ exp(score − highest)
  out: Array  # f32[B, K, Q, E] Σ exp(score − highest) v


def _joined(one: _Part, other: _Part) -> _Part:
  """The attention to the keys of both parts."""
  highest = jnp.maximum(one.highest, other.highest)
  shares = [jnp.exp(part.highest - highest) for part in (one, other)]
  return _Part(highest, one.total * shares[0] + other.total * shares[1],
               one.out * shares[0][..., None] + other.out * shares[1][..., None])


def _over_documents(q_BKQE: Array, shared_B: Array, pool: _Pool) -> _Part:
  """The attention of rows to the tokens that they share with their documents.

  A document's rows are taken in parts, one after the other, each up to the longest of its rows.
  Where positions of a document stand in their order, as those of RPT do, the first parts end early.

  Args:
    q_BKQE: f[B, K, Q, E]; each of D documents has B / D rows.
    shared_B: i32[B] the tokens that each row reads of its document.
    pool: the documents' pages; its table is i32[D, P].
  """
  num_docs, (num_rows, num_groups, num_queries, width) = pool.table_BP.shape[0], q_BKQE.shape
  parts = math.gcd(num_rows // num_docs, DOCUMENT_PARTS)
  in_parts = lambda x: x.reshape(num_docs, parts, -1, *x.shape[1:]).swapaxes(0, 1)

  def part(given: tuple[Array, Array]) -> _Part:
    q_DRKQE, shared_DR = given
    # The queries of these rows side by side: [D, K, R · Q, E].
    together = q_DRKQE.swapaxes(1, 2).reshape(num_docs, num_groups, -1, width)
    return _over_pages(together, jnp.repeat(shared_DR - 1, num_queries, 1), shared_DR.max(), pool,
                       DOCUMENT_BLOCK)

  def by_rows(x: Array) -> Array:
    """[parts, D, K, R · Q, …] → [B, K, Q, …]"""
    x = x.reshape(parts, num_docs, num_groups, -1, num_queries, *x.shape[4:])
    return jnp.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3)).reshape(*q_BKQE.shape[:3], *x.shape[5:])

  return jax.tree.map(by_rows, jax.lax.map(part, (in_parts(q_BKQE), in_parts(shared_B))))


def _by_group(q_BSHE: Array, starts_B: Array, pages: Array | PackedPages) -> tuple[Array, Array]:
  """Queries of one key/value head side by side, f[B, K, Q, E], and their positions i32[B, Q]."""
  num_rows, num_new, num_heads, width = q_BSHE.shape
  num_groups = pages.shape[0]
  q = q_BSHE.reshape(num_rows, num_new, num_groups, -1, width).transpose(0, 2, 3, 1, 4)
  positions = jnp.tile(starts_B[:, None] + jnp.arange(num_new), num_heads // num_groups)
  return q.reshape(num_rows, num_groups, -1, width), positions


def _out(part: _Part, q_BSHE: Array) -> Array:
  """The normalised result in the order and type of the queries."""
  num_rows, num_new, _, width = q_BSHE.shape
  num_groups = part.out.shape[1]
  out = (part.out / part.total[..., None]).astype(q_BSHE.dtype)
  out = out.reshape(num_rows, num_groups, -1, num_new, width).transpose(0, 3, 1, 2, 4)
  return out.reshape(q_BSHE.shape)


def _over_pages(q_BKQE: Array, positions_BQ: Array, num_tokens: Array, pool: _Pool,
                block: int) -> _Part:
  """The attention of queries to the tokens of their row's pages up to their positions.

  Args:
    q_BKQE: f[B, K, Q, E].
    positions_BQ: i32[B, Q]; a query with a negative one sees nothing.
    num_tokens: i32[] tokens after which no query sees one.
    pool: the pages.
    block: the tokens that one turn of the loop reads.
  """
  width, page_size, table_len = q_BKQE.shape[-1], pool.pages.shape[3], pool.table_BP.shape[1]
  at_once = pages_per_turn(table_len, page_size, block)
  table_BP = jnp.pad(pool.table_BP, ((0, 0), (0, -table_len % at_once)))
  pool = pool._replace(table_BP=table_BP)

  def turn(number: Array, so_far: _Part) -> _Part:
    k, v = (pool.read(number * at_once, at_once, which, q_BKQE.dtype) for which in (0, 1))
    scores = jnp.einsum('bkqe,bkce->bkqc', q_BKQE, k, preferred_element_type=jnp.float32)
    key_positions = number * at_once * page_size + jnp.arange(at_once * page_size)
    seen = key_positions <= positions_BQ[..., None]
    scores = jnp.where(seen[:, None], scores / math.sqrt(width), MASKED)
    now = jnp.maximum(so_far.highest, scores.max(-1))
    weights = jnp.exp(scores - now[..., None])
    fading = jnp.exp(so_far.highest - now)
    product = jnp.einsum('bkqc,bkce->bkqe', weights.astype(v.dtype), v,
                         preferred_element_type=jnp.float32)
    return _Part(now, so_far.total * fading + weights.sum(-1),
                 so_far.out * fading[..., None] + product)

  nothing = _Part(jnp.full(q_BKQE.shape[:-1], MASKED, jnp.float32),
                  jnp.zeros(q_BKQE.shape[:-1], jnp.float32), jnp.zeros(q_BKQE.shape, jnp.float32))
  num_blocks = -(-num_tokens // (at_once * page_size))
  most = table_BP.shape[1] // at_once  # A constant, from which `tpu.roofline` reads the turns.
  return jax.lax.while_loop(
      lambda c: (c[0] < num_blocks) & (c[0] < most),
      lambda c: (c[0] + 1, turn(*c)), (jnp.zeros((), jnp.int32), nothing))[1]
