"""Paged attention as a definition: the pages of each row are gathered whole, then attended to."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def paged_attention(q_BSHE: Array, pages: Array, scales: Array | None, table_BP: Array,
                    starts_B: Array, counts_B: Array) -> Array:
  """softmax(q_s K[:t]ᵀ / √E) V[:t] with t = start + s + 1; 0 for s ≥ count."""
  num_rows, num_new, num_heads, width = q_BSHE.shape
  num_groups = pages.shape[0]
  k, v = gathered(pages, scales, table_BP, q_BSHE.dtype)
  q = q_BSHE.reshape(num_rows, num_new, num_groups, -1, width).transpose(0, 2, 3, 1, 4)
  q = q.reshape(num_rows, num_groups, -1, width)  # Queries of a head side by side.
  precision = 'highest' if q.dtype == jnp.float32 else None
  logits = jnp.einsum('bkqe,bkce->bkqc', q, k, precision=precision,
                      preferred_element_type=jnp.float32) / math.sqrt(width)
  queries = jnp.arange(num_new)
  position_BS = jnp.where(queries < counts_B[:, None], starts_B[:, None] + queries, -1)
  seen_BSC = jnp.arange(k.shape[2]) <= position_BS[..., None]
  seen = jnp.tile(seen_BSC, (1, num_heads // num_groups, 1))[:, None]
  logits = jnp.where(seen, logits, -jnp.inf)
  # A query that sees nothing weighs everything by 0.
  highest = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
  weights = jnp.exp(logits - highest)
  weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
  # Zero times whatever a slot that was never written holds must be zero.
  v = jnp.where(seen_BSC.any(1)[:, None, :, None], v, 0)
  out = jnp.einsum('bkqc,bkce->bkqe', weights.astype(v.dtype), v, precision=precision,
                   preferred_element_type=jnp.float32)
  out = out.reshape(num_rows, num_groups, -1, num_new, width).transpose(0, 3, 1, 2, 4)
  return out.reshape(q_BSHE.shape).astype(q_BSHE.dtype)


def gathered(pages: Array, scales: Array | None, table_BP: Array, dtype: jnp.dtype
             ) -> tuple[Array, Array]:
  """Keys and values of each row, dtype[B, K, P · page, E]."""
  num_groups = pages.shape[0]
  if pages.ndim == 4:  # Keys beside values.
    pages = jnp.stack(jnp.split(pages, 2, -1), 2)
  kv = pages[jnp.arange(num_groups)[:, None], table_BP[:, None]].astype(dtype)
  if scales is not None:
    of_rows = scales[jnp.arange(num_groups)[:, None], table_BP[:, None]]
    kv = (kv * of_rows[..., None]).astype(dtype)
  kv = jnp.moveaxis(kv, 3, 0)  # [2, B, K, P, page, E]
  k, v = kv.reshape(*kv.shape[:3], -1, kv.shape[-1])
  return k, v
