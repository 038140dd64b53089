"""The engine's program on the device: slots that decode, and a queue that refills them.

    while a slot or the queue has work:
      admit:   an idle slot takes the next request as soon as enough pages are free; the first
               request of a prompt prefills it in chunks, and later ones share its pages
      draw:    one token for each slot, from the hidden state after its last token
      finish:  slots whose response has ended give their pages back
      extend:  one forward step over all slots

A request is a row of `Requests` and its response a row of `Slots`. Slots are refilled one by one,
so that no response waits for the longest one of a batch. The noise of a token is addressed by
(key, prompt id, sample, position) and not by slot, batch or time.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_pt.models import paged_cache
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling.policies import RowSamplers, draw, filtered_rows
from jaxrl_pt.token_bytes import TokenBytes
from jaxrl_pt.types import Array, Params

IDLE = -1
RUNNING, STOP, LENGTH, STOP_STRING, CANCELLED = range(5)  # values of Slots.finish


class Shape(NamedTuple):
  """Every size of the program, which is compiled once for them."""

  slots: int  # B
  page_size: int  # tokens
  num_pages: int  # N, page 0 included
  queue: int  # Q, the rows of requests
  prompt_len: int  # T, the largest number of tokens of a prompt
  response_len: int  # S, the largest number of tokens of a response
  prefill_chunk: int  # tokens of a prompt that go through the model at once
  num_stop: int  # Z, the largest number of stop tokens of a request
  num_forced: int  # F, the largest number of forced tokens of a response
  num_strings: int  # X, the largest number of stop strings of a request
  string_len: int  # W, the largest number of bytes of a stop string
  num_banned: int  # the largest number of banned tokens of a request
  vocab_size: int

  @property
  def table_len(self) -> int:
    """P, the pages of the longest sequence."""
    return -(-(self.prompt_len + self.response_len) // self.page_size)


@struct.dataclass
class Requests:
  """The requests, one row for each response. Only the host writes them."""

  tokens: Array  # i32[Q, T] prompts, right-padded
  lengths: Array  # i32[Q]
  ids: Array  # i32[Q] the prompt's id, which addresses the randomness
  samples: Array  # i32[Q] number of the sample of the prompt, which addresses the randomness
  prompts: Array  # i32[Q] equal where consecutive requests have the same prompt
  max_tokens: Array  # i32[Q] forced tokens included
  max_thought: Array  # i32[Q] drawn tokens before the end of thinking is forced; < 0: no thinking
  max_answer: Array  # i32[Q] tokens after the end of thinking
  forced: Array  # i32[Q, F] tokens that the response starts with
  num_forced: Array  # i32[Q]
  stop: Array  # i32[Q, Z] stop tokens, padded with −1
  strings: Array  # u8[Q, X, W] stop strings, right-aligned
  string_lens: Array  # i32[Q, X] bytes, padded with 0
  samplers: RowSamplers
  cancelled: Array  # bool[Q]


@struct.dataclass
class Queue:
  """The requests in order of arrival. Only the host writes them."""

  rows: Requests
  order: Array  # i32[Q] ring of row numbers
  tail: Array  # i32[] requests queued since the engine was made


@struct.dataclass
class Slots:
  """The device's state, which each call of the program takes over from the call before."""

  cache: paged_cache.PagedCache
  holders: Array  # i32[N] how many slots and prompts hold each page
  table: Array  # i32[B, P] pages of each slot's sequence
  row: Array  # i32[B] request of each slot, or IDLE
  length: Array  # i32[B] tokens of the slot's sequence
  hidden: Array  # f[B, D] hidden state that the next token is drawn from
  thought: Array  # i32[B] tokens drawn since thinking began; −1 once it has ended
  closing: Array  # i32[B] forced tokens of the end marker of thinking; −1 if it is not forced
  answered: Array  # i32[B] tokens since thinking ended
  recent: Array  # i32[B, M] newest tokens, M being the length of the end marker
  window: Array  # u8[B, W + longest token] newest bytes
  # The newest prefilled prompt, which the next requests may share.
  prompt: Array  # i32[] its `Requests.prompts`; −1 where there is none
  prompt_table: Array  # i32[P] its pages
  prompt_hidden: Array  # f[D] hidden state of its last token
  head: Array  # i32[] requests admitted since the engine was made
  # The responses, with rows like those of `Requests`.
  tokens: Array  # i32[Q, S]
  sampled: Array  # f32[Q, S] 1 where a token was drawn, 0 where it was forced
  logp: Array  # f32[Q, S] under the distribution that was drawn from; 0 where forced
  count: Array  # i32[Q] tokens
  finish: Array  # i32[Q] RUNNING, or why the response has ended
  # Counters since the engine was made.
  steps: Array  # i32[] decode steps
  busy: Array  # i32[] slots that drew a token, summed over steps
  prefilled: Array  # i32[] prompt tokens that went through the model


