"""Grouped-query attention and the small algebra of its masks."""

import math

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array

MASKED = -1e30


def packed_mask(segments_BT: Array) -> Array:
  """bool[B, T, T]: a query sees keys at or before it, in its own segment."""
  length = segments_BT.shape[-1]
  causal = jnp.tril(jnp.ones((length, length), bool))
  return causal & (segments_BT[:, :, None] == segments_BT[:, None, :])


def cache_mask(positions_BS: Array, num_slots: int) -> Array:
  """bool[B, S, C]: slot index = position, so a query sees the slots up to its own position."""
  return jnp.arange(num_slots)[None, None, :] <= positions_BS[:, :, None]


def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """softmax(q kᵀ / √E + mask) v, with H / K query heads to each key/value head (2305.13245).

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
