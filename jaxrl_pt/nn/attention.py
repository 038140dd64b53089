"""Grouped-query attention and its masks.

`attention` is the definition. `causal_attention` equals it under `packed_mask`, and whole
sequences go through it. It takes queries in a few blocks, each against the keys up to the block's
end, so that most of what the mask hides is never computed. Its backward pass recomputes the
probabilities instead of keeping f32[B, H, T, T] of every layer.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array

MASKED = -1e30

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def packed_mask(segments_BT: Array) -> Array:
  """The mask of packed rows, bool[B, T, T]: a query sees its own segment up to its position."""
  length = segments_BT.shape[-1]
  causal = jnp.tril(jnp.ones((length, length), bool))
  return causal & (segments_BT[:, :, None] == segments_BT[:, None, :])


def cache_mask(positions_BS: Array, num_slots: int) -> Array:
  """The mask of a cache whose slot c holds position c, bool[B, S, C]: slots up to the query's."""
  return jnp.arange(num_slots)[None, None, :] <= positions_BS[:, :, None]


def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """Grouped-query attention softmax(q kᵀ / √E + mask) v (2305.13245).

  H / K query heads share each key/value head.

  Args:
    q: f[B, S, H, E].
    k, v: f[B, C, K, E].
    mask: bool[B, S, C], True where a query may look; each query sees at least one key.

  Returns:
    f[B, S, H, E] in q's dtype; the softmax is float32.
  """
  num_rows, num_queries, num_heads, head_dim = q.shape
  num_groups = k.shape[2]
  q = q.reshape(num_rows, num_queries, num_groups, num_heads // num_groups, head_dim)
  scores = jnp.einsum('bskge,bcke->bkgsc', q, k, preferred_element_type=jnp.float32)
  scores = jnp.where(mask[:, None, None], scores / math.sqrt(head_dim), MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum('bkgsc,bcke->bskge', weights, v)
  return out.reshape(num_rows, num_queries, num_heads, head_dim)


def head_major_attention(q: Array, k_BKCE: Array, v_BKCE: Array, mask: Array) -> Array:
  """`attention` with keys and values f[B, K, C, E], as caches hold them."""
  num_rows, num_queries, num_heads, head_dim = q.shape
  num_groups = k_BKCE.shape[1]
  q = q.reshape(num_rows, num_queries, num_groups, num_heads // num_groups, head_dim)
  q = q.transpose(0, 2, 3, 1, 4).reshape(num_rows, num_groups, -1, head_dim)
  scores = _dot('bkqe,bkce->bkqc', q, k_BKCE) / math.sqrt(head_dim)
  scores = scores.reshape(num_rows, num_groups, -1, num_queries, k_BKCE.shape[2])
  scores = jnp.where(mask[:, None, None], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_BKCE.dtype)
  weights = weights.reshape(num_rows, num_groups, -1, k_BKCE.shape[2])
  out = jnp.einsum('bkqc,bkce->bkqe', weights, v_BKCE)
  out = out.reshape(num_rows, num_groups, -1, num_queries, head_dim)
  return out.transpose(0, 3, 1, 2, 4).reshape(num_rows, num_queries, num_heads, head_dim)


def branch_attention(q_NRSHE: Array, k_prefix: Array, v_prefix: Array, prefix_lengths_NR: Array,
                     k_own: Array, v_own: Array) -> Array:
  """Attention of R branches of a document over the document's shared keys and their own.

    out = softmax(q [K_doc[:t_r]; K_r[:i]]ᵀ / √E) [V_doc[:t_r]; V_r[:i]],  i = s + 1

  The document's keys are read once for all branches.

  Args:
    q_NRSHE: f[N, R, S, H, E], S tokens of each branch.
    k_prefix, v_prefix: f[N, K, T, E].
    prefix_lengths_NR: i32[N, R] in [1, T].
    k_own, v_own: f[N, K, R, S, E].

  Returns:
    f[N, R, S, H, E] in q's dtype; the softmax is float32.
  """
  num_docs, num_branches, num_new, num_heads, head_dim = q_NRSHE.shape
  num_groups, length = k_prefix.shape[1:3]
  group = num_heads // num_groups
  q = q_NRSHE.reshape(num_docs, num_branches, num_new, num_groups, group, head_dim)
  q = q.transpose(0, 3, 1, 4, 2, 5)  # [N, K, R, G, S, E]
  split = q.shape[:5]
  to_document = _dot('nkqe,nkte->nkqt', q.reshape(num_docs, num_groups, -1, head_dim),
                     k_prefix.astype(q.dtype)).reshape(*split, length)
  to_own = _dot('nkrqe,nkrce->nkrqc', q.reshape(*split[:3], -1, head_dim),
                k_own.astype(q.dtype)).reshape(*split, num_new)
  sees_document = jnp.arange(length) < prefix_lengths_NR[..., None]
  sees_own = jnp.arange(num_new) <= jnp.arange(num_new)[:, None]
  scores = jnp.concatenate([
      jnp.where(sees_document[:, None, :, None, None], to_document, MASKED),
      jnp.where(sees_own, to_own, MASKED)], -1) / math.sqrt(head_dim)
  weights = jax.nn.softmax(scores, -1).astype(q.dtype)
  document = weights[..., :length].reshape(num_docs, num_groups, -1, length)
  own = weights[..., length:].reshape(*split[:3], -1, num_new)
  out = (_dot('nkqt,nkte->nkqe', document, v_prefix.astype(q.dtype)).reshape(*split, head_dim)
         + _dot('nkrqc,nkrce->nkrqe', own, v_own.astype(q.dtype)).reshape(*split, head_dim))
  out = out.astype(q.dtype).transpose(0, 2, 4, 1, 3, 5)  # [N, R, S, K, G, E]
  return out.reshape(q_NRSHE.shape)


def blocked_branch_attention(q_NRSHE: Array, k_prefix: Array, v_prefix: Array,
                             prefix_lengths_NR: Array, k_own: Array, v_own: Array) -> Array:
  """`branch_attention`, faster and in less memory where branches are long.

  Long branches are taken one after the other, as the last tokens of a sequence that begins with
  their document: nothing is computed that causality hides, and the backward pass computes the
  probabilities again.
  """
  num_docs, num_branches, num_new, num_heads, head_dim = q_NRSHE.shape
  if num_new < QUERIES_AT_ONCE:  # All branches read the document once.
    return branch_attention(q_NRSHE, k_prefix, v_prefix, prefix_lengths_NR, k_own, v_own)
  num_groups, length = k_prefix.shape[1:3]
  q = q_NRSHE.reshape(num_docs, num_branches, num_new, num_groups, -1, head_dim)
  # Hidden keys of the document make a segment of their own.
  seen = jnp.arange(length) < prefix_lengths_NR[..., None]
  segments = jnp.concatenate([seen.astype(jnp.int32),
                              jnp.ones((num_docs, num_branches, num_new), jnp.int32)], -1)
  # The loop adds up the gradients of the document's keys and values in the type they have here.
  k_prefix, v_prefix = k_prefix.astype(jnp.float32), v_prefix.astype(jnp.float32)

  def one(branch: tuple[Array, Array, Array, Array]) -> Array:
    q_NKGSE, k_NKSE, v_NKSE, segments_NC = branch
    after = lambda prefix, own: jnp.concatenate([prefix.astype(q.dtype), own.astype(q.dtype)], 2)
    return _causal(q_NKGSE, after(k_prefix, k_NKSE), after(v_prefix, v_NKSE), segments_NC)

  out_RNKGSE = jax.lax.map(one, (
      q.transpose(1, 0, 3, 4, 2, 5), jnp.moveaxis(k_own, 2, 0), jnp.moveaxis(v_own, 2, 0),
      jnp.moveaxis(segments, 1, 0)))
  return out_RNKGSE.transpose(1, 0, 4, 2, 3, 5).reshape(q_NRSHE.shape)


def causal_attention(q: Array, k: Array, v: Array, segments_BT: Array) -> Array:
  """`attention(q, k, v, packed_mask(segments_BT))`, faster and in less memory.

  Args:
    q: f[B, T, H, E].
    k, v: f[B, T, K, E].
    segments_BT: i32[B, T].

  Returns:
    f[B, T, H, E] in q's dtype; the softmax is float32.

  Source: the backward pass is that of 2205.14135, appendix B.2, without its tiling of keys.
  """
  num_rows, length, num_heads, head_dim = q.shape
  num_groups = k.shape[2]
  q = q.reshape(num_rows, length, num_groups, num_heads // num_groups, head_dim)
  # Time next to E, heads outside: every product below is then a plain batched matmul.
  out_BKGTE = _causal(q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3),
                      v.transpose(0, 2, 1, 3), segments_BT)
  return out_BKGTE.transpose(0, 3, 1, 2, 4).reshape(num_rows, length, num_heads, head_dim)


NUM_RANGES = 4  # computes 5/8 of the square of scores; more ranges cost compile time
MIN_RANGE = 64  # queries; smaller matmuls are slower than the scores they save
# The float32 scores that exist at a time are B · H · 128 · T: they should stay in a CPU's cache,
# and must not fill a device's memory.
QUERIES_AT_ONCE = 128


def _ranges(num_queries: int) -> list[tuple[int, int, int]]:
  """Ranges of queries (start, number of blocks, queries a block) that need no key behind them."""
  width = max(MIN_RANGE, -(-num_queries // NUM_RANGES))
  if width > QUERIES_AT_ONCE:
    width = -(-width // QUERIES_AT_ONCE) * QUERIES_AT_ONCE
  size = min(width, QUERIES_AT_ONCE)
  ranges = []
  for start in range(0, num_queries, width):
    whole, rest = divmod(min(width, num_queries - start), size)
    ranges += [(start, whole, size)] if whole else []
    ranges += [(start + whole * size, 1, rest)] if rest else []
  return ranges


def _blocks(x_BKGSE: Array, start: int, number: int, size: int) -> Array:
  """The blocks of a range, queries of a group side by side: f[number, B, K, G · size, E]."""
  x = x_BKGSE[:, :, :, start:start + number * size]
  x = jnp.moveaxis(x.reshape(*x.shape[:3], number, size, x.shape[-1]), 3, 0)
  return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _join(blocks: list[Array], num_heads: int) -> Array:
  """Undoes `_blocks` for all ranges: list of [number, B, K, G · size, E] → [B, K, G, S, E]."""
  parts = []
  for x in blocks:
    x = jnp.moveaxis(x.reshape(*x.shape[:3], num_heads, -1, x.shape[-1]), 0, 3)
    parts.append(x.reshape(*x.shape[:3], -1, x.shape[-1]))
  return jnp.concatenate(parts, 3)


def _scores(q_BKQE: Array, k_BKCE: Array, segments_BT: Array, first: Array | int,
            size: int) -> Array:
  """f32[B, K, G · size, C]: masked, scaled scores of queries at positions first, first + 1, …"""
  num_keys = k_BKCE.shape[2]
  scores = _dot('bkqe,bkce->bkqc', q_BKQE, k_BKCE) / math.sqrt(q_BKQE.shape[-1])
  causal = first + jnp.arange(size)[:, None] >= jnp.arange(num_keys)
  own = jax.lax.dynamic_slice_in_dim(segments_BT, first, size, 1)
  mask = causal & (own[:, :, None] == segments_BT[:, None, :num_keys])
  by_head = scores.reshape(*scores.shape[:2], -1, size, num_keys)
  return jnp.where(mask[:, None, None], by_head, MASKED).reshape(scores.shape)


@jax.custom_vjp
def _causal(q_BKGSE: Array, k_BKTE: Array, v_BKTE: Array, segments_BT: Array) -> Array:
  """Attention of the last S of T tokens, f[B, K, G, S, E]."""
  return _causal_forward(q_BKGSE, k_BKTE, v_BKTE, segments_BT)[0]


def _causal_forward(q: Array, k: Array, v: Array,
                    segments_BT: Array) -> tuple[Array, tuple[Array, ...]]:
  before = k.shape[2] - q.shape[3]
  outs, log_zs = [], []
  for start, number, size in _ranges(q.shape[3]):
    end = before + start + number * size

    def block(x: tuple[Array, Array], size: int = size, end: int = end) -> tuple[Array, Array]:
      scores = _scores(x[0], k[:, :, :end], segments_BT, x[1], size)
      highest = scores.max(-1, keepdims=True)
      weights = jnp.exp(scores - highest)
      z = weights.sum(-1, keepdims=True)
      out = _dot('bkqc,bkce->bkqe', weights.astype(v.dtype), v[:, :, :end]) / z
      return out.astype(q.dtype), highest + jnp.log(z)

    firsts = before + start + size * jnp.arange(number)
    out, log_z = jax.lax.map(jax.checkpoint(block), (_blocks(q, start, number, size), firsts))
    outs.append(out)
    log_zs.append(log_z)
  out = _join(outs, q.shape[2])
  return out, (q, k, v, segments_BT, out, _join(log_zs, q.shape[2]))


def _causal_backward(saved: tuple[Array, ...],
                     d_out: Array) -> tuple[Array, Array, Array, None]:
  q, k, v, segments_BT, out, log_z = saved
  before = k.shape[2] - q.shape[3]
  # Σ_c weights · d_weights of a query, which the softmax subtracts.
  inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
  dqs = []
  dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  for start, number, size in _ranges(q.shape[3]):
    end = before + start + number * size

    def block(sums: tuple[Array, Array], x: tuple[Array, ...], size: int = size,
              end: int = end) -> tuple[tuple[Array, Array], Array]:
      q_rows, d_rows, z_rows, inner_rows, first = x
      weights = jnp.exp(_scores(q_rows, k[:, :, :end], segments_BT, first, size) - z_rows)
      d_weights = _dot('bkqe,bkce->bkqc', d_rows, v[:, :, :end])
      d_scores = weights * (d_weights - inner_rows) / math.sqrt(q.shape[-1])
      d_scores = d_scores.astype(q.dtype)
      dk = sums[0] + _dot('bkqc,bkqe->bkce', d_scores, q_rows)
      dv = sums[1] + _dot('bkqc,bkqe->bkce', weights.astype(v.dtype), d_rows)
      return (dk, dv), _dot('bkqc,bkce->bkqe', d_scores, k[:, :, :end])

    rows = [_blocks(x, start, number, size) for x in (q, d_out, log_z, inner)]
    firsts = before + start + size * jnp.arange(number)
    (dk_range, dv_range), dq = jax.lax.scan(jax.checkpoint(block),
                                            (dk[:, :, :end], dv[:, :, :end]), (*rows, firsts))
    dk, dv = dk.at[:, :, :end].set(dk_range), dv.at[:, :, :end].set(dv_range)
    dqs.append(dq)
  dq = _join(dqs, q.shape[2]).astype(q.dtype)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_causal.defvjp(_causal_forward, _causal_backward)