class Vocabulary(NamedTuple):
  """What the program must know of the tokenizer."""

  think_end: tuple[int, ...]  # tokens of the end marker of thinking; () where there is none
  spelled: TokenBytes  # the bytes of each token
  is_token: Array  # bool[V] False for ids that no token has and that are never drawn


def init(model: Model, shape: Shape, vocabulary: Vocabulary, dtype: Any) -> Slots:
  """A state of idle slots and an empty cache, whose pages have type `dtype`."""
  slots, rows, width = shape.slots, shape.queue, model.config.d_model
  ints = lambda *dims: jnp.zeros(dims, jnp.int32)
  floats = lambda *dims: jnp.zeros(dims, jnp.float32)
  state = jnp.dtype(model.init_cache(1, 1).k.dtype)
  window = shape.string_len + vocabulary.spelled.bytes.shape[1]
  return Slots(
      paged_cache.init(model.config, shape.num_pages, shape.page_size, dtype),
      ints(shape.num_pages).at[paged_cache.NOBODY].set(1), ints(slots, shape.table_len),
      jnp.full(slots, IDLE), ints(slots), jnp.zeros((slots, width), state), ints(slots) - 1,
      ints(slots) - 1, ints(slots), ints(slots, max(1, len(vocabulary.think_end))) - 1,
      jnp.zeros((slots, window), jnp.uint8), ints() - 1, ints(shape.table_len),
      jnp.zeros(width, state), ints(), ints(rows, shape.response_len),
      floats(rows, shape.response_len), floats(rows, shape.response_len), ints(rows), ints(rows),
      ints(), ints(), ints())


def advance(model: Model, shape: Shape, vocabulary: Vocabulary, params: Params, key: Array,
            queue: Queue, slots: Slots, max_steps: Array) -> Slots:
  """Makes decode steps until there are `max_steps` of them or nothing is left to do."""
  step = functools.partial(_step, model, vocabulary, params, key, queue.rows)
  admit = functools.partial(_admit, model, shape, params, queue)
  end = slots.steps + max_steps

  def has_work(slots: Slots) -> Array:
    return (slots.row != IDLE).any() | (slots.head < queue.tail)

  def body(slots: Slots) -> Slots:
    slots = jax.lax.while_loop(functools.partial(_admissible, shape, queue), admit, slots)
    return step(slots)

  return jax.lax.while_loop(lambda s: has_work(s) & (s.steps < end), body, slots)


# --- Admission ------------------------------------------------------------------------


def _next_row(queue: Queue, slots: Slots) -> Array:
  return queue.order[slots.head % queue.order.shape[0]]


