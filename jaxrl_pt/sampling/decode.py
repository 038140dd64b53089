"""Prefill and decode: draws groups of responses through the model's own `extend`.

A document is computed once; its keys are shared by the prompts that end at its positions and
by the samples of each (branch rollouts). The noise of a token is addressed by (key, prompt id,
sample, position), so a response does not depend on the batch it is drawn in, on the row's
place, on padding or on what shares its document. Tokens equal those of independent prompts;
log-probabilities differ by the order of sums only.
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
# Slots of a response's own at first; they double as it grows, so that a short response
# never reads the room of a long one.
FIRST_SLOTS = 64
# Room comes in multiples of this: the kernel of branches takes no other.
SLOT_TILE = 16


@struct.dataclass
class _Decoding:
  """What the loop carries; B = N · R rows, the R branches of a document side by side."""

  step: Array  # i32[] response tokens drawn so far
  tokens: Array  # i32[B, S]
  mask: Array  # f32[B, S]
  logp: Array  # f32[B, S]
  done: Array  # bool[B]
  cache: kv_cache.Branches | kv_cache.KVCache


class Prefilled(NamedTuple):
  """Documents that have gone through the model."""

  hidden: Array  # f[D, T, E] of their last layer
  cache: kv_cache.KVCache  # T slots a document


def prefill(model: Model, params: Params, tokens_NT: Array) -> Prefilled:
  """Runs right-padded prompts into a fresh cache of T slots.

  Padding leaves garbage in the slots from a prompt's length on, which no mask reaches.

  Args:
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

    token_{n,g,s} = draw(key, filtered_logits(z)) with key fold(fold(fold(key, id_n), g), p),
    p = length_n + M + s its position in the sequence

  A pure function to be called under `jit`. The loop ends when every row has stopped.

  Args:
    prompts: tokens, lengths, ids and suffix are read.
    key: of the run (and, in training, of the step).
    stop_id: the token that ends a response and belongs to it; `NO_STOP` never ends one.
    version: optimiser step of `params`.
    prefilled: the prompts' documents, where they have gone through the model already.
    first_samples: i32[N] number of each prompt's first sample; None for 0. Equal ids with
      equal numbers draw equal responses.

  Returns:
    RolloutBatch; beyond a response's end tokens are `stop_id`, its masks and logp 0.
  """
  num_prompts, num_docs = prompts.lengths.shape[0], prompts.tokens.shape[0]
  lengths_DP = prompts.lengths.reshape(num_docs, -1)
  hidden_DTD, prefix = (
      prefill(model, params, prompts.tokens) if prefilled is None else prefilled)
  if prompts.num_suffix:
    hidden_ND, own = _extend_suffix(model, params, prompts.suffix, lengths_DP, prefix)
  else:
    last = jnp.take_along_axis(hidden_DTD, (lengths_DP - 1)[..., None], axis=1)
    hidden_ND = last.reshape(num_prompts, -1)
    own = kv_cache.branch(prefix, lengths_DP.shape[1], 0)
  # The samples of a prompt share its suffix too, but each goes on in slots of its own.
  copies = lambda x: jnp.repeat(x, num_samples, 3)
  rows = draw_branches(
      model, params, jnp.repeat(hidden_ND, num_samples, 0),
      dataclasses.replace(own, k=copies(own.k), v=copies(own.v)),
      jnp.repeat(lengths_DP, num_samples, 1),
      sample_keys(key, prompts.ids, num_samples, first_samples),
      sampler=sampler, num_tokens=num_tokens, stop_id=stop_id)
  tokens, mask, logp = (x.reshape(num_prompts, num_samples, num_tokens) for x in rows)
  return RolloutBatch.of_one_turn(tokens, mask, logp, version)


def _extend_suffix(model: Model, params: Params, suffix_DM: Array, lengths_DP: Array,
                   prefix: kv_cache.KVCache) -> tuple[Array, kv_cache.Branches]:
  """f[N, D] hidden state of each prompt's last suffix token, and the cache that holds them."""
  num_own, num_prompts = suffix_DM.shape[1], lengths_DP.size
  tokens = jnp.repeat(suffix_DM, lengths_DP.shape[1], 0)
  positions = lengths_DP.reshape(num_prompts, 1) + jnp.arange(num_own)
  hidden_NMD, cache = model.extend(
      params, tokens, positions, kv_cache.branch(prefix, lengths_DP.shape[1], num_own),
      kv_cache.branched(model.ops, lengths_DP, 0))
  return hidden_NMD[:, -1], cache


