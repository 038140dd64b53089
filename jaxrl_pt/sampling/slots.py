"""The sampler's program on the device: slots that decode, and a queue that refills them.

    while a slot, a lane or the queue has work:
      admit:    documents that are asked for take lanes, requests take slots, both as soon as enough
                pages are free; documents that nobody waits for make room
      prefill:  the next tokens of the documents in the lanes go through the model
      step:     one token of each slot goes through the model, and the next one is drawn; responses
                that have ended give their slots and pages back

A request is a row of `Requests`, and its response a row of `Responses`. Slots are refilled one by
one, so that no response waits for the longest one of a batch. The noise of a token is addressed by
(key, prompt id, sample, position) and not by slot, batch or time.
"""

import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_pt.models import paged_cache
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.kv_cache import KVCache
from jaxrl_pt.sampling import admission
from jaxrl_pt.sampling.admission import FILLED, IDLE, Places
from jaxrl_pt.sampling.endings import ends_in, shift_in
from jaxrl_pt.sampling.policies import RowSamplers, draw, filtered_logits, filtered_rows
from jaxrl_pt.sampling.requests import Documents, Queue, Requests, Shape, Vocabulary
from jaxrl_pt.types import Array, Params

RUNNING, STOP, LENGTH, STOP_STRING, CANCELLED = range(5)  # values of Responses.finish


@struct.dataclass
class Responses:
  """The responses, with rows like those of `Requests`. Entries from `count` on are garbage."""

  tokens: Array  # i32[Q, S]
  sampled: Array  # f32[Q, S] 1 where a token was drawn, 0 where it was forced
  logp: Array  # f32[Q, S] under the distribution that was drawn from; 0 where forced
  version: Array  # i32[Q, S] version of the parameters that each token was drawn by
  count: Array  # i32[Q] tokens
  finish: Array  # i32[Q] RUNNING, or why the response has ended


@struct.dataclass
class Decoding:
  """How far the sequence of each slot is."""

  length: Array  # i32[B] tokens of the sequence that are cached
  newest: Array  # i32[B] the token that goes through the model next
  fed: Array  # i32[B] tokens of the tail before the newest one
  # Thinking; () where the vocabulary has no end marker.
  thought: Any = ()  # i32[B] tokens drawn since thinking began; −1 once it has ended
  closing: Any = ()  # i32[B] forced tokens of the end marker of thinking; −1 if it is not forced
  answered: Any = ()  # i32[B] tokens since thinking ended
  recent: Any = ()  # i32[B, M] newest tokens, M being the length of the end marker
  window: Any = ()  # u8[B, W + longest token] newest bytes; () where nobody has stop strings


@struct.dataclass
class Counters:
  """Sums since the state was made."""

  steps: Array  # i32[] decode steps
  busy: Array  # i32[] slots that were extended, summed over steps
  prefilled: Array  # i32[] tokens of documents that went through the model
  reused: Array  # i32[] tokens of documents that were found in the pages of their parents


@struct.dataclass
class Slots:
  """The program's state, which each call takes over from the call before."""

  cache: paged_cache.PagedCache
  places: Places
  decoding: Decoding
  responses: Responses
  counters: Counters


def init(model: Model, shape: Shape, vocabulary: Vocabulary, dtype: DTypeLike) -> Slots:
  """A state of idle slots and an empty cache, whose pages have type `dtype`."""
  slots, rows, length = shape.slots, shape.queue, shape.response_len
  ints = lambda *dims: jnp.zeros(dims, jnp.int32)
  floats = lambda *dims: jnp.zeros(dims, jnp.float32)
  decoding = Decoding(ints(slots), ints(slots), ints(slots))
  if vocabulary.think_end:
    decoding = dataclasses.replace(
        decoding, thought=ints(slots) - 1, closing=ints(slots) - 1, answered=ints(slots),
        recent=ints(slots, len(vocabulary.think_end)) - 1)
  if shape.num_strings:
    assert vocabulary.spelled is not None
    width = shape.string_len + vocabulary.spelled.bytes.shape[1]
    decoding = dataclasses.replace(decoding, window=jnp.zeros((slots, width), jnp.uint8))
  return Slots(
      model.init_pages(shape.num_pages, shape.page_size, dtype),
      admission.init(shape), decoding,
      Responses(ints(rows, length), floats(rows, length), floats(rows, length), ints(rows, length),
                ints(rows), ints(rows)),
      Counters(ints(), ints(), ints(), ints()))