def _pages(shape: Shape, num_tokens: Array) -> Array:
  return -(-num_tokens // shape.page_size)


def _admissible(shape: Shape, queue: Queue, slots: Slots) -> Array:
  """bool[]: a request waits, a slot is idle, and enough pages are free."""
  row, requests = _next_row(queue, slots), queue.rows
  is_new = requests.prompts[row] != slots.prompt
  prompt_pages = _pages(shape, requests.lengths[row])
  own_pages = _pages(shape, requests.lengths[row] + requests.max_tokens[row])
  own_pages -= requests.lengths[row] // shape.page_size  # The prompt's full pages are shared.
  # A new prompt replaces the one that is kept for sharing, and pages that no slot holds get free.
  kept_alone = (slots.holders[slots.prompt_table] == 1) & (slots.prompt_table != 0)
  free = (slots.holders == 0).sum() + jnp.where(is_new, kept_alone.sum(), 0)
  needed = own_pages + jnp.where(is_new, prompt_pages, 0)
  waiting = slots.head < queue.tail
  return waiting & (slots.row == IDLE).any() & (free >= needed)


def _take_pages(shape: Shape, holders: Array, first: Array, end: Array) -> tuple[Array, Array]:
  """Takes free pages for the entries first … end − 1 of a new page table.

  Returns:
    The holders i32[N] with those of the taken pages, and the table i32[P].
  """
  places = jnp.arange(shape.table_len)
  free = jnp.nonzero(holders == 0, size=shape.table_len, fill_value=paged_cache.NOBODY)[0]
  wanted = (places >= first) & (places < end)
  table = jnp.where(wanted, free[jnp.maximum(places - first, 0)], paged_cache.NOBODY)
  return holders.at[table].add(wanted.astype(jnp.int32)), table


def _admit(model: Model, shape: Shape, params: Params, queue: Queue, slots: Slots) -> Slots:
  """Gives the next request an idle slot, after prefilling its prompt if that is a new one."""
  row, requests = _next_row(queue, slots), queue.rows
  is_new = (requests.prompts[row] != slots.prompt) & ~requests.cancelled[row]
  slots = _prefill(model, shape, params, requests, row, is_new, slots)
  length = requests.lengths[row]
  full = length // shape.page_size
  holders, own_table = _take_pages(shape, slots.holders, full,
                                   _pages(shape, length + requests.max_tokens[row]))
  is_shared = jnp.arange(shape.table_len) < full
  table = jnp.where(is_shared, slots.prompt_table, own_table)
  holders = holders.at[table].add(is_shared.astype(jnp.int32))
  # Each response fills up a copy of its own of the prompt's last page. There is no `lax.cond` here
  # or in `_prefill`, since XLA would copy the whole pool into its branches.
  is_partial = length % shape.page_size > 0
  cache = paged_cache.copy_page(slots.cache, slots.prompt_table[full],
                                jnp.where(is_partial, own_table[full], paged_cache.NOBODY))
  slot = jnp.argmax(slots.row == IDLE)
  at = lambda x, value: x.at[slot].set(value)
  cleared = lambda x: x.at[row].set(0)
  return dataclasses.replace(
      slots, cache=cache, holders=holders, table=at(slots.table, table),
      row=at(slots.row, row), length=at(slots.length, length),
      hidden=at(slots.hidden, slots.prompt_hidden), head=slots.head + 1,
      thought=at(slots.thought, jnp.where(requests.max_thought[row] < 0, -1, 0)),
      closing=at(slots.closing, -1), answered=at(slots.answered, 0),
      recent=at(slots.recent, -1), window=at(slots.window, 0), tokens=cleared(slots.tokens),
      sampled=cleared(slots.sampled), logp=cleared(slots.logp), count=cleared(slots.count),
      finish=cleared(slots.finish))


def _prefill(model: Model, shape: Shape, params: Params, requests: Requests, row: Array,
             is_new: Array, slots: Slots) -> Slots:
  """Runs the prompt of a request through the model in chunks and keeps its pages for sharing.

  Nothing changes where `is_new` is False.
  """
  length, chunk = jnp.where(is_new, requests.lengths[row], 0), shape.prefill_chunk
  held = (slots.prompt_table != paged_cache.NOBODY).astype(jnp.int32)
  holders = slots.holders.at[slots.prompt_table].add(-held * is_new)
  holders, table = _take_pages(shape, holders, jnp.zeros((), jnp.int32), _pages(shape, length))
  tokens = jnp.pad(requests.tokens[row], (0, chunk))

  def run(carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
    start, _, cache = carry
    positions = (start + jnp.arange(chunk))[None]
    hidden, cache = model.extend(
        params, jax.lax.dynamic_slice_in_dim(tokens, start, chunk)[None], positions, cache,
        paged_cache.paged(table[None], positions, positions < length))
    last = hidden[0, jnp.clip(length - 1 - start, 0, chunk - 1)]
    return start + chunk, last, cache

  _, last, cache = jax.lax.while_loop(lambda c: c[0] < length, run,
                                      (jnp.zeros((), jnp.int32), slots.prompt_hidden, slots.cache))
  return dataclasses.replace(
      slots, cache=cache, holders=holders, prompt_hidden=last,
      prompt_table=jnp.where(is_new, table, slots.prompt_table),
      prompt=jnp.where(is_new, requests.prompts[row], slots.prompt),
      prefilled=slots.prefilled + length)


# --- One step -------------------------------------------------------------------------


def _step(model: Model, vocabulary: Vocabulary, params: Params, key: Array, requests: Requests,
          slots: Slots) -> Slots:
  active = slots.row != IDLE
  row = jnp.where(active, slots.row, 0)
  asked = jax.tree.map(lambda x: x[row], requests)
  token, logp, drawn, slots = _draw(model, vocabulary, params, key, asked, slots, row)
  slots = _record(slots, asked, row, active, token, logp, drawn, vocabulary)
  slots = _release(slots)
  # The keys and values of idle slots go to page NOBODY.
  hidden, cache = model.extend(params, token[:, None], slots.length[:, None], slots.cache,
                               paged_cache.paged(slots.table, slots.length[:, None]))
  return dataclasses.replace(
      slots, cache=cache, hidden=hidden[:, 0], steps=slots.steps + 1,
      length=jnp.where(slots.row == IDLE, 0, slots.length + 1),
      busy=slots.busy + active.sum())


def _draw(model: Model, vocabulary: Vocabulary, params: Params, key: Array, asked: Requests,
          slots: Slots, row: Array) -> tuple[Array, Array, Array, Slots]:
  """Chooses the next token of each slot.

  Returns:
    tokens i32[B], their log-probabilities f32[B] (0 where forced), bool[B] whether they were
    drawn and not forced, and the slots with what has been forced of the end marker.
  """
  logits = jnp.matmul(slots.hidden, model.head(params), preferred_element_type=jnp.float32)
  filtered = filtered_rows(logits, asked.samplers, vocabulary.is_token)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, asked.ids)
  keys = jax.vmap(jax.random.fold_in)(keys, asked.samples)
  keys = jax.vmap(jax.random.fold_in)(keys, slots.length)
  token, logp = draw(keys, filtered)

  count = slots.count[row]
  is_prefix = count < asked.num_forced
  prefix = jnp.take_along_axis(asked.forced, jnp.minimum(
      count, asked.forced.shape[1] - 1)[:, None], -1)[:, 0]
  token = jnp.where(is_prefix, prefix, token)
  is_forced, closing = is_prefix, slots.closing
  if vocabulary.think_end:
    marker = jnp.array(vocabulary.think_end, jnp.int32)
    out_of_thought = (slots.thought >= asked.max_thought) & (slots.thought >= 0) & ~is_prefix
    closing = jnp.where(out_of_thought & (closing < 0), 0, closing)
    is_closing = closing >= 0
    token = jnp.where(is_closing, marker[jnp.clip(closing, 0, len(marker) - 1)], token)
    is_forced |= is_closing
    closing = jnp.where(is_closing, closing + 1, closing)
  return (token, jnp.where(is_forced, 0.0, logp), ~is_forced,
          dataclasses.replace(slots, closing=closing))


def _record(slots: Slots, asked: Requests, row: Array, active: Array, token: Array, logp: Array,
            drawn: Array, vocabulary: Vocabulary) -> Slots:
  """Appends the tokens to the responses, counts thinking, and marks finished slots IDLE − 1."""
  count, last_row = slots.count[row], slots.tokens.shape[0]
  # A cancelled response gets no more tokens; perhaps its prompt was never prefilled.
  at = (jnp.where(active & ~asked.cancelled, row, last_row), count)
  put = lambda x, value: x.at[at].set(value, mode='drop')
  recent = jnp.concatenate([slots.recent[:, 1:], token[:, None]], 1)
  thought, answered, closing = slots.thought, slots.answered, slots.closing
  if vocabulary.think_end:
    was_thinking = thought >= 0
    ended = (recent == jnp.array(vocabulary.think_end)).all(-1) & was_thinking
    thought = jnp.where(ended, -1, thought + (was_thinking & drawn))
    closing = jnp.where(ended, -1, closing)
    answered = answered + ~was_thinking
  spelled, length = vocabulary.spelled.bytes[token], vocabulary.spelled.lengths[token]
  window = _shift_in(slots.window, spelled, length)
  matched = _ends_in(window, asked.strings, asked.string_lens, length)

  stops = (token[:, None] == asked.stop).any(-1) & drawn
  full = count + 1 >= asked.max_tokens
  if vocabulary.think_end:
    full |= (asked.max_thought >= 0) & (answered >= asked.max_answer)
  finish = jnp.where(full, LENGTH, RUNNING)
  finish = jnp.where(matched & drawn, STOP_STRING, finish)
  finish = jnp.where(stops, STOP, finish)
  finish = jnp.where(asked.cancelled, CANCELLED, finish)
  return dataclasses.replace(
      slots, tokens=put(slots.tokens, token), logp=put(slots.logp, logp),
      sampled=put(slots.sampled, drawn.astype(jnp.float32)),
      count=slots.count.at[at[0]].add(1, mode='drop'),
      finish=slots.finish.at[jnp.where(active, row, last_row)].set(finish, mode='drop'),
      thought=thought, answered=answered, closing=closing, recent=recent, window=window,
      row=jnp.where(active & (finish != RUNNING), IDLE - 1, slots.row))


def _shift_in(window_BW: Array, bytes_BX: Array, num_bytes_B: Array) -> Array:
  """The newest bytes of each slot after those of one more token."""
  width = window_BW.shape[1]
  both = jnp.concatenate([window_BW, bytes_BX], 1)
  return jax.vmap(lambda x, n: jax.lax.dynamic_slice_in_dim(x, n, width))(both, num_bytes_B)


def _ends_in(window_BW: Array, strings: Array, lengths: Array, num_bytes_B: Array) -> Array:
  """bool[B]: whether a stop string ends inside the newest token's bytes."""
  string_len, width = strings.shape[-1], window_BW.shape[1]
  needed = jnp.arange(string_len) >= string_len - lengths[..., None]  # bool[B, X, W]
  matched = jnp.zeros(window_BW.shape[0], bool)
  for back in range(width - string_len):  # The string ends `back` bytes before the window's end.
    text = window_BW[:, width - back - string_len:width - back]
    same = ((text[:, None] == strings) | ~needed).all(-1) & (lengths > 0)
    matched |= same.any(-1) & (back < num_bytes_B)
  return matched


def _release(slots: Slots) -> Slots:
  """Makes the slots that have just finished idle, and gives up their hold of their pages."""
  ended = slots.row == IDLE - 1
  held = ended[:, None] & (slots.table != paged_cache.NOBODY)
  holders = slots.holders.at[slots.table].add(-held.astype(jnp.int32))
  return dataclasses.replace(
      slots, holders=holders, row=jnp.where(ended, IDLE, slots.row),
      table=jnp.where(ended[:, None], paged_cache.NOBODY, slots.table),
      length=jnp.where(ended, 0, slots.length))
