"""Pages, documents and slots: who may begin, and what makes room for it.

Everything here is small arrays: no turn of these loops touches the pool of pages. The pages that
are to be copied for documents and requests which have just begun are named by `copies`.
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_pt.models.paged_cache import NOBODY
from jaxrl_pt.sampling.requests import NO_DOCUMENT, Queue, Shape, cached_len, pages_of
from jaxrl_pt.types import Array

IDLE = -1
ABSENT, FILLING, FILLED = range(3)  # values of Places.state


@struct.dataclass
class Places:
  """Which pages, lanes and slots are whose."""

  holders: Array  # i32[N] how many slots and documents hold each page
  # Documents.
  pages: Array  # i32[D, P] pages of each document
  state: Array  # i32[D] ABSENT, FILLING or FILLED
  content: Array  # i32[D] the `Documents.content` of what is kept
  served: Array  # i32[D] requests that ever named this row and have begun
  stamp: Array  # i32[D] when the document was last used
  lane: Array  # i32[A] the document that each lane fills, or IDLE
  filled: Array  # i32[A] tokens of it that are cached
  parent_page: Array  # i32[A] page whose copy the document goes on in; NOBODY where copied
  # Slots.
  table: Array  # i32[B, P] pages of each slot's sequence
  row: Array  # i32[B] request of each slot, or IDLE
  is_fresh: Array  # bool[B] waits until its document is filled and its first page copied
  head: Array  # i32[] requests that have begun since the state was made
  turns: Array  # i32[] turns of the program since the state was made


def init(shape: Shape) -> Places:
  """All idle."""
  ints = lambda *dims: jnp.zeros(dims, jnp.int32)
  docs, slots, lanes = shape.documents, shape.slots, shape.lanes
  return Places(
      ints(shape.num_pages).at[NOBODY].set(1), ints(docs, shape.table_len), ints(docs), ints(docs),
      ints(docs), ints(docs), ints(lanes) + IDLE, ints(lanes), ints(lanes),
      ints(slots, shape.table_len), ints(slots) + IDLE, jnp.zeros(slots, bool), ints(), ints())


def is_waiting(queue: Queue, places: Places) -> Array:
  """bool[]: a request has not begun."""
  return places.head < queue.tail


def active(places: Places) -> Array:
  """bool[B]: the slots whose sequence can be extended."""
  return (places.row != IDLE) & ~places.is_fresh


def take(shape: Shape, holders: Array, first: Array, end: Array) -> tuple[Array, Array]:
  """Takes free pages for the entries first … end − 1 of a new page table.

  Returns:
    The holders i32[N] with those of the taken pages, and the table i32[P].
  """
  entries = jnp.arange(shape.table_len)
  free = jnp.nonzero(holders == 0, size=shape.table_len, fill_value=NOBODY)[0]
  wanted = (entries >= first) & (entries < end)
  table = jnp.where(wanted, free[jnp.maximum(entries - first, 0)], NOBODY)
  return holders.at[table].add(wanted.astype(jnp.int32)), table


def release(holders: Array, tables: Array, given_up: Array) -> tuple[Array, Array]:
  """Gives up the holds of some page tables, or of some entries of them.

  Args:
    holders: i32[N].
    tables: i32[..., P].
    given_up: bool, broadcast to the tables.

  Returns:
    The holders, and the tables without these entries.
  """
  held = given_up & (tables != NOBODY)
  return (holders.at[tables].add(-held.astype(jnp.int32)),
          jnp.where(held, NOBODY, tables))


def forget(queue: Queue, places: Places) -> Places:
  """Gives up documents whose rows hold others now; no request that has not ended names them."""
  is_old = (places.content != queue.documents.content) & (places.state == FILLED)
  holders, pages = release(places.holders, places.pages, is_old[:, None])
  return dataclasses.replace(places, holders=holders, pages=pages,
                             state=jnp.where(is_old, ABSENT, places.state),
                             content=queue.documents.content)


def all_begun(shape: Shape, queue: Queue, places: Places) -> Places:
  """All documents filled and all requests seated, where there is a slot and room for every one.

  The documents take the first pages and the requests, in their order, the next ones.
  """
  size, entries = shape.page_size, jnp.arange(shape.table_len)
  num_pages = pages_of(queue.documents.lengths, size)
  most = pages_of(shape.document_len, size)
  first = 1 + most * jnp.arange(shape.documents)
  pages = jnp.where(entries < num_pages[:, None], first[:, None] + entries, NOBODY)
  rows = queue.rows
  full = (rows.prefix // size)[:, None]
  end = pages_of(cached_len(rows), size)[:, None]
  first = 1 + most * shape.documents + own_pages(shape) * jnp.arange(shape.queue)[:, None]
  own = jnp.where(entries < end, first + entries - full, NOBODY)
  table = jnp.where(entries < full, pages[rows.document], own)
  count = lambda table: (table != NOBODY).astype(jnp.int32)
  holders = places.holders.at[pages].add(count(pages)).at[table].add(count(table))
  return dataclasses.replace(
      places, holders=holders, pages=pages, state=jnp.full_like(places.state, FILLED), table=table,
      row=jnp.arange(shape.slots), is_fresh=jnp.ones_like(places.is_fresh), head=queue.tail)


def own_pages(shape: Shape) -> int:
  """The largest number of pages of a response: the first may begin with tokens of its document."""
  return pages_of(shape.most_fed, shape.page_size) + 1


# --- Who may begin --------------------------------------------------------------------


@struct.dataclass
class _Next:
  """What the next request in order needs, and which of the four things can be done for it."""

  row: Array  # i32[]
  document: Array  # i32[]
  shared: Array  # i32[] tokens whose pages the document would take over from its parent
  drops: Array  # bool[] the request was cancelled
  fills: Array  # bool[] its document can begin to be filled
  seats: Array  # bool[] it can take a slot
  evicts: Array  # bool[] another document can make room for it
  evicted: Array  # i32[] that document


def _look(shape: Shape, queue: Queue, places: Places) -> _Next:
  waiting, requests = is_waiting(queue, places), queue.rows
  row = queue.order[places.head % queue.order.shape[0]]
  document = requests.document[row]
  drops = waiting & requests.cancelled[row]
  waiting = waiting & ~drops
  is_absent = places.state[document] == ABSENT
  parent = queue.documents.parents[document]
  # A parent that is being filled will soon have pages to share.
  has_parent = (parent != NO_DOCUMENT) & (places.state[parent] != ABSENT)
  ready = ~has_parent | (places.state[parent] == FILLED)
  shared = jnp.where(has_parent, queue.documents.shared[document], 0)
  size = shape.page_size
  needed = jnp.where(is_absent,
                     pages_of(queue.documents.lengths[document], size) - shared // size,
                     pages_of(cached_len(requests, row), size) - requests.prefix[row] // size)
  has_pages = (places.holders == 0).sum() >= needed
  has_place = jnp.where(is_absent, (places.lane == IDLE).any() & ready,
                        (places.row == IDLE).any())
  goes_on = waiting & has_place & has_pages

  # A document that slots still wait for stays, and so does the one that is asked for.
  slot_rows = jnp.where(places.is_fresh, queue.rows.document[jnp.maximum(places.row, 0)],
                        shape.documents)
  is_needed = jnp.zeros(shape.documents, bool).at[slot_rows].set(True, mode='drop')
  is_needed = is_needed.at[document].set(True)
  is_needed |= has_parent & (jnp.arange(shape.documents) == parent)
  is_promised = queue.documents.asked > places.served
  nothing_runs = (places.row == IDLE).all() & (places.lane == IDLE).all()
  can_go = (places.state == FILLED) & ~is_needed & (~is_promised | nothing_runs)
  age = jnp.where(can_go, places.stamp + is_promised * (jnp.iinfo(jnp.int32).max // 2),
                  jnp.iinfo(jnp.int32).max)
  return _Next(row, document, shared, drops, goes_on & is_absent, goes_on & ~is_absent,
               waiting & has_place & ~has_pages & can_go.any(), jnp.argmin(age))


def admit(shape: Shape, queue: Queue, places: Places) -> Places:
  """Begins what can begin: documents take lanes, requests take slots, old documents make room."""
  def turn(carry: tuple[Array, Places]) -> tuple[Array, Places]:
    _, places = carry
    ahead = _look(shape, queue, places)
    places = _evict(places, ahead)
    places = _fill(shape, queue, places, ahead)
    places = _seat(shape, queue, places, ahead)
    goes_on = ahead.drops | ahead.fills | ahead.seats | ahead.evicts
    return goes_on & is_waiting(queue, places), places

  return jax.lax.while_loop(lambda c: c[0], turn, (is_waiting(queue, places), places))[1]


def _evict(places: Places, ahead: _Next) -> Places:
  which = (jnp.arange(places.state.shape[0]) == ahead.evicted) & ahead.evicts
  holders, pages = release(places.holders, places.pages, which[:, None])
  return dataclasses.replace(places, holders=holders, pages=pages,
                             state=jnp.where(which, ABSENT, places.state))


def _fill(shape: Shape, queue: Queue, places: Places, ahead: _Next) -> Places:
  """A lane takes the document, which shares its parent's full pages and copies the next one."""
  document, size = ahead.document, shape.page_size
  full = ahead.shared // size
  end = jnp.where(ahead.fills, pages_of(queue.documents.lengths[document], size), 0)
  holders, own = take(shape, places.holders, full, end)
  of_parent = places.pages[queue.documents.parents[document]]
  is_shared = (jnp.arange(shape.table_len) < full) & ahead.fills
  holders = holders.at[of_parent].add(is_shared.astype(jnp.int32))
  lane = jnp.where(ahead.fills, jnp.argmax(places.lane == IDLE), shape.lanes)
  put = lambda x, value: x.at[lane].set(value, mode='drop')
  document = jnp.where(ahead.fills, document, shape.documents)
  copied = jnp.where(ahead.shared % size > 0, of_parent[jnp.minimum(full, shape.table_len - 1)],
                     NOBODY)
  return dataclasses.replace(
      places, holders=holders, lane=put(places.lane, document),
      filled=put(places.filled, ahead.shared), parent_page=put(places.parent_page, copied),
      pages=places.pages.at[document].set(jnp.where(is_shared, of_parent, own), mode='drop'),
      state=places.state.at[document].set(FILLING, mode='drop'))