def has_work(queue: Queue, slots: Slots) -> Array:
  """bool[]: a request waits or a response is under way."""
  return (slots.places.row != IDLE).any() | admission.is_waiting(queue, slots.places)


def advance(model: Model, shape: Shape, vocabulary: Vocabulary, params: Params, key: Array,
            version: Array | int, queue: Queue, slots: Slots, max_turns: Array | int) -> Slots:
  """Makes turns until there are `max_turns` of them or nothing is left to do.

  A turn feeds at most one token to each slot, and one chunk to each lane.
  """
  begin = slots.places.turns
  admit = functools.partial(_admit, shape, queue)
  prefill = functools.partial(_prefill, model, shape, params, queue.documents)
  step = functools.partial(_step, model, shape, vocabulary, params, key, version, queue.rows)

  def turn(slots: Slots) -> Slots:
    slots = admit(slots)
    slots = _once(slots, (slots.places.lane != IDLE).any(), prefill)
    slots = _once(slots, _steps(queue.rows, slots.places), step)
    places = dataclasses.replace(slots.places, turns=slots.places.turns + 1)
    return dataclasses.replace(slots, places=places)

  slots = dataclasses.replace(slots, places=admission.forget(queue, slots.places))
  return jax.lax.while_loop(
      lambda s: has_work(queue, s) & (s.places.turns - begin < max_turns), turn, slots)


def _once(slots: Slots, condition: Array, change: Any) -> Slots:
  """`change(slots)` if the condition holds, else the slots.

  This is a loop of at most one turn. XLA would copy the whole pool into the branches of `lax.cond`.
  """
  return jax.lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros((), bool), change(c[1])),
                            (condition, slots))[1]


# --- Admission and prefill ------------------------------------------------------------


def _admit(shape: Shape, queue: Queue, slots: Slots) -> Slots:
  """Admits documents and requests, copies the pages that they share in part, clears their rows."""
  before = slots.places
  places = admission.admit(shape, queue, before)
  begun = (before.lane == IDLE) & (places.lane != IDLE)
  reused = slots.counters.reused + jnp.where(begun, places.filled, 0).sum()
  is_new = (before.row == IDLE) & (places.row != IDLE)
  requests, row = queue.rows, jnp.maximum(places.row, 0)
  sources, targets, places = admission.copies(shape, queue, places)

  def copy(slots: Slots) -> Slots:
    return dataclasses.replace(
        slots, cache=paged_cache.copy_pages(slots.cache, sources, targets))

  slots = _once(slots, (targets != paged_cache.NOBODY).any(), copy)
  new = lambda value, old: jnp.where(is_new.reshape(-1, *[1] * (old.ndim - 1)), value, old)
  old = slots.decoding
  decoding = dataclasses.replace(
      old, length=new(requests.prefix[row], old.length),
      newest=new(requests.tail[row, 0], old.newest), fed=new(0, old.fed))
  if not isinstance(old.thought, tuple):
    decoding = dataclasses.replace(
        decoding, thought=new(jnp.where(requests.max_thought[row] < 0, -1, 0), old.thought),
        closing=new(-1, old.closing), answered=new(0, old.answered), recent=new(-1, old.recent))
  if not isinstance(old.window, tuple):
    decoding = dataclasses.replace(decoding, window=new(0, old.window))
  slots = dataclasses.replace(
      slots, places=places, decoding=decoding,
      counters=dataclasses.replace(slots.counters, reused=reused))
  return _once(slots, places.head != before.head,
               functools.partial(_clear, shape, queue, before.head))


