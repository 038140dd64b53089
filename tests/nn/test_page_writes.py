"""Pages hold what single tokens written one after another leave, however they are written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.nn.page_writes import write_pages, write_tokens

NOBODY, PAGE = 0, 4


def one_after_another(leaf, table, starts, counts, new):
  leaf = np.array(leaf)
  for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
    for s in range(count):
      page, slot = table[row][(start + s) // PAGE], (start + s) % PAGE
      leaf[:, page, :, slot] = new[row, s]
  return leaf


@pytest.mark.parametrize('tail', [(), (3,)], ids=['scales', 'keys and values'])
@pytest.mark.parametrize('num_new', [1, 2, 9])
@pytest.mark.parametrize('write', [write_pages, write_tokens])
def test_pages_hold_what_tokens_one_by_one_leave(write, num_new, tail):
  draw = np.random.default_rng(num_new)
  rows, heads, table_len, pool = 5, 2, 4, 24
  leaf = draw.normal(size=(heads, pool, 2, PAGE, *tail)).astype(np.float32)
  table = (1 + draw.permutation(pool - 1)[:rows * table_len]).reshape(rows, table_len)
  # From the middle of a page, to the end of the table, over a whole page, and two idle rows.
  starts = np.array([3, table_len * PAGE - num_new, 4, 0, 15])
  counts = np.array([num_new, num_new, max(1, num_new - 1), 0, 0])
  new = draw.normal(size=(rows, num_new, heads, 2, *tail)).astype(np.float32)
  found = jax.jit(write)(leaf, *(jnp.asarray(x, jnp.int32) for x in (table, starts, counts)),
                               new, NOBODY)
  expected = one_after_another(leaf, table, starts, counts, new)
  np.testing.assert_array_equal(found[:, 1:], expected[:, 1:])
