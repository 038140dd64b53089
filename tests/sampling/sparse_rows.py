"""Rows of sparse attention outside the sampler's program, for tests of its parts."""

import jax.numpy as jnp
import numpy as np

from jaxrl_pt.models import paged_cache
from jaxrl_pt.sampling import resa_attention
from jaxrl_pt.sampling.resa_attention import SparseCache


def sparse_rows(config, num_rows, num_blocks, block, order=None):
  """An empty cache of rows with pages of their own; `order` shuffles which page a block has."""
  table = 1 + np.arange(num_rows * num_blocks)
  if order is not None:
    table = 1 + np.random.default_rng(order).permutation(table.size)
  pool = paged_cache.init(config, 1 + table.size, block, jnp.float32)
  return SparseCache(pool, jnp.asarray(table.reshape(num_rows, num_blocks), jnp.int32),
                     resa_attention.descriptors(config, num_rows, num_blocks, jnp.float32))


def prefill(model, params, cache, tokens_BT, lengths_B):
  """Hidden states of the last tokens of right-padded prompts, and the filled cache."""
  rows = jnp.arange(tokens_BT.shape[0])
  attend = resa_attention.dense(model.ops, rows, jnp.zeros_like(lengths_B), lengths_B)
  positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  hidden, cache = model.extend(params, tokens_BT, positions, cache, attend)
  return hidden[rows, lengths_B - 1], cache


def keys_and_values(cache, length):
  """f[2, L, B, K, T, E] as a row of slots would hold them."""
  layers = jnp.arange(cache.bounds.shape[0])
  at = cache.table + (layers * cache.pool.num_pages)[:, None, None]
  kv = cache.pool.pages[:, at].transpose(4, 1, 2, 0, 3, 5, 6)
  return kv.reshape(*kv.shape[:4], -1, kv.shape[-1])[..., :length, :]