def _clear(shape: Shape, queue: Queue, head: Array, slots: Slots) -> Slots:
  """Empties the responses to the requests that have begun since the queue's head was `head`."""
  serial = jnp.arange(shape.queue)
  begun = jnp.where(serial < slots.places.head - head,
                    queue.order[(head + serial) % shape.queue], shape.queue)
  cancelled = queue.rows.cancelled.at[begun].get(mode='fill', fill_value=False)
  responses = slots.responses
  responses = dataclasses.replace(
      responses, count=responses.count.at[begun].set(0, mode='drop'),
      finish=responses.finish.at[begun].set(jnp.where(cancelled, CANCELLED, RUNNING),
                                            mode='drop'))
  return dataclasses.replace(slots, responses=responses)


def _prefill(model: Model, shape: Shape, params: Params, documents: Documents,
             slots: Slots) -> Slots:
  """Runs the next chunk of each lane's document through the model."""
  places = slots.places
  is_busy, document = places.lane != IDLE, jnp.maximum(places.lane, 0)
  lengths = documents.lengths[document]
  counts = jnp.where(is_busy, jnp.clip(lengths - places.filled, 0, shape.chunk), 0)
  positions = places.filled[:, None] + jnp.arange(shape.chunk)
  tokens = documents.tokens[document[:, None],
                            jnp.minimum(positions, documents.tokens.shape[1] - 1)]
  _, cache = model.extend(
      params, tokens, positions, slots.cache,
      paged_cache.paged(model.ops, places.pages[document], places.filled, counts))
  filled = places.filled + counts
  is_done = is_busy & (filled >= lengths)
  places = dataclasses.replace(
      places, filled=filled, lane=jnp.where(is_done, IDLE, places.lane),
      state=places.state.at[jnp.where(is_done, document, shape.documents)].set(
          FILLED, mode='drop'))
  counters = dataclasses.replace(slots.counters, prefilled=slots.counters.prefilled + counts.sum())
  return dataclasses.replace(slots, cache=cache, places=places, counters=counters)


# --- As many slots as requests --------------------------------------------------------


def draw_all(model: Model, shape: Shape, vocabulary: Vocabulary, params: Params, key: Array,
             version: Array | int, queue: Queue, slots: Slots, rows: KVCache) -> Slots:
  """What `advance` comes to where each request has a slot from the first turn on.

  Nothing is admitted on the way, and the documents have gone through the model elsewhere.

  Args:
    model, shape, vocabulary, params, key, version, queue: as for `advance`; there are as many slots
      as requests, and pages for all documents and requests.
    slots: from `init`.
    rows: f[L, D, K, T, E] keys and values of the documents' tokens.
  """
  places = admission.all_begun(shape, queue, slots.places)
  sources, targets, places = admission.copies(shape, queue, places)
  cache = paged_cache.write_rows(slots.cache, places.pages, rows, queue.documents.lengths)
  decoding = dataclasses.replace(slots.decoding, length=queue.rows.prefix,
                                 newest=queue.rows.tail[:, 0])
  slots = dataclasses.replace(slots, places=places, decoding=decoding,
                              cache=paged_cache.copy_pages(cache, sources, targets))
  # Counted from the loop's beginning, so that `tpu.roofline` can read the largest number of steps.
  most = shape.tail_len + shape.response_len - 1
  step = functools.partial(_step, model, shape, vocabulary, params, key, version, queue.rows)
  return jax.lax.while_loop(
      lambda s: (s.places.row != IDLE).any() & (s.counters.steps < most), step, slots)


# --- One step -------------------------------------------------------------------------


def _steps(requests: Requests, places: Places) -> Array:
  """bool[]: some slot can be extended, or its request has been cancelled."""
  cancelled = requests.cancelled[jnp.maximum(places.row, 0)]
  return ((places.row != IDLE) & (~places.is_fresh | cancelled)).any()


