"""Prefill and decode: draws groups of responses through the model's own `extend`.

A prompt is computed once and its cache copied to the group's samples. The noise of a
token is addressed by (key, prompt id, sample, position), so a response does not depend
on the batch it is drawn in, on the row's place or on padding.
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_pt.config import Sampler
from jaxrl_pt.models import kv_cache
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling.policies import filtered_logits
from jaxrl_pt.types import Array, Params, Prompts, Rollout

NO_STOP = -1


@struct.dataclass
class _Decoding:
  """What the loop carries; B = N · G rows, the G samples of a prompt side by side."""

  step: Array  # i32[] response tokens drawn so far
  tokens: Array  # i32[B, S]
  mask: Array  # f32[B, S]
  logp: Array  # f32[B, S]
  done: Array  # bool[B]
  cache: kv_cache.KVCache


def prefill(model: Model, params: Params, tokens_NT: Array,
            lengths_N: Array) -> tuple[Array, kv_cache.KVCache]:
  """Runs right-padded prompts into a fresh cache.

  Padding leaves garbage in the slots from `length` on. No mask reaches a slot beyond
  the query's position, and a response overwrites each slot before its query comes there.

  Args:
    tokens_NT: i32[N, T].
    lengths_N: i32[N], 1 ≤ length ≤ T.

  Returns:
    f[N, D] hidden state of each prompt's last token, and the cache of T slots.
  """
  num_prompts, prompt_len = tokens_NT.shape
  positions = jnp.broadcast_to(jnp.arange(prompt_len), tokens_NT.shape)
  hidden_NTD, cache = model.extend(params, tokens_NT, positions,
                                   model.init_cache(num_prompts, prompt_len))
  last = jnp.take_along_axis(hidden_NTD, (lengths_N - 1)[:, None, None], axis=1)
  return last[:, 0], cache


def generate(model: Model, params: Params, prompts: Prompts, key: Array, *, sampler: Sampler,
             num_samples: int, num_tokens: int, stop_id: int = NO_STOP,
             version: Array | int = 0) -> Rollout:
  """Draws `num_samples` responses of at most `num_tokens` to each prompt.

    token_{n,g,s} ~ softmax(filtered_logits(z)) with key fold(fold(fold(key, id_n), g), p),
    p = length_n + s its position in the sequence

  A pure function to be called under `jit`. The loop ends when every row has stopped.

  Args:
    prompts: tokens, lengths and ids are read.
    key: of the run (and, in training, of the step).
    stop_id: the token that ends a response and belongs to it; `NO_STOP` never ends one.
    version: optimiser step of `params`.

  Returns:
    Rollout; beyond a response's end tokens are `stop_id`, mask and logp 0.
  """
  num_prompts = prompts.tokens.shape[0]
  num_rows = num_prompts * num_samples
  head_DV = model.head(params)
  keys_B = _sample_keys(key, prompts.ids, num_samples)
  starts_B = jnp.repeat(prompts.lengths, num_samples)
  fill = max(stop_id, 0)

  def draw(state: _Decoding, hidden_BD: Array) -> _Decoding:
    logits_BV = jnp.matmul(hidden_BD, head_DV, preferred_element_type=jnp.float32)
    filtered = filtered_logits(logits_BV, sampler)
    keys = jax.vmap(jax.random.fold_in)(keys_B, starts_B + state.step)
    token = jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
    logp = jnp.take_along_axis(jax.nn.log_softmax(filtered), token[:, None], -1)[:, 0]
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
    position = (starts_B + state.step - 1)[:, None]
    hidden, cache = model.extend(params, newest, position, state.cache)
    return draw(dataclasses.replace(state, cache=cache), hidden[:, 0])

  hidden_ND, cache = prefill(model, params, prompts.tokens, prompts.lengths)
  if num_tokens > 1:  # One token needs no cache beyond its prompt's.
    cache = kv_cache.repeat(cache, num_samples, num_tokens - 1)
  empty = jnp.zeros((num_rows, num_tokens), jnp.float32)
  state = _Decoding(jnp.zeros((), jnp.int32), jnp.full(empty.shape, fill, jnp.int32), empty,
                    empty, jnp.zeros((num_rows,), bool), cache)
  state = draw(state, jnp.repeat(hidden_ND, num_samples, axis=0))
  if num_tokens > 1:
    state = jax.lax.while_loop(lambda s: (s.step < num_tokens) & ~s.done.all(), decode, state)
  grouped = (num_prompts, num_samples, num_tokens)
  return Rollout(state.tokens.reshape(grouped), state.mask.reshape(grouped),
                 state.logp.reshape(grouped), jnp.asarray(version, jnp.int32))


def _sample_keys(key: Array, ids_N: Array, num_samples: int) -> Array:
  """key[N · G]: fold_in(fold_in(key, id), sample)."""
  per_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, ids_N)
  per_sample = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  return per_sample(per_prompt, jnp.arange(num_samples)).reshape(-1)
