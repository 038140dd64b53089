"""Self-speculation: sparse attention drafts tokens and one dense forward pass verifies them.

The results are those of dense decoding, with fewer dense steps. Draft and verification draw the
token at a position with the same addressed noise:

    d = argmax(log q + g),  t = argmax(log p + g),  g = Gumbel noise of the position

so that t is the very token of `groups.generate`, whatever was drafted, and a draft is right where
d = t. The first wrong draft is replaced by its t, and drafts after it are dropped; if all drafts
of a round are right, the verification adds one more t. This is exact for greedy decoding and for
sampling.

Source: 2506.04108 section 4.4; speculative decoding 2211.17192.
Departs from 2211.17192 in coupling p and q by common noise instead of accepting with
min(1, p/q): slightly fewer drafts agree, but a response does not depend on the drafts.
"""

import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import resa, resa_attention
from jaxrl_pt.sampling.policies import sample_keys
from jaxrl_pt.sampling.requests import NO_TOKEN
from jaxrl_pt.sampling.resa_attention import SparseCache
from jaxrl_pt.types import Array, Params, Prompts, RolloutBatch
from pallas_kernels.dispatch import Generation


@struct.dataclass
class Speculation:
  """Counts of drafts, summed over rows."""

  rounds: Array  # i32[] verifications
  drafted: Array  # i32[] drafted tokens
  agreed: Array  # i32[] drafted tokens before the first wrong one of their round


@struct.dataclass
class _State:
  """What the loop carries, of B = N · G rows. A row's newest token is not yet in the cache."""

  count: Array  # i32[B] tokens drawn
  tokens: Array  # i32[B, S]
  logp: Array  # f32[B, S]
  done: Array  # bool[B]
  cache: SparseCache
  speculation: Speculation


def generate(model: Model, params: Params, prompts: Prompts, key: Array, *, sampler: cfg.Sampler,
             sparse: cfg.ReSA, num_drafts: int, num_samples: int, num_tokens: int,
             stop_id: int = NO_TOKEN, version: Array | int = 0,
             generation: Generation | None = None) -> tuple[RolloutBatch, Speculation]:
  """`groups.generate`, token for token, with fewer dense steps.

  Args:
    sparse: how drafts read the cache. Each verification also rectifies it, so that
      `sparse.refresh` is not read.
    num_drafts: tokens that are drafted before a verification.
    generation: the generation of the TPU that runs it; None for any other device.

  Returns:
    RolloutBatch, whose logp is under the dense distribution, and the counts of drafts.
  """
  hidden_BD, cache = resa.start(model, params, prompts, num_samples,
                                num_tokens - 1 + num_drafts, sparse.block)
  starts_B = jnp.repeat(prompts.lengths, num_samples)
  keys_B = sample_keys(key, prompts.ids, num_samples)
  fill, zero = max(stop_id, 0), jnp.zeros((), jnp.int32)
  first = resa.draw(hidden_BD, model.head(params), keys_B, starts_B, sampler)
  shape = starts_B.shape[0], num_tokens
  state = _State(
      jnp.ones_like(starts_B), jnp.full(shape, fill, jnp.int32).at[:, 0].set(first.token),
      jnp.zeros(shape).at[:, 0].set(first.logp), first.token == stop_id, cache,
      Speculation(zero, zero, zero))
  state = dataclasses.replace(state, done=state.done | (state.count == num_tokens))
  run = functools.partial(_round, model, params, sampler, sparse, num_drafts, stop_id, starts_B,
                          keys_B, generation)
  state = jax.lax.while_loop(lambda s: ~s.done.all(), run, state)
  by_prompt = lambda x: x.reshape(-1, num_samples, num_tokens)
  mask = (jnp.arange(num_tokens) < state.count[:, None]).astype(jnp.float32)
  rollouts = RolloutBatch.of_one_turn(by_prompt(state.tokens), by_prompt(mask),
                                      by_prompt(state.logp), version)
  return rollouts, state.speculation


def _round(model: Model, params: Params, sampler: cfg.Sampler, sparse: cfg.ReSA, num_drafts: int,
           stop_id: int, starts_B: Array, keys_B: Array, generation: Generation | None,
           state: _State) -> _State:
  """Drafts, verifies and records up to num_drafts + 1 tokens of each running row."""
  num_rows, num_tokens = state.tokens.shape
  rows, running = jnp.arange(num_rows), ~state.done
  head_DV = model.head(params)
  first_B = starts_B + state.count - 1  # position of the newest token
  newest = state.tokens[rows, state.count - 1]

  def draft(i: Array, carry: tuple[Array, SparseCache]) -> tuple[Array, SparseCache]:
    fed, cache = carry
    hidden, cache = resa.decode(model, params, sparse, cache, fed[:, i], first_B + i, running,
                                generation)
    token = resa.draw(hidden, head_DV, keys_B, first_B + i + 1, sampler).token
    return fed.at[:, i + 1].set(token), cache

  fed = jnp.zeros((num_rows, num_drafts + 1), jnp.int32).at[:, 0].set(newest)
  fed, cache = jax.lax.fori_loop(0, num_drafts, draft, (fed, state.cache))

  steps = jnp.arange(num_drafts + 1)
  positions = first_B[:, None] + steps
  attend = resa_attention.dense(rows, positions, jnp.broadcast_to(running[:, None], fed.shape))
  hidden, cache = model.extend(params, fed, positions, cache, attend)
  true = resa.draw(hidden, head_DV, jnp.broadcast_to(keys_B[:, None], fed.shape), positions + 1,
                   sampler)
  agreed = jnp.cumprod(fed[:, 1:] == true.token[:, :-1], 1).sum(1)
  # A row gets tokens up to the first stop token, and no more than the response may have.
  stops = jnp.where(true.token == stop_id, steps, num_drafts).min(1)
  new = jnp.minimum(jnp.minimum(agreed, stops) + 1, num_tokens - state.count)
  new = jnp.where(running, new, 0)
  at = jnp.where(steps < new[:, None], state.count[:, None] + steps, num_tokens)
  put = lambda x, values: x.at[rows[:, None], at].set(values, mode='drop')
  count = state.count + new
  newest = true.token[rows, jnp.maximum(new - 1, 0)]
  # Descriptors must forget the keys of wrong drafts. Attention does not see them past the length.
  cache = resa_attention.describe(
      cache, jnp.arange(model.config.num_layers), rows, first_B, first_B + new, num_drafts + 1)
  past = state.speculation
  counted = lambda x: jnp.where(running, x, 0).sum()
  return _State(
      count, put(state.tokens, true.token), put(state.logp, true.logp),
      state.done | (newest == stop_id) | (count == num_tokens), cache,
      Speculation(past.rounds + counted(1), past.drafted + counted(num_drafts),
                  past.agreed + counted(agreed)))