def _seat(shape: Shape, queue: Queue, places: Places, ahead: _Next) -> Places:
  """A slot takes the request, which shares the full pages of its document."""
  begins = ahead.seats | ahead.drops
  row, requests, size = ahead.row, queue.rows, shape.page_size
  full = requests.prefix[row] // size
  end = pages_of(cached_len(requests, row), size)
  holders, own = take(shape, places.holders, full, jnp.where(ahead.seats, end, 0))
  of_document = places.pages[ahead.document]
  is_shared = (jnp.arange(shape.table_len) < full) & ahead.seats
  holders = holders.at[of_document].add(is_shared.astype(jnp.int32))
  slot = jnp.where(ahead.seats, jnp.argmax(places.row == IDLE), shape.slots)
  put = lambda x, value: x.at[slot].set(value, mode='drop')
  return dataclasses.replace(
      places, holders=holders, table=put(places.table, jnp.where(is_shared, of_document, own)),
      row=put(places.row, row), is_fresh=put(places.is_fresh, True),
      served=places.served.at[ahead.document].add(begins.astype(jnp.int32)),
      stamp=places.stamp.at[ahead.document].set(
          jnp.where(begins, places.turns, places.stamp[ahead.document])),
      head=places.head + begins)


# --- Copies of pages that are shared in part ------------------------------------------