def _step(model: Model, shape: Shape, vocabulary: Vocabulary, params: Params, key: Array,
          version: Array | int, requests: Requests, slots: Slots) -> Slots:
  places, decoding = slots.places, slots.decoding
  active = admission.active(places)
  row = jnp.maximum(places.row, 0)
  asked = jax.tree.map(lambda x: x[row], requests)
  # The keys and values of idle slots go to page NOBODY.
  hidden, cache = model.extend(
      params, decoding.newest[:, None], decoding.length[:, None], slots.cache,
      paged_cache.paged(model.ops, places.table, decoding.length, active.astype(jnp.int32)))
  length = decoding.length + active
  slots = dataclasses.replace(slots, cache=cache,
                              decoding=dataclasses.replace(decoding, length=length))
  logits = jnp.matmul(hidden[:, 0], model.head(params), preferred_element_type=jnp.float32)
  # Tokens of the tail are known, and belong to no response.
  in_tail = decoding.fed + 1 < asked.num_tail
  token, logp, drawn, slots = _choose(shape, vocabulary, key, asked, logits, slots,
                                      slots.responses.count[row], active & ~in_tail)
  next_of_tail = jnp.take_along_axis(
      asked.tail, jnp.minimum(decoding.fed + 1, shape.tail_len - 1)[:, None], 1)[:, 0]
  slots, finish = _record(shape, slots, asked, row, active & ~in_tail, token, logp, drawn,
                          vocabulary, version)
  newest = jnp.where(in_tail, next_of_tail, token)
  decoding = dataclasses.replace(
      slots.decoding, newest=jnp.where(active, newest, decoding.newest),
      fed=decoding.fed + (active & in_tail))
  ended = (places.row != IDLE) & (((finish != RUNNING) & active & ~in_tail) | asked.cancelled)
  counters = dataclasses.replace(slots.counters, steps=slots.counters.steps + 1,
                                 busy=slots.counters.busy + active.sum())
  slots = dataclasses.replace(slots, decoding=decoding, counters=counters)
  return _release(shape, slots, asked, ended)


def _choose(shape: Shape, vocabulary: Vocabulary, key: Array, asked: Requests, logits_BV: Array,
            slots: Slots, count: Array, is_response: Array
            ) -> tuple[Array, Array, Array, Slots]:
  """Chooses the next token of each slot.

  Args:
    shape, vocabulary, key, asked, slots: as in `_step`.
    logits_BV: f32[B, V].
    count: i32[B] tokens of each slot's response so far.
    is_response: bool[B] whether the next token belongs to a response.

  Returns:
    tokens i32[B], their log-probabilities f32[B] (0 where forced), bool[B] whether they were
    drawn and not forced, and the slots with what has been forced of the end marker.
  """
  decoding = slots.decoding
  if shape.sampler is None:
    assert isinstance(asked.samplers, RowSamplers) and vocabulary.is_token is not None
    filtered = filtered_rows(logits_BV, asked.samplers, vocabulary.is_token)
  else:
    filtered = filtered_logits(logits_BV, shape.sampler)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, asked.ids)
  keys = jax.vmap(jax.random.fold_in)(keys, asked.samples)
  token, logp = draw(jax.vmap(jax.random.fold_in)(keys, decoding.length), filtered)

  is_forced = jnp.zeros(token.shape, bool)
  if shape.num_forced:
    is_forced = count < asked.num_forced
    forced = jnp.take_along_axis(
        asked.forced, jnp.minimum(count, shape.num_forced - 1)[:, None], -1)[:, 0]
    token = jnp.where(is_forced, forced, token)
  if vocabulary.think_end:
    marker = jnp.array(vocabulary.think_end, jnp.int32)
    closing, thought = decoding.closing, decoding.thought
    out_of_thought = (thought >= asked.max_thought) & (thought >= 0) & ~is_forced
    closing = jnp.where(out_of_thought & (closing < 0), 0, closing)
    is_closing = (closing >= 0) & is_response
    token = jnp.where(is_closing, marker[jnp.clip(closing, 0, len(marker) - 1)], token)
    is_forced |= is_closing
    closing = jnp.where(is_closing, closing + 1, decoding.closing)
    decoding = dataclasses.replace(decoding, closing=closing)
  return (token, jnp.where(is_forced, 0.0, logp), ~is_forced,
          dataclasses.replace(slots, decoding=decoding))


