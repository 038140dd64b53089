"""Rows of sparse attention outside the sampler's program: their cache, and how prompts fill it."""

import jax
import jax.numpy as jnp

from jaxrl_pt.models import paged_cache
from jaxrl_pt.sampling import resa_attention
from jaxrl_pt.sampling.resa_attention import SparseCache

PREFILL_TOKENS = 512  # tokens of each row in one forward pass


def empty(config, num_rows: int, num_blocks: int, block: int) -> SparseCache:
  """Rows whose pages lie side by side."""
  pool = paged_cache.init(config, 1 + num_rows * num_blocks, block, jnp.float32)
  table = 1 + jnp.arange(num_rows * num_blocks, dtype=jnp.int32).reshape(num_rows, num_blocks)
  return SparseCache(pool, table,
                     resa_attention.descriptors(config, num_rows, num_blocks, jnp.float32))


def prefill(model, params, cache: SparseCache, tokens_BT) -> SparseCache:
  """Feeds prompts of a multiple of PREFILL_TOKENS."""
  rows, every = jnp.arange(tokens_BT.shape[0]), jnp.ones(tokens_BT.shape[0], jnp.int32)

  def run(i, cache):
    starts = every * i * PREFILL_TOKENS
    attend = resa_attention.dense(model.ops, rows, starts, every * PREFILL_TOKENS)
    tokens = jax.lax.dynamic_slice_in_dim(tokens_BT, i * PREFILL_TOKENS, PREFILL_TOKENS, 1)
    positions = starts[:, None] + jnp.arange(PREFILL_TOKENS)
    return model.extend(params, tokens, positions, cache, attend)[1]

  return jax.lax.fori_loop(0, tokens_BT.shape[1] // PREFILL_TOKENS, run, cache)
