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

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_pt.models import paged_cache
from jaxrl_pt.models.base import Model, for_a_loop
from jaxrl_pt.models.kv_cache import KVCache
from jaxrl_pt.sampling import admission
from jaxrl_pt.sampling.admission import FILLED, IDLE
from jaxrl_pt.sampling.requests import Documents, Queue, Requests, Shape, Vocabulary
from jaxrl_pt.sampling.state import CANCELLED, MAY_THINK, NO_THOUGHT, RUNNING, Slots
from jaxrl_pt.sampling.step import is_due, step
from jaxrl_pt.types import Array, Params


def has_work(queue: Queue, slots: Slots) -> Array:
  """bool[]: a request waits or a response is under way."""
  return (slots.places.row != IDLE).any() | admission.is_waiting(queue, slots.places)


def advance(model: Model, shape: Shape, vocabulary: Vocabulary, params: Params, key: Array,
            version: Array | int, queue: Queue, slots: Slots, max_turns: Array | int,
            wanted: Callable[[Slots], Array] | None = None) -> Slots:
  """Makes turns until there are `max_turns` of them or nothing is left to do.

  A turn feeds at most one token to each slot, and one chunk to each lane.

  Args:
    model, params: the policy.
    shape, vocabulary: sizes of the program, and what it must know of the tokenizer.
    key: the noise's key.
    version: the number that the tokens drawn here get in `Responses.version`.
    queue, slots: the requests, and the state that the last call left.
    max_turns: i32[].
    wanted: slots → bool[], False once the turns may stop although there is work; None for never.
  """
  begin, params = slots.places.turns, for_a_loop(params, model.config.num_layers)
  admit = functools.partial(_admit, shape, queue)
  prefill = functools.partial(_prefill, model, shape, params, queue.documents)
  one_step = functools.partial(step, model, shape, vocabulary, params, key, version, queue)

  def turn(slots: Slots) -> Slots:
    slots = admit(slots)
    with jax.named_scope(in_all(shape.most_chunks)):
      slots = _once(slots, (slots.places.lane != IDLE).any(), prefill)
    with jax.named_scope(in_all(shape.most_steps)):
      slots = _once(slots, is_due(queue.rows, slots.places), one_step)
    places = dataclasses.replace(slots.places, turns=slots.places.turns + 1)
    return dataclasses.replace(slots, places=places)

  slots = dataclasses.replace(slots, places=admission.forget(queue, slots.places))

  def goes_on(slots: Slots) -> Array:
    more = has_work(queue, slots) & (slots.places.turns - begin < max_turns)
    return more if wanted is None else more & wanted(slots)

  return jax.lax.while_loop(goes_on, turn, slots)


def in_all(times: int) -> str:
  """A name for a loop that runs so many times in all, however often the loop around it turns.

  Which of the two loops of a turn runs is not known when the program is compiled. `tpu.roofline`
  and `tpu.hlo` read the name.
  """
  return f'at_most_{times}_in_all'


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
        decoding, thought=new(_thought_at_start(requests, row), old.thought),
        closing=new(-1, old.closing), answered=new(0, old.answered), recent=new(-1, old.recent))
  if not isinstance(old.window, tuple):
    decoding = dataclasses.replace(decoding, window=new(0, old.window))
  slots = dataclasses.replace(slots, places=places, decoding=decoding)
  return _once(slots, places.head != before.head,
               functools.partial(_clear, shape, queue, before.head))


def _thought_at_start(requests: Requests, row: Array) -> Array:
  """i32[B]: `Decoding.thought` before the first token of each response."""
  begins = jnp.where(requests.begins_thinking[row], 0, MAY_THINK)
  return jnp.where(requests.max_thought[row] < 0, NO_THOUGHT, begins)


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
  params, shape = for_a_loop(params, model.config.num_layers), shape._replace(beside=True)
  places = admission.all_begun(shape, queue, slots.places)
  sources, targets, places = admission.copies(shape, queue, places)
  cache = paged_cache.write_rows(model.ops, slots.cache, places.pages, rows,
                                 queue.documents.lengths)
  decoding = dataclasses.replace(slots.decoding, length=queue.rows.prefix,
                                 newest=queue.rows.tail[:, 0])
  slots = dataclasses.replace(slots, places=places, decoding=decoding,
                              cache=paged_cache.copy_pages(cache, sources, targets))
  # Counted from the loop's beginning, so that `tpu.roofline` can read the largest number of steps.
  most = shape.most_fed
  one_step = functools.partial(step, model, shape, vocabulary, params, key, version, queue)
  return jax.lax.while_loop(
      lambda s: (s.places.row != IDLE).any() & (s.counters.steps < most), one_step, slots)
