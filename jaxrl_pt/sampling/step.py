"""One decode step of the sampler's program: a token of each slot goes in, and the next is drawn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.models import paged_cache
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import admission, drafting
from jaxrl_pt.sampling.admission import FILLED, IDLE, Places
from jaxrl_pt.sampling.drawing import drawn, filtered
from jaxrl_pt.sampling.endings import ends_in, shift_in
from jaxrl_pt.sampling.feeding import Fed, feed, note_selection
from jaxrl_pt.sampling.requests import Queue, Requests, Shape, Vocabulary
from jaxrl_pt.sampling.state import (
  CANCELLED,
  LENGTH,
  MAY_THINK,
  NO_THOUGHT,
  RUNNING,
  STOP,
  STOP_STRING,
  Decoding,
  Slots,
)
from jaxrl_pt.types import Array, Params


def is_due(requests: Requests, places: Places) -> Array:
  """bool[]: some slot can be extended, or its request has been cancelled."""
  cancelled = requests.cancelled[jnp.maximum(places.row, 0)]
  return ((places.row != IDLE) & (~places.is_fresh | cancelled)).any()


def step(model: Model, shape: Shape, vocabulary: Vocabulary, params: Params, key: Array,
         version: Array | int, queue: Queue, slots: Slots) -> Slots:
  """Feeds the newest token of each slot, draws the next one, and ends the responses that are over.

  With drafts, several tokens are fed at once, and as many may be drawn.

  Args:
    model, shape, vocabulary, params, key, version, queue: as for `slots.advance`.
    slots: the state, whose admission is done.
  """
  places, before = slots.places, slots.decoding.length
  active = admission.active(places)
  asked = jax.tree.map(lambda x: x[jnp.maximum(places.row, 0)], queue.rows)
  fed, slots = feed(model, shape, vocabulary, params, key, queue, slots)
  draw_next = functools.partial(_draw_next, model, shape, vocabulary, params, key, version, queue,
                                asked, fed)
  slots, going, ended = draw_next(0, (slots, active, jnp.zeros_like(active)))
  if shape.drafts is not None:
    slots, _, ended = jax.lax.fori_loop(1, shape.num_fed, draw_next, (slots, going, ended))
  if isinstance(shape.drafts, cfg.SparseDrafts):
    slots = drafting.forget_wrong(slots, before, shape.num_fed)
  counters = dataclasses.replace(
      slots.counters, steps=slots.counters.steps + 1, busy=slots.counters.busy + active.sum(),
      drafted=slots.counters.drafted + jnp.maximum(fed.counts - 1, 0).sum(),
      agreed=slots.counters.agreed + jnp.maximum(slots.decoding.length - before - 1, 0).sum())
  slots = dataclasses.replace(slots, counters=counters)
  return _release(shape, slots, asked, ended | ((places.row != IDLE) & asked.cancelled))


def _draw_next(model: Model, shape: Shape, vocabulary: Vocabulary, params: Params, key: Array,
               version: Array | int, queue: Queue, asked: Requests, fed: Fed, j: Array | int,
               carry: tuple[Slots, Array, Array]) -> tuple[Slots, Array, Array]:
  """Draws the token after the j-th one that was fed.

  The carry is the slots; bool[B] which of them have drawn what was fed up to here; and bool[B]
  which responses have ended.
  """
  slots, going, ended = carry
  decoding, row = slots.decoding, jnp.maximum(slots.places.row, 0)
  slots = dataclasses.replace(
      slots, decoding=dataclasses.replace(decoding, length=decoding.length + going))
  logits = model.logits(params, fed.hidden[:, j])
  # Tokens of the tail are known, and belong to no response.
  in_tail = decoding.fed + 1 < asked.num_tail
  is_response = going & ~in_tail
  if not isinstance(fed.selected, tuple):
    drawing = is_response & ~asked.cancelled
    slots = dataclasses.replace(slots, sparse=note_selection(
        slots.sparse, jnp.where(drawing, row, shape.queue), slots.responses.count[row],
        fed.selected))
  likely = filtered(shape, vocabulary, queue, asked, logits)
  token, logp, is_drawn, slots = _choose(model, shape, vocabulary, key, asked, likely, slots,
                                         slots.responses.count[row], is_response)
  if shape.num_top:
    slots = _report_top(shape, slots, asked, jnp.where(is_response, row, shape.queue), likely)
  next_of_tail = jnp.take_along_axis(
      asked.tail, jnp.minimum(decoding.fed + 1, shape.tail_len - 1)[:, None], 1)[:, 0]
  slots, finish = _record(shape, slots, asked, row, is_response, token, logp, is_drawn,
                          vocabulary, version)
  newest = jnp.where(in_tail, next_of_tail, token)
  ended |= (finish != RUNNING) & is_response
  slots = dataclasses.replace(slots, decoding=dataclasses.replace(
      slots.decoding, newest=jnp.where(going, newest, decoding.newest),
      fed=decoding.fed + (going & in_tail)))
  following = fed.tokens[:, jnp.minimum(j + 1, fed.tokens.shape[1] - 1)]
  going &= ~ended & ~asked.cancelled & (j + 1 < fed.counts) & (newest == following)
  return slots, going, ended


def _report_top(shape: Shape, slots: Slots, asked: Requests, row: Array,
                filtered_BV: Array) -> Slots:
  """Notes the likeliest tokens of the slots that ask for them."""
  responses = slots.responses
  wants, count = asked.wants_top, responses.count[jnp.minimum(row, shape.queue - 1)]

  def likeliest() -> tuple[Array, Array]:
    logp, tokens = jax.lax.top_k(jax.nn.log_softmax(filtered_BV), shape.num_top)
    return logp, tokens

  nothing = lambda: (jnp.zeros((shape.slots, shape.num_top)),
                     jnp.zeros((shape.slots, shape.num_top), jnp.int32))
  logp, tokens = jax.lax.cond((wants & (row < shape.queue)).any(), likeliest, nothing)
  at = jnp.where(wants, row, shape.queue), count
  return dataclasses.replace(slots, responses=dataclasses.replace(
      responses, top_tokens=responses.top_tokens.at[at].set(tokens, mode='drop'),
      top_logp=responses.top_logp.at[at].set(logp, mode='drop')))


def _choose(model: Model, shape: Shape, vocabulary: Vocabulary, key: Array, asked: Requests,
            filtered_BV: Array, slots: Slots, count: Array, is_response: Array
            ) -> tuple[Array, Array, Array, Slots]:
  """Chooses the next token of each slot.

  Args:
    model, shape, vocabulary, key, asked, slots: as in `step`.
    filtered_BV: f32[B, V] from `drawing.filtered`.
    count: i32[B] tokens of each slot's response so far.
    is_response: bool[B] whether the next token belongs to a response.

  Returns:
    tokens i32[B], their log-probabilities f32[B] (where forced 0, or with `Shape.forced_logp` what
    they would have had), bool[B] whether they were drawn and not forced, and the slots with what
    has been forced of the end marker.
  """
  decoding = slots.decoding
  token, logp = drawn(model, key, asked, decoding.length, filtered_BV)

  is_forced = jnp.zeros(token.shape, bool)
  if shape.num_forced:
    is_forced = count < asked.num_forced
    forced = jnp.take_along_axis(
        asked.forced, jnp.minimum(count, shape.num_forced - 1)[:, None], -1)[:, 0]
    token = jnp.where(is_forced, forced, token)
    if shape.forced_logp:
      of_forced = jnp.take_along_axis(filtered_BV, forced[:, None], -1)[:, 0]
      logp = jnp.where(is_forced, of_forced - jax.nn.logsumexp(filtered_BV, -1), logp)
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
  return (token, logp if shape.forced_logp else jnp.where(is_forced, 0.0, logp), ~is_forced,
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
    decoding = _thinking(vocabulary, decoding, is_response, token, drawn, count)
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
              drawn: Array, count: Array) -> Decoding:
  """Counts the tokens of thought and answer, before which a response has `count` i32[B] tokens.

  A start marker that is drawn belongs to neither. What only began like one belongs to the answer.
  """
  recent = jnp.concatenate([decoding.recent[:, 1:], token[:, None]], 1)
  was_thinking = decoding.thought >= 0
  ended = (recent == jnp.array(vocabulary.think_end)).all(-1) & was_thinking
  only = lambda new, old: jnp.where(is_response.reshape(-1, *[1] * (old.ndim - 1)), new, old)
  thought = jnp.where(ended, NO_THOUGHT, decoding.thought + (was_thinking & drawn))
  answered = decoding.answered + ~was_thinking
  if vocabulary.think_start:
    marker = jnp.array(vocabulary.think_start, jnp.int32)
    may_think = decoding.thought == MAY_THINK
    goes_on = token == marker[jnp.minimum(count, len(marker) - 1)]
    begun = jnp.where(count + 1 == len(marker), 0, MAY_THINK)
    thought = jnp.where(may_think, jnp.where(goes_on, begun, NO_THOUGHT), thought)
    answered = jnp.where(may_think, jnp.where(goes_on, 0, count + 1), answered)
  return dataclasses.replace(
      decoding, recent=only(recent, decoding.recent), thought=only(thought, decoding.thought),
      closing=only(jnp.where(ended, -1, decoding.closing), decoding.closing),
      answered=only(answered, decoding.answered))


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