def copies(shape: Shape, queue: Queue, places: Places) -> tuple[Array, Array, Places]:
  """The pages to copy before anything goes on, and the places once that is done.

  Returns:
    sources i32[A + B] and targets i32[A + B], NOBODY where nothing is copied, and the places, whose
    slots with a filled document are no longer fresh.
  """
  size = shape.page_size

  def own_page(table: Array, tokens: Array) -> Array:
    entry = jnp.minimum(tokens // size, shape.table_len - 1)
    return jnp.take_along_axis(table, entry[:, None], 1)[:, 0]

  lane_page = own_page(places.pages[jnp.maximum(places.lane, 0)], places.filled)
  row = jnp.maximum(places.row, 0)
  document, prefix = queue.rows.document[row], queue.rows.prefix[row]
  is_ready = places.is_fresh & (places.state[document] == FILLED)
  only = lambda wanted, pages: jnp.where(wanted, pages, NOBODY)
  is_copied = is_ready & (prefix % size > 0)
  sources = (places.parent_page, only(is_copied, own_page(places.pages[document], prefix)))
  targets = (only(places.parent_page != NOBODY, lane_page),
             only(is_copied, own_page(places.table, prefix)))
  places = dataclasses.replace(places, is_fresh=places.is_fresh & ~is_ready,
                               parent_page=jnp.zeros_like(places.parent_page))
  return jnp.concatenate(sources), jnp.concatenate(targets), places
