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
                     k_own: Array, v_own: Array, step: Array | int) -> Array:
  """Attention of R branches of a document over the document's shared keys and their own.

    out = softmax(q [K_doc[:t_r]; K_r[:i]]ᵀ / √E) [V_doc[:t_r]; V_r[:i]],  i = step + s + 1

  The document's keys are read once for all branches.

  Args:
    q_NRSHE: f[N, R, S, H, E], S new tokens of each branch.
    k_prefix, v_prefix: f[N, K, T, E].
    prefix_lengths_NR: i32[N, R] in [1, T].
    k_own, v_own: f[N, K, R, C, E]; entry c is a branch's own token c.
    step: i32[] own tokens before the new ones.

  Returns:
    f[N, R, S, H, E] in q's dtype; the softmax is float32.
  """
  num_docs, num_branches, num_new, num_heads, head_dim = q_NRSHE.shape
  num_groups, length = k_prefix.shape[1:3]
  group, num_own = num_heads // num_groups, k_own.shape[3]
  q = q_NRSHE.reshape(num_docs, num_branches, num_new, num_groups, group, head_dim)
  q = q.transpose(0, 3, 1, 4, 2, 5)  # [N, K, R, G, S, E]
  split = q.shape[:5]
  to_document = _dot('nkqe,nkte->nkqt', q.reshape(num_docs, num_groups, -1, head_dim),
                     k_prefix.astype(q.dtype)).reshape(*split, length)
  to_own = _dot('nkrqe,nkrce->nkrqc', q.reshape(*split[:3], -1, head_dim),
                k_own.astype(q.dtype)).reshape(*split, num_own)
  sees_document = jnp.arange(length) < prefix_lengths_NR[..., None]
  sees_own = jnp.arange(num_own) <= step + jnp.arange(num_new)[:, None]
  scores = jnp.concatenate([
      jnp.where(sees_document[:, None, :, None, None], to_document, MASKED),
      jnp.where(sees_own, to_own, MASKED)], -1) / math.sqrt(head_dim)
  weights = jax.nn.softmax(scores, -1).astype(q.dtype)
  document = weights[..., :length].reshape(num_docs, num_groups, -1, length)
  own = weights[..., length:].reshape(*split[:3], -1, num_own)
  out = (_dot('nkqt,nkte->nkqe', document, v_prefix.astype(q.dtype)).reshape(*split, head_dim)
         + _dot('nkrqc,nkrce->nkrqe', own, v_own.astype(q.dtype)).reshape(*split, head_dim))
  out = out.astype(q.dtype).transpose(0, 2, 4, 1, 3, 5)  # [N, R, S, K, G, E]
  return out.reshape(q_NRSHE.shape)


# A learner scores so many queries of a branch at once. The float32 scores that exist at a time are
# then R · H · 128 · (T + C) a document, however long the responses are.
BRANCH_BLOCK = 128


def blocked_branch_attention(q_NRSHE: Array, k_prefix: Array, v_prefix: Array,
                             prefix_lengths_NR: Array, k_own: Array, v_own: Array) -> Array:
  """`branch_attention` of whole branches (step 0), which takes some queries at a time.

  The backward pass computes their scores again.
  """
  num_new = q_NRSHE.shape[2]
  if num_new <= BRANCH_BLOCK:
    return branch_attention(q_NRSHE, k_prefix, v_prefix, prefix_lengths_NR, k_own, v_own, 0)
  pad = [(0, 0)] * 2 + [(0, -num_new % BRANCH_BLOCK)] + [(0, 0)] * 2
  q = jnp.pad(q_NRSHE, pad)
  # The loop adds up the gradients of keys and values in the type that they have here.
  keys_and_values = [x.astype(jnp.float32) for x in (k_prefix, v_prefix, k_own, v_own)]
  blocks = jnp.moveaxis(q.reshape(*q.shape[:2], -1, BRANCH_BLOCK, *q.shape[3:]), 2, 0)

  @jax.checkpoint
  def block(q_and_start: tuple[Array, Array]) -> Array:
    k_prefix, v_prefix, k_own, v_own = keys_and_values
    return branch_attention(q_and_start[0], k_prefix, v_prefix, prefix_lengths_NR, k_own, v_own,
                            q_and_start[1])

  out = jax.lax.map(block, (blocks, BRANCH_BLOCK * jnp.arange(len(blocks))))
  return jnp.moveaxis(out, 0, 2).reshape(q.shape)[:, :, :num_new]


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


