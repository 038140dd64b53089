"""Rows that read their document's pages together equal rows that read them one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.nn import absmax, kv_quant
from jaxrl_pt.nn import paged_attention as paged

NUM_DOCS, NUM_ROWS, PAGE, PAGES_OF_DOC, OWN_PAGES, GROUPS, HEADS, WIDTH = 2, 8, 4, 5, 3, 2, 4, 8


# A document's rows at once, two by two, and one by one.
@pytest.mark.parametrize('num_new, num_parts', [(1, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize('kv', ['model', 'int8', 'int4'])
def test_it_equals_rows_that_read_all_their_pages(num_new, num_parts, kv, monkeypatch):
  monkeypatch.setattr(paged, 'DOCUMENT_PARTS', num_parts)
  for name in ('BLOCK', 'DOCUMENT_BLOCK'):  # Several turns of the loop in either part.
    monkeypatch.setattr(paged, name, 2 * PAGE)
  rng = np.random.default_rng(0)
  num_pages = 1 + NUM_DOCS * PAGES_OF_DOC + NUM_ROWS * OWN_PAGES
  pages = jnp.asarray(rng.normal(size=(GROUPS, num_pages, 2, PAGE, WIDTH)), jnp.float32)
  scales = None
  if kv == 'int8':
    pages, scales = absmax.quantise(pages, 8)
  if kv == 'int4':
    first, _ = absmax.quantise(pages[:, :, :, :1], 8)
    codes, scales = absmax.quantise(pages, 4)
    pages = kv_quant.PackedPages(absmax.pack(codes, 4), first, 4)
  numbers = rng.permutation(np.arange(1, num_pages))
  of_docs = numbers[:NUM_DOCS * PAGES_OF_DOC].reshape(NUM_DOCS, PAGES_OF_DOC)
  of_rows = numbers[NUM_DOCS * PAGES_OF_DOC:].reshape(NUM_ROWS, OWN_PAGES)
  # No page, some and all pages are shared; in two documents of four rows each.
  num_shared = np.array([0, 2, 5, 5, 1, 3, 0, 4])
  table = np.zeros((NUM_ROWS, PAGES_OF_DOC + OWN_PAGES), np.int32)
  for row, shared in enumerate(num_shared):
    table[row, :shared] = of_docs[row // 4, :shared]
    table[row, shared:shared + OWN_PAGES] = of_rows[row]
  starts = jnp.asarray(num_shared * PAGE + np.array([0, 1, 4, 7, 8, 2, 3, 5]))
  q = jnp.asarray(rng.normal(size=(NUM_ROWS, num_new, HEADS, WIDTH)), jnp.float32)
  arguments = q, pages, scales, jnp.asarray(table), starts, jnp.full(NUM_ROWS, num_new)
  apart = paged.paged_attention(*arguments)
  beside = jax.jit(paged.paged_attention_beside)(
      *arguments, jnp.asarray(of_docs), jnp.asarray(num_shared * PAGE))
  np.testing.assert_allclose(beside, apart, rtol=2e-5, atol=2e-6)
