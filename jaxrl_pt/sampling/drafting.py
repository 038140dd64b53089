"""Speculation: tokens that a slot may draw next, which one dense forward pass verifies.

    PromptLookup  what followed the latest earlier occurrence of the newest n tokens
    SparseDrafts  what sparse attention draws

Draft and verification use the same addressed noise, so that the verification draws the very token
that a slot without drafts would draw, whatever was drafted:

    d = argmax(log q + g),  t = argmax(log p + g),  g = Gumbel noise of the position

A draft is right where d = t. The first wrong one is replaced by its t, and those after it are
dropped; if all are right, the verification adds one more t. This is exact for greedy decoding and
for sampling. A prompt look-up drafts the same tokens for every noise.

Source: 2506.04108 section 4.4; speculative decoding 2211.17192.
Departs from 2211.17192 in coupling p and q by common noise instead of accepting with
min(1, p / q): slightly fewer drafts agree, but a response does not depend on the drafts.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import admission, drawing, resa, resa_attention
from jaxrl_pt.sampling.requests import NO_MASK, Queue, Requests, Shape, Vocabulary
from jaxrl_pt.sampling.resa_attention import SparseCache
from jaxrl_pt.sampling.state import Slots
from jaxrl_pt.types import Array, Params


class Drafts(NamedTuple):
  """Tokens that go through the model at once: the newest of each slot, and drafts after it."""

  tokens: Array  # i32[B, J]
  counts: Array  # i32[B] of these, how many are fed; 0 for an idle slot


def limits(shape: Shape, asked: Requests, count_B: Array, active_B: Array) -> Array:
  """i32[B]: the most tokens of each slot that may go through the model at once.

  Tokens of a tail go one by one, and so do those of a constrained response, whose mask is renewed
  after each. A response's last token is never fed.
  """
  most = jnp.where(count_B == 0, 1, jnp.minimum(shape.num_fed, asked.max_tokens - count_B))
  if shape.num_masks:
    most = jnp.where(asked.mask == NO_MASK, most, 1)
  return jnp.where(active_B, jnp.maximum(most, 1), 0)


def draft(model: Model, shape: Shape, vocabulary: Vocabulary, params: Params, key: Array,
          queue: Queue, slots: Slots) -> tuple[Drafts, Slots]:
  """Drafts tokens for each slot; of the slots, only what sparse attention keeps changes."""
  row = jnp.maximum(slots.places.row, 0)
  asked = jax.tree.map(lambda x: x[row], queue.rows)
  most = limits(shape, asked, slots.responses.count[row], admission.active(slots.places))
  match shape.drafts:
    case cfg.PromptLookup(ngram=ngram):
      return _looked_up(shape, ngram, queue, asked, slots, most), slots
    case _:
      return _drawn_sparsely(model, shape, vocabulary, params, key, queue, asked, slots, most)


# --- Prompt look-up -------------------------------------------------------------------


def _looked_up(shape: Shape, ngram: int, queue: Queue, asked: Requests, slots: Slots,
               most_B: Array) -> Drafts:
  """What followed the latest earlier occurrence of each sequence's newest n tokens.

  Where that reaches the newest token it goes on from the occurrence, so that a repetition of any
  length is drafted on. A slot without an occurrence feeds its newest token alone.
  """
  text, newest = _texts(shape, queue, asked, slots), slots.decoding.length
  places = jnp.arange(text.shape[1])
  same = jnp.broadcast_to(places < newest[:, None], text.shape)
  for back in range(ngram):
    wanted = jnp.take_along_axis(text, jnp.maximum(newest - back, 0)[:, None], 1)
    same &= (jnp.roll(text, back, 1) == wanted) & (places >= back)
  at = jnp.where(same, places, -1).max(1)
  is_found = (at >= 0) & (newest + 1 >= ngram)
  period = jnp.maximum(newest - at, 1)
  steps = jnp.arange(shape.num_fed - 1)
  source = (at + 1)[:, None] + steps % period[:, None]
  drafts = jnp.take_along_axis(text, jnp.clip(source, 0, text.shape[1] - 1), 1)
  tokens = jnp.concatenate([slots.decoding.newest[:, None], drafts], 1)
  return Drafts(tokens, jnp.where(is_found, most_B, jnp.minimum(most_B, 1)))


def _texts(shape: Shape, queue: Queue, asked: Requests, slots: Slots) -> Array:
  """i32[B, T + M + S]: the tokens of each slot's sequence; garbage beyond the newest one."""
  start = asked.prefix + asked.num_tail
  length = shape.document_len + shape.tail_len + shape.response_len
  places = jnp.broadcast_to(jnp.arange(length), (shape.slots, length))

  def part(tokens: Array, first: Array | int) -> Array:
    return jnp.take_along_axis(tokens, jnp.clip(places - first, 0, tokens.shape[1] - 1), 1)

  response = slots.responses.tokens[jnp.maximum(slots.places.row, 0)]
  text = jnp.where(places < asked.prefix[:, None],
                   part(queue.documents.tokens[asked.document], 0),
                   part(asked.tail, asked.prefix[:, None]))
  return jnp.where(places < start[:, None], text, part(response, start[:, None]))


# --- Sparse self-drafts ---------------------------------------------------------------


def _drawn_sparsely(model: Model, shape: Shape, vocabulary: Vocabulary, params: Params, key: Array,
                    queue: Queue, asked: Requests, slots: Slots, most_B: Array
                    ) -> tuple[Drafts, Slots]:
  """Tokens that sparse attention draws one after the other; the last one is not fed."""
  assert isinstance(shape.drafts, cfg.SparseDrafts)
  settings, first = shape.drafts.resa, slots.decoding.length
  in_prompt = slots.responses.count[jnp.maximum(slots.places.row, 0)] == 0
  cache = resa_attention.describe_rows(
      resa.cache_of(slots.sparse, slots.cache, slots.places.table),
      (most_B > 0) & in_prompt & (slots.decoding.fed == 0), first)

  def one(i: Array, carry: tuple[Array, SparseCache]) -> tuple[Array, SparseCache]:
    tokens, cache = carry
    hidden, cache = resa.decode(model, params, settings, cache, tokens[:, i], first + i,
                                i + 1 < most_B)
    likely = drawing.filtered(shape, vocabulary, queue, asked, model.logits(params, hidden))
    token = drawing.drawn(model, key, asked, first + i + 1, likely).token
    return tokens.at[:, i + 1].set(token), cache

  tokens = jnp.zeros((shape.slots, shape.num_fed), jnp.int32).at[:, 0].set(slots.decoding.newest)
  tokens, cache = jax.lax.fori_loop(0, shape.num_fed - 1, one, (tokens, cache))
  sparse = dataclasses.replace(slots.sparse, bounds=cache.bounds)
  return Drafts(tokens, most_B), dataclasses.replace(slots, sparse=sparse, cache=cache.pool)


def forget_wrong(slots: Slots, starts_B: Array, most: int) -> Slots:
  """Descriptors of the tokens that stay, where drafts were fed from `starts_B` on.

  Descriptors must forget the keys of wrong drafts; attention does not see them past the length.
  """
  cache = resa.cache_of(slots.sparse, slots.cache, slots.places.table)
  num_layers, num_rows = cache.bounds.shape[:2]
  cache = resa_attention.describe(cache, jnp.arange(num_layers), jnp.arange(num_rows), starts_B,
                                  slots.decoding.length, most)
  return dataclasses.replace(slots, sparse=dataclasses.replace(slots.sparse, bounds=cache.bounds))