NUM_BLOCKS = 4  # computes 5/8 of the square of scores; more blocks cost compile time
MIN_BLOCK = 64  # queries; smaller matmuls are slower than the scores they save


def _blocks(length: int) -> list[tuple[int, int]]:
  """Query ranges [start, end); a block needs the keys [0, end)."""
  width = max(MIN_BLOCK, -(-length // NUM_BLOCKS))
  return [(start, min(start + width, length)) for start in range(0, length, width)]


def _scores(q_BKGTE: Array, k_BKTE: Array, segments_BT: Array, start: int, end: int) -> Array:
  """f32[B, K, G, end − start, end]: masked, scaled scores of one block of queries."""
  rows = _rows(q_BKGTE, start, end)
  scores = _dot('bkse,bkce->bksc', rows, k_BKTE[:, :, :end]) / math.sqrt(q_BKGTE.shape[-1])
  causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)
  mask = causal & (segments_BT[:, start:end, None] == segments_BT[:, None, :end])
  scores = scores.reshape(*q_BKGTE.shape[:3], end - start, end)
  return jnp.where(mask[:, None, None], scores, MASKED)


def _rows(x_BKGTE: Array, start: int, end: int) -> Array:
  """A block of time steps, the queries of a group side by side: f[B, K, G · (end − start), E]."""
  block = x_BKGTE[:, :, :, start:end]
  return block.reshape(*block.shape[:2], -1, block.shape[-1])


@jax.custom_vjp
def _causal(q_BKGTE: Array, k_BKTE: Array, v_BKTE: Array, segments_BT: Array) -> Array:
  return _causal_forward(q_BKGTE, k_BKTE, v_BKTE, segments_BT)[0]


def _causal_forward(q: Array, k: Array, v: Array,
                    segments_BT: Array) -> tuple[Array, tuple[Array, ...]]:
  outs, log_zs = [], []
  for start, end in _blocks(q.shape[3]):
    scores = _scores(q, k, segments_BT, start, end)
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    z = weights.sum(-1, keepdims=True)
    weights = weights.reshape(*k.shape[:2], -1, end).astype(v.dtype)
    out = _dot('bksc,bkce->bkse', weights, v[:, :, :end])
    outs.append(out.reshape(*z.shape[:-1], -1) / z)
    log_zs.append(highest + jnp.log(z))
  out = jnp.concatenate(outs, 3).astype(q.dtype)
  return out, (q, k, v, segments_BT, out, jnp.concatenate(log_zs, 3))


def _causal_backward(saved: tuple[Array, ...],
                     d_out: Array) -> tuple[Array, Array, Array, None]:
  q, k, v, segments_BT, out, log_z = saved
  # Σ_c weights · d_weights of a query, which the softmax subtracts.
  inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
  dqs = []
  dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  for start, end in _blocks(q.shape[3]):
    scores = _scores(q, k, segments_BT, start, end)
    weights = jnp.exp(scores - log_z[:, :, :, start:end]).reshape(*k.shape[:2], -1, end)
    q_rows, d_rows = _rows(q, start, end), _rows(d_out, start, end)
    d_weights = _dot('bkse,bkce->bksc', d_rows, v[:, :, :end])
    d_scores = weights * (d_weights - _rows(inner, start, end)) / math.sqrt(q.shape[-1])
    d_scores = d_scores.astype(q.dtype)
    dq = _dot('bksc,bkce->bkse', d_scores, k[:, :, :end])
    dqs.append(dq.reshape(*q.shape[:3], end - start, -1))
    later = ((0, 0), (0, 0), (0, k.shape[2] - end), (0, 0))
    dk += jnp.pad(_dot('bksc,bkse->bkce', d_scores, q_rows), later)
    dv += jnp.pad(_dot('bksc,bkse->bkce', weights.astype(v.dtype), d_rows), later)
  dq = jnp.concatenate(dqs, 3).astype(q.dtype)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_causal.defvjp(_causal_forward, _causal_backward)
