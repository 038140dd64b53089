"""The state of the sampler's program, which each call takes over from the call before."""

import dataclasses
from typing import Any

from flax import struct
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.models import paged_cache
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import admission, resa
from jaxrl_pt.sampling.admission import Places
from jaxrl_pt.sampling.requests import Shape, Vocabulary
from jaxrl_pt.types import Array

RUNNING, STOP, LENGTH, STOP_STRING, CANCELLED = range(5)  # values of Responses.finish
# Values of Decoding.thought beside numbers of tokens: no thought goes on, or all of the response so
# far is like the start marker of one.
NO_THOUGHT, MAY_THINK = -1, -2


@struct.dataclass
class Responses:
  """The responses, with rows like those of `Requests`. Entries from `count` on are garbage."""

  tokens: Array  # i32[Q, S]
  sampled: Array  # f32[Q, S] 1 where a token was drawn, 0 where it was forced
  # f32[Q, S] under the distribution that was drawn from. A forced token has 0, or with
  # `Shape.forced_logp` what it would have had if it had been drawn.
  logp: Array
  version: Array  # i32[Q, S] version of the parameters that each token was drawn by
  top_tokens: Any  # i32[Q, S, num_top] the likeliest tokens, falling; () where nobody asks
  top_logp: Any  # f32[Q, S, num_top]
  count: Array  # i32[Q] tokens
  finish: Array  # i32[Q] RUNNING, or why the response has ended


@struct.dataclass
class Decoding:
  """How far the sequence of each slot is."""

  length: Array  # i32[B] tokens of the sequence that are cached
  newest: Array  # i32[B] the token that goes through the model next
  fed: Array  # i32[B] tokens of the tail before the newest one
  # Thinking; () where the vocabulary has no end marker.
  thought: Any = ()  # i32[B] tokens drawn since thinking began, NO_THOUGHT or MAY_THINK
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
  drafted: Array  # i32[] drafts that were fed
  agreed: Array  # i32[] of these, how many were right, and nothing before them wrong


@struct.dataclass
class Slots:
  """The program's state, which each call takes over from the call before."""

  cache: paged_cache.PagedCache
  places: Places
  decoding: Decoding
  responses: Responses
  counters: Counters
  sparse: Any = ()  # resa.Sparse where sparse attention draws, else ()


def init(model: Model, shape: Shape, vocabulary: Vocabulary, kv: cfg.KV) -> Slots:
  """A state of idle slots and an empty cache, whose keys and values are stored as `kv` says."""
  slots, rows, length = shape.slots, shape.queue, shape.response_len
  ints = lambda *dims: jnp.zeros(dims, jnp.int32)
  floats = lambda *dims: jnp.zeros(dims, jnp.float32)
  decoding = Decoding(ints(slots), ints(slots), ints(slots))
  resa_config = shape.drafts.resa if isinstance(shape.drafts, cfg.SparseDrafts) else shape.sparse
  if vocabulary.think_end:
    decoding = dataclasses.replace(
        decoding, thought=ints(slots) + NO_THOUGHT, closing=ints(slots) - 1, answered=ints(slots),
        recent=ints(slots, len(vocabulary.think_end)) - 1)
  if shape.num_strings:
    assert vocabulary.spelled is not None
    width = shape.string_len + vocabulary.spelled.bytes.shape[1]
    decoding = dataclasses.replace(decoding, window=jnp.zeros((slots, width), jnp.uint8))
  return Slots(
      model.init_pages(shape.num_pages, shape.page_size, kv),
      admission.init(shape), decoding,
      Responses(ints(rows, length), floats(rows, length), floats(rows, length), ints(rows, length),
                ints(rows, length, shape.num_top) if shape.num_top else (),
                floats(rows, length, shape.num_top) if shape.num_top else (), ints(rows),
                ints(rows)),
      Counters(*(ints() for _ in dataclasses.fields(Counters))),
      () if resa_config is None else resa.init(model.config, resa_config, slots, rows, length,
                                               shape.table_len, model.init_cache(0, 0).k.dtype))