def _record(shape: Shape, slots: Slots, asked: Requests, row: Array, is_response: Array,
            token: Array, logp: Array, drawn: Array, vocabulary: Vocabulary,
            version: Array | int) -> tuple[Slots, Array]:
  """Appends tokens to responses and counts thinking.

  Returns:
    The slots, and why each slot's response ends here: i32[B], RUNNING where it goes on.
  """
  responses, decoding = slots.responses, slots.decoding
  count, matched = responses.count[row], jnp.zeros(token.shape, bool)
  # A cancelled response gets no more tokens.
  row = jnp.where(is_response & ~asked.cancelled, row, shape.queue)
  put = lambda x, value: x.at[row, count].set(value, mode='drop')
  stops = (token[:, None] == asked.stop).any(-1) & drawn
  full = count + 1 >= asked.max_tokens
  if vocabulary.think_end:
    decoding = _thinking(vocabulary, decoding, is_response, token, drawn)
    full |= (asked.max_thought >= 0) & (decoding.answered >= asked.max_answer)
  if shape.num_strings:
    assert vocabulary.spelled is not None
    spelled, length = vocabulary.spelled.bytes[token], vocabulary.spelled.lengths[token]
    length = jnp.where(is_response, length, 0)
    decoding = dataclasses.replace(decoding, window=shift_in(decoding.window, spelled, length))
    matched = ends_in(decoding.window, asked.strings, asked.string_lens, length)
  finish = jnp.where(full, LENGTH, RUNNING)
  finish = jnp.where(matched & drawn, STOP_STRING, finish)
  finish = jnp.where(stops, STOP, finish)
  responses = dataclasses.replace(
      responses, tokens=put(responses.tokens, token), logp=put(responses.logp, logp),
      sampled=put(responses.sampled, drawn.astype(jnp.float32)),
      version=put(responses.version, version),
      count=responses.count.at[row].add(1, mode='drop'),
      finish=responses.finish.at[row].set(finish, mode='drop'))
  return dataclasses.replace(slots, responses=responses, decoding=decoding), finish


def _thinking(vocabulary: Vocabulary, decoding: Decoding, is_response: Array, token: Array,
              drawn: Array) -> Decoding:
  """Counts the tokens of thought and answer."""
  recent = jnp.concatenate([decoding.recent[:, 1:], token[:, None]], 1)
  was_thinking = decoding.thought >= 0
  ended = (recent == jnp.array(vocabulary.think_end)).all(-1) & was_thinking
  only = lambda new, old: jnp.where(is_response.reshape(-1, *[1] * (old.ndim - 1)), new, old)
  return dataclasses.replace(
      decoding, recent=only(recent, decoding.recent),
      thought=only(jnp.where(ended, -1, decoding.thought + (was_thinking & drawn)),
                   decoding.thought),
      closing=only(jnp.where(ended, -1, decoding.closing), decoding.closing),
      answered=only(decoding.answered + ~was_thinking, decoding.answered))


def _release(shape: Shape, slots: Slots, asked: Requests, ended: Array) -> Slots:
  """Makes slots idle. Their pages become a document where that is asked for, or are given up."""
  places, decoding = slots.places, slots.decoding
  cached = -(-decoding.length // shape.page_size)
  kept = ended & (asked.keep >= 0) & ~asked.cancelled
  goes_on = kept[:, None] & (jnp.arange(shape.table_len) < cached[:, None])
  kept_table = jnp.where(goes_on, places.table, paged_cache.NOBODY)
  holders, table = admission.release(places.holders, places.table, ended[:, None] & ~goes_on)
  into = jnp.where(kept, asked.keep, shape.documents)
  finish = slots.responses.finish.at[
      jnp.where(ended & asked.cancelled, places.row, shape.queue)].set(CANCELLED, mode='drop')
  places = dataclasses.replace(
      places, holders=holders, row=jnp.where(ended, IDLE, places.row),
      table=jnp.where(ended[:, None], paged_cache.NOBODY, table),
      is_fresh=places.is_fresh & ~ended,
      pages=places.pages.at[into].set(kept_table, mode='drop'),
      state=places.state.at[into].set(FILLED, mode='drop'),
      stamp=places.stamp.at[into].set(places.turns, mode='drop'))
  return dataclasses.replace(
      slots, places=places, decoding=dataclasses.replace(
          decoding, length=jnp.where(ended, 0, decoding.length)),
      responses=dataclasses.replace(slots.responses, finish=finish))