def draw_branches(model: Model, params: Params, hidden_BD: Array, cache: kv_cache.Branches,
                  lengths_DR: Array, keys_B: Array, *, sampler: Sampler, num_tokens: int,
                  stop_id: int) -> tuple[Array, Array, Array]:
  """Decodes R branches of each of D prefilled documents.

  Args:
    hidden_BD: f[D · R, D] of the token before a branch's first drawn one.
    cache: whose slots of the branches' own are full.
    lengths_DR: i32[D, R] positions of the document that a branch sees.
    keys_B: key[D · R]; a token's noise is fold_in(key, its position).

  Returns:
    tokens i32[B, S], mask f32[B, S], logp f32[B, S].
  """
  num_rows, num_own = hidden_BD.shape[0], cache.k.shape[4]
  head_DV = model.head(params)
  row: kv_cache.Branches | kv_cache.KVCache = cache
  # Reading is all that a step of one row does: fewer, longer reads. With more rows, slower.
  alone = num_rows == 1
  if alone:
    params = unstacked(params, model.config.num_layers)
    row = kv_cache.joined(cache, lengths_DR[0, 0])
  num_slots = row.k.shape[-2]
  starts_B = lengths_DR.reshape(-1) + num_own
  fill = max(stop_id, 0)

  def append(state: _Decoding, hidden_BD: Array) -> _Decoding:
    logits_BV = jnp.matmul(hidden_BD, head_DV, preferred_element_type=jnp.float32)
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
              kv_cache.branched(model.ops, lengths_DR, num_own + state.step - 1))
    hidden, cache = model.extend(params, newest, positions, state.cache, attend)
    return append(dataclasses.replace(state, cache=cache), hidden[:, 0])

  empty = jnp.zeros((num_rows, num_tokens), jnp.float32)
  state = _Decoding(jnp.zeros((), jnp.int32), jnp.full(empty.shape, fill, jnp.int32), empty,
                    empty, jnp.zeros((num_rows,), bool), row)
  state = append(state, hidden_BD)
  # The last token needs no slot: nothing is drawn after it. The first one is drawn already.
  begin = 1
  for end in _stages(num_tokens - 1):
    room = num_slots + end
    if not alone:  # Slots that nothing fills are masked.
      room = -(-room // SLOT_TILE) * SLOT_TILE
    state = dataclasses.replace(state, cache=kv_cache.grow(state.cache, room))
    # Counted from the stage's start, so that the condition shows its most turns (tpu.roofline).
    going_on = lambda s, begin, turns: (s.step - begin < turns) & ~s.done.all()
    state = jax.lax.while_loop(
        functools.partial(going_on, begin=begin, turns=end + 1 - begin), decode, state)
    begin = end + 1
  return state.tokens, state.mask, state.logp


def _stages(num_slots: int) -> list[int]:
  """FIRST_SLOTS, twice as many, …, the last being `num_slots`."""
  ends = []
  end = FIRST_SLOTS
  while end < num_slots:
    ends.append(end)
    end *= 2
  return [*ends, num_slots] if num_slots > 0 else []


def sample_keys(key: Array, ids_N: Array, num_samples: int, first_N: Array | None = None) -> Array:
  """key[N · G]: fold_in(fold_in(key, id), sample), samples numbered from `first_N` (0) on."""
  per_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, ids_N)
  per_sample = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  first = jnp.zeros_like(ids_N) if first_N is None else first_N
  return per_sample(per_prompt, first[:, None] + jnp.arange(num_samples)).reshape(-1)


def occurrences(ids_N: Array) -> Array:
  """i32[N]: how many equal ids stand before each."""
  order = jnp.argsort(ids_N, stable=True)
  ranked = ids_N[order]
  place = jnp.arange(ids_N.shape[0], dtype=jnp.int32)
  first = jnp.searchsorted(ranked, ranked, side='left').astype(jnp.int32)
  return jnp.zeros_like(place).at[order].set(place - first)
