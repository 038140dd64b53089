"""A static batch, the best that we can write: the baseline that the engine is compared with.

Every response has a row of one contiguous cache, all rows decode together, and the loop ends when
the longest of them has ended. Prompts are prefilled once a group, and the cache grows in stages, so
that a step early in the response does not read what a late one needs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.models import kv_cache
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling.policies import draw, filtered_logits, sample_keys
from jaxrl_pt.sampling.prefill import prefill
from jaxrl_pt.types import Array, Params, Prompts, RolloutBatch

FIRST_SLOTS = 64


def generate(model: Model, params: Params, prompts: Prompts, key: Array, *, sampler: cfg.Sampler,
             num_samples: int, num_tokens: int, stop_ids: tuple[int, ...] = ()) -> RolloutBatch:
  """`groups.generate` for prompts without shared documents, with the same noise and tokens."""
  num_prompts, prompt_len = prompts.tokens.shape
  hidden, cache = prefill(model, params, prompts.tokens)
  each = lambda x, axis=0: jnp.repeat(x, num_samples, axis)
  last = each(jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], 1)[:, 0])
  starts, keys = each(prompts.lengths), sample_keys(key, prompts.ids, num_samples)
  num_rows, head = len(starts), model.head(params)
  empty = jnp.zeros((num_rows, num_tokens))
  fill = stop_ids[0] if stop_ids else 0

  def append(step: Array, state: Any, hidden: Array) -> Any:
    tokens, mask, logp, done = state
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    token, new_logp = draw(jax.vmap(jax.random.fold_in)(keys, starts + step),
                           filtered_logits(logits, sampler))
    token = jnp.where(done, fill, token)
    return (tokens.at[:, step].set(token), mask.at[:, step].set(~done),
            logp.at[:, step].set(jnp.where(done, 0.0, new_logp)),
            done | jnp.isin(token, jnp.asarray(stop_ids, jnp.int32)))

  def decode(carry: Any) -> Any:
    step, state, cache = carry
    positions = (starts + step - 1)[:, None]
    newest = jax.lax.dynamic_slice_in_dim(state[0], step - 1, 1, 1)
    hidden, cache = model.extend(params, newest, positions, cache, kv_cache.dense(positions))
    return step + 1, append(step, state, hidden[:, 0]), cache

  state = append(jnp.zeros((), jnp.int32), (
      jnp.full(empty.shape, fill, jnp.int32), empty, empty, jnp.zeros(num_rows, bool)), last)
  carry = jnp.ones((), jnp.int32), state, jax.tree.map(lambda x: each(x, 1), cache)
  end = 1
  while end < num_tokens:
    end = min(num_tokens, max(2 * (end - 1), FIRST_SLOTS) + 1)
    room = prompt_len + end - 1 - carry[2].k.shape[3]
    grown = jax.tree.map(lambda x, room=room: jnp.pad(x, [(0, 0)] * 3 + [(0, room), (0, 0)]),
                         carry[2])
    carry = jax.lax.while_loop(
        lambda c, end=end: (c[0] < end) & ~c[1][3].all(), decode, (*carry[:2], grown))
  tokens, mask, logp, _ = carry[1]
  whole = lambda x: x.reshape(num_prompts, num_samples, num_tokens)
  return RolloutBatch.of_one_turn(whole(tokens), whole(mask), whole(logp), 0)
