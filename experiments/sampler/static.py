"""Prefill and decode: draws groups of responses through the model's own `extend`.

A document goes through the model once. The prompts that end at its positions, and all samples of
these prompts, share its keys and values (branch rollouts). The noise of a token is addressed by
(key, prompt id, sample, position), so a response does not depend on the batch it is drawn in, on
the row's place, on padding or on the other prompts of its document. Its tokens equal those of a
prompt on its own; its log-probabilities differ only by the order of sums.

E is the model width and D counts documents.
"""

import dataclasses
import functools
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_pt.config import Sampler
from jaxrl_pt.models import kv_cache
from jaxrl_pt.models.base import Model, unstacked
from jaxrl_pt.sampling.policies import draw, filtered_logits
from jaxrl_pt.types import Array, Params, Prompts, RolloutBatch

NO_STOP = -1
# A response begins with this many slots. They double as it grows, so that a short response never
# reads the slots of a long one.
FIRST_SLOTS = 64
# The slots of a branch are a multiple of this, as the kernel of branches requires.
SLOT_TILE = 16


@struct.dataclass
class _Decoding:
  """What the loop carries. The B = D · R rows are the R branches of each document, in order."""

  step: Array  # i32[] response tokens drawn so far
  tokens: Array  # i32[B, S]
  mask: Array  # f32[B, S]
  logp: Array  # f32[B, S]
  done: Array  # bool[B]
  cache: kv_cache.Branches | kv_cache.KVCache


class Prefilled(NamedTuple):
  """Documents that have gone through the model."""

  hidden: Array  # f[D, T, E] hidden states after the last layer
  cache: kv_cache.KVCache  # T slots for each document


def prefill(model: Model, params: Params, tokens_NT: Array) -> Prefilled:
  """Runs right-padded prompts into a fresh cache of T slots.

  Padding leaves garbage in the slots from a prompt's length on, which no query sees.

  Args:
    model: the model that draws the responses.
    params: its parameters.
    tokens_NT: i32[N, T].
  """
  num_prompts, prompt_len = tokens_NT.shape
  positions = jnp.broadcast_to(jnp.arange(prompt_len), tokens_NT.shape)
  return Prefilled(*model.extend(
      params, tokens_NT, positions, model.init_cache(num_prompts, prompt_len),
      kv_cache.prompts(model.ops, num_prompts, prompt_len)))


def generate(model: Model, params: Params, prompts: Prompts, key: Array, *, sampler: Sampler,
             num_samples: int, num_tokens: int, stop_id: int = NO_STOP,
             version: Array | int = 0, prefilled: Prefilled | None = None,
             first_samples: Array | None = None) -> RolloutBatch:
  """Draws `num_samples` responses of at most `num_tokens` to each prompt.

    token_{n,g,s} = draw(k, filtered_logits(z))   with the key
    k = fold(fold(fold(key, id_n), first_n + g), p)   and the position
    p = length_n + M + s

  This is a pure function, to be called under `jit`. Its loop ends when every row has stopped.

  Args:
    model: the model that draws the responses.
    params: its parameters.
    prompts: N prompts, of which tokens, lengths, ids and suffix (M tokens) are read.
    key: the key of the run and, in training, of the step.
    sampler: temperature and filters.
    num_samples: G.
    num_tokens: S.
    stop_id: the token that ends a response and belongs to it; `NO_STOP` never ends one.
    version: the optimiser step of `params`.
    prefilled: the prompts' documents where they have gone through the model already.
    first_samples: i32[N] the number first_n of each prompt's first sample; None for 0. Prompts
      with equal ids and equal sample numbers get equal responses.

  Returns:
    RolloutBatch. After a response's end its tokens are `stop_id`, its masks and logp 0.
  """
  num_prompts, num_docs = prompts.lengths.shape[0], prompts.tokens.shape[0]
  lengths_DP = prompts.lengths.reshape(num_docs, -1)
  hidden_DTE, prefix = (
      prefill(model, params, prompts.tokens) if prefilled is None else prefilled)
  if prompts.num_suffix:
    hidden_NE, cache = _extend_suffix(model, params, prompts.suffix, lengths_DP, prefix)
  else:
    last = jnp.take_along_axis(hidden_DTE, (lengths_DP - 1)[..., None], axis=1)
    hidden_NE = last.reshape(num_prompts, -1)
    cache = kv_cache.branch(prefix, lengths_DP.shape[1], 0)
  # Each sample has a copy of its prompt's suffix, since its response goes on behind it.
  copies = lambda x: jnp.repeat(x, num_samples, 3)
  rows = draw_branches(
      model, params, jnp.repeat(hidden_NE, num_samples, 0),
      dataclasses.replace(cache, k=copies(cache.k), v=copies(cache.v)),
      jnp.repeat(lengths_DP, num_samples, 1),
      sample_keys(key, prompts.ids, num_samples, first_samples),
      sampler=sampler, num_tokens=num_tokens, stop_id=stop_id)
  tokens, mask, logp = (x.reshape(num_prompts, num_samples, num_tokens) for x in rows)
  return RolloutBatch.of_one_turn(tokens, mask, logp, version)


