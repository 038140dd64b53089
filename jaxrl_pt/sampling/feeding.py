"""How tokens of each slot go through the model: densely, perhaps with drafts, or sparsely."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrl_pt.models import paged_cache
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import admission, drafting, resa, resa_attention
from jaxrl_pt.sampling.requests import Queue, Shape, Vocabulary, pages_of
from jaxrl_pt.sampling.state import Slots
from jaxrl_pt.types import Array, Params


class Fed(NamedTuple):
  """Tokens that have gone through the model: the newest of each slot, and drafts after it."""

  tokens: Array  # i32[B, J]
  counts: Array  # i32[B] tokens of each slot; 0 for an idle one
  hidden: Array  # f[B, J, D]
  selected: Any  # u32[L, B, K, W] the blocks that sparse attention has read, or ()


def feed(model: Model, shape: Shape, vocabulary: Vocabulary, params: Params, key: Array,
         queue: Queue, slots: Slots) -> tuple[Fed, Slots]:
  """Feeds the newest token of each slot, and drafts; of the slots, only what is cached changes.

  Args:
    model, shape, vocabulary, params, key, queue: as for `slots.advance`.
    slots: the state, whose admission is done.
  """
  places, decoding = slots.places, slots.decoding
  active = admission.active(places)
  if shape.sparse is not None:
    return _feed_sparsely(model, shape, params, queue, slots, active)
  tokens, counts = decoding.newest[:, None], active.astype(jnp.int32)
  if shape.drafts is not None:
    (tokens, counts), slots = drafting.draft(model, shape, vocabulary, params, key, queue, slots)
  # The keys and values of idle slots go to page NOBODY.
  attend = paged_cache.paged(model.ops, places.table, decoding.length, counts)
  if shape.beside and shape.slots > shape.documents:
    whole_pages = queue.rows.prefix // shape.page_size * shape.page_size
    of_documents = places.pages[:, :pages_of(shape.document_len, shape.page_size)]
    attend = paged_cache.paged_beside(model.ops, places.table, decoding.length, counts,
                                      of_documents, jnp.where(active, whole_pages, 0))
  hidden, cache = model.extend(
      params, tokens, decoding.length[:, None] + jnp.arange(tokens.shape[1]), slots.cache, attend)
  return Fed(tokens, counts, hidden, ()), dataclasses.replace(slots, cache=cache)


def _feed_sparsely(model: Model, shape: Shape, params: Params, queue: Queue, slots: Slots,
                   active: Array) -> tuple[Fed, Slots]:
  assert shape.sparse is not None
  places, decoding = slots.places, slots.decoding
  row = jnp.maximum(places.row, 0)
  in_prompt = slots.responses.count[row] == 0
  is_new = active & in_prompt & (decoding.fed == 0)
  cache = resa.cache_of(slots.sparse, slots.cache, places.table)
  cache = resa_attention.describe_rows(cache, is_new, decoding.length)
  fresh = jnp.where(is_new, 0, slots.sparse.fresh)
  if window := shape.sparse.window:
    # A window that ends before f tokens is not rectified, since nothing reads it again.
    starts = queue.rows.prefix[row] + queue.rows.num_tail[row]
    is_due = active & ~in_prompt & (decoding.length - starts - fresh >= window)
    counts = jnp.where(is_due, window, 0)
    at = jnp.minimum(fresh[:, None] + jnp.arange(window), shape.response_len - 1)
    cache = resa.rectify(model, params, cache, slots.responses.tokens[row[:, None], at],
                         starts + fresh, counts)
    fresh += counts
  hidden, cache = resa.decode(model, params, shape.sparse, cache, decoding.newest, decoding.length,
                              active, in_prompt)
  sparse = dataclasses.replace(slots.sparse, bounds=cache.bounds, fresh=fresh)
  fed = Fed(decoding.newest[:, None], active.astype(jnp.int32), hidden[:, None], cache.selected)
  return fed, dataclasses.replace(slots, cache=cache.pool, sparse=sparse)


def note_selection(sparse: resa.Sparse, row_B: Array, count_B: Array, selected: Any
                   ) -> resa.Sparse:
  """Writes down which blocks the next response token of each row is drawn from.

  Args:
    sparse: the state.
    row_B: i32[B] row of each slot's response; Q for none.
    count_B: i32[B] tokens of the response so far.
    selected: u32[L, B, K, W] from `feed`.
  """
  return dataclasses.replace(sparse, selected=sparse.selected.at[row_B, count_B].set(
      jnp.moveaxis(selected, 1, 0), mode='drop'))
