"""Writing new tokens of each row to the pages of a pool: token by token, or whole pages."""

import jax.numpy as jnp

from jaxrl_pt.types import Array


def write_tokens(leaf: Array, table_BP: Array, starts_B: Array, counts_B: Array, new_BSK2: Array,
                 nobody: Array | int) -> Array:
  """The pool with the first tokens of each row at the positions start … start + count − 1.

  The others are written to page `nobody`. Arguments and result as for `write_pages`, the definition
  of which this is.
  """
  num_new, page_size = new_BSK2.shape[1], leaf.shape[3]
  positions_BS = starts_B[:, None] + jnp.arange(num_new)
  pages_BS = jnp.take_along_axis(table_BP, positions_BS // page_size, 1, mode='clip')
  pages_BS = jnp.where(jnp.arange(num_new) < counts_B[:, None], pages_BS, nobody)
  offsets_BS = positions_BS % page_size
  if pages_BS.size == 1:
    # XLA would fuse a single update into each operation that reads it, and copy the cache for that.
    pages_BS = jnp.concatenate([pages_BS, jnp.full_like(pages_BS, nobody)])
    offsets_BS, new_BSK2 = (jnp.concatenate([x, x]) for x in (offsets_BS, new_BSK2))
  # Every axis but the last is indexed: an axis left whole between them would make the TPU's
  # scatter ask for another layout, and the whole pool be copied there and back in each layer.
  heads_K1, both = jnp.arange(leaf.shape[0])[:, None], jnp.arange(2)
  at = heads_K1, pages_BS[..., None, None], both, offsets_BS[..., None, None]
  return leaf.at[at].set(new_BSK2)


def write_pages(leaf: Array, table_BP: Array, starts_B: Array, counts_B: Array, new_BSK2: Array,
                nobody: Array | int) -> Array:
  """What `write_tokens` comes to, for TPUs.

  Pages that the tokens touch are read, changed and written as wholes. A TPU writes them by few
  long copies, where one update a token and head takes longer than the attention of a chunk; and
  numbers of which a token has one, such as scales, keep their layout, which XLA would change for
  updates of single numbers, copying the pool there and back.

  Args:
    leaf: [K, N, 2, page, …] keys or their scales, then those of the values.
    table_BP: i32[B, P] pages of each row, as indices into the pool. No two rows write to one page.
    starts_B: i32[B] position of each row's first new token.
    counts_B: i32[B] how many of its S tokens a row has.
    new_BSK2: [B, S, K, 2, …] of the leaf's dtype.
    nobody: a page that no row reads, for what is no token.

  Returns:
    The pool, [K, N, 2, page, …].
  """
  num_new, page_size = new_BSK2.shape[1], leaf.shape[3]
  num_pages = (num_new + page_size - 2) // page_size + 1  # As many are touched at the most.
  touched_BT = starts_B[:, None] // page_size + jnp.arange(num_pages)
  # Which token comes into each slot of these pages: [B, T, page].
  token = touched_BT[..., None] * page_size + jnp.arange(page_size) - starts_B[:, None, None]
  is_new = (token >= 0) & (token < counts_B[:, None, None])
  pages_BT = jnp.take_along_axis(table_BP, touched_BT, 1, mode='clip')
  at = jnp.arange(leaf.shape[0])[:, None, None], jnp.where(is_new.any(-1), pages_BT, nobody)
  rows = jnp.arange(len(starts_B))[:, None, None]
  new = new_BSK2[rows, jnp.clip(token, 0, num_new - 1)]  # [B, T, page, K, 2, …]
  new = new.transpose(3, 0, 1, 4, 2, *range(5, new.ndim))
  is_new = is_new[:, :, None].reshape(*is_new.shape[:2], 1, page_size, *[1] * (leaf.ndim - 4))
  return leaf.at[at].set(jnp.where(is_new, new, leaf[at]))