def _extend_suffix(model: Model, params: Params, suffix_DM: Array, lengths_DP: Array,
                   prefix: kv_cache.KVCache) -> tuple[Array, kv_cache.Branches]:
  """f[N, E] hidden states of each prompt's last suffix token, and the cache with the suffixes."""
  num_suffix, num_prompts = suffix_DM.shape[1], lengths_DP.size
  tokens = jnp.repeat(suffix_DM, lengths_DP.shape[1], 0)
  positions = lengths_DP.reshape(num_prompts, 1) + jnp.arange(num_suffix)
  hidden_NME, cache = model.extend(
      params, tokens, positions, kv_cache.branch(prefix, lengths_DP.shape[1], num_suffix),
      kv_cache.branched(model.ops, lengths_DP, 0))
  return hidden_NME[:, -1], cache


def draw_branches(model: Model, params: Params, hidden_BE: Array, cache: kv_cache.Branches,
                  lengths_DR: Array, keys_B: Array, *, sampler: Sampler, num_tokens: int,
                  stop_id: int) -> tuple[Array, Array, Array]:
  """Decodes R branches of each of D prefilled documents, B = D · R rows.

  Args:
    model: the model that draws the responses.
    params: its parameters.
    hidden_BE: f[B, E] the hidden state that each branch's first token is drawn from.
    cache: the documents and the suffixes of the branches, which fill all of their slots.
    lengths_DR: i32[D, R] how many positions of its document each branch sees.
    keys_B: key[B]; the noise of a token is fold_in(key, position).
    sampler: temperature and filters.
    num_tokens: S.
    stop_id: the token that ends a response and belongs to it.

  Returns:
    tokens i32[B, S], mask f32[B, S] and logp f32[B, S].
  """
  num_rows, num_suffix = hidden_BE.shape[0], cache.k.shape[4]
  head_EV = model.head(params)
  slots: kv_cache.Branches | kv_cache.KVCache = cache
  # A step of one row takes as long as its reads, which are fewer and longer with unstacked weights
  # and a plain row of slots. With more rows this layout would be slower.
  alone = num_rows == 1
  if alone:
    params = unstacked(params, model.config.num_layers)
    slots = kv_cache.joined(cache, lengths_DR[0, 0])
  num_slots = slots.k.shape[-2]
  starts_B = lengths_DR.reshape(-1) + num_suffix
  fill = max(stop_id, 0)

  def append(state: _Decoding, hidden_BE: Array) -> _Decoding:
    logits_BV = jnp.matmul(hidden_BE, head_EV, preferred_element_type=jnp.float32)
    keys = jax.vmap(jax.random.fold_in)(keys_B, starts_B + state.step)
    token, logp = draw(keys, filtered_logits(logits_BV, sampler))
    running = ~state.done
    token = jnp.where(running, token, fill)
    return dataclasses.replace(
        state, step=state.step + 1,
        tokens=state.tokens.at[:, state.step].set(token),
        mask=state.mask.at[:, state.step].set(running.astype(jnp.float32)),
        logp=state.logp.at[:, state.step].set(jnp.where(running, logp, 0.0)),
        done=state.done | (token == stop_id))

  def decode(state: _Decoding) -> _Decoding:
    newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
    positions = (starts_B + state.step - 1)[:, None]
    attend = (kv_cache.dense(positions) if alone else
              kv_cache.branched(model.ops, lengths_DR, num_suffix + state.step - 1))
    hidden, cache = model.extend(params, newest, positions, state.cache, attend)
    return append(dataclasses.replace(state, cache=cache), hidden[:, 0])

  empty = jnp.zeros((num_rows, num_tokens), jnp.float32)
  state = _Decoding(jnp.zeros((), jnp.int32), jnp.full(empty.shape, fill, jnp.int32), empty,
                    empty, jnp.zeros((num_rows,), bool), slots)
  state = append(state, hidden_BE)
  # The first token is drawn by now. The last one needs no slot, since nothing is drawn after it.
  begin = 1
  for end in _stages(num_tokens - 1):
    room = num_slots + end
    if not alone:  # No query sees the slots that are added by rounding up.
      room = -(-room // SLOT_TILE) * SLOT_TILE
    state = dataclasses.replace(state, cache=kv_cache.grow(state.cache, room))
    # Steps are counted from the start of the stage, so that `tpu.roofline` can read the largest
    # number of turns from the compiled loop's condition.
    going_on = lambda s, begin, turns: (s.step - begin < turns) & ~s.done.all()
    state = jax.lax.while_loop(
        functools.partial(going_on, begin=begin, turns=end + 1 - begin), decode, state)
    begin = end + 1
  return state.tokens, state.mask, state.logp


def _stages(num_slots: int) -> list[int]:
  """Slots of a response in each stage: FIRST_SLOTS, twice as many, …, and at last `num_slots`."""
  ends = []
  end = FIRST_SLOTS
  while end < num_slots:
    ends.append(end)
    end *= 2
  return [*ends, num_slots] if num_slots > 0 else []


def sample_keys(key: Array, ids_N: Array, num_samples: int, first_N: Array | None = None) -> Array:
  """key[N · G]: fold_in(fold_in(key, id), sample), where samples count from `first_N` (or 0) on."""
  per_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, ids_N)
  per_sample = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  first = jnp.zeros_like(ids_N) if first_N is None else first_N
  return per_sample(per_prompt, first[:, None] + jnp.arange(num_samples)).reshape(-1)


def occurrences(ids_N: Array) -> Array:
  """i32[N]: how many times each id occurs before its own place."""
  order = jnp.argsort(ids_N, stable=True)
  sorted_ids = ids_N[order]
  place = jnp.arange(ids_N.shape[0], dtype=jnp.int32)
  first = jnp.searchsorted(sorted_ids, sorted_ids, side='left').astype(jnp.int32)
  return jnp.zeros_like(place).at[order].set(place - first)
