"""Rectified sparse attention: decodes long responses by reading a part of the cache.

    prefill    runs the prompt densely and computes the descriptors of its blocks
    decode     attends in each step to the selected blocks, and appends keys and values
    rectify    after every f tokens of a row, overwrites their keys and values in all layers by one
               dense forward pass; the drawn tokens stay

By induction the cache equals that of dense decoding after each rectification. The noise, the
filters and the form of the results are those of `groups.generate`.

Source: 2506.04108.
Departs from the paper's code in recomputing the descriptors of ⌈f / b⌉ + 1 blocks, not of the
whole buffer, and in leaving finished rows alone.
"""

import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import policies, resa_attention
from jaxrl_pt.sampling.policies import sample_keys
from jaxrl_pt.sampling.requests import NO_TOKEN
from jaxrl_pt.sampling.resa_attention import NOBODY, SparseCache
from jaxrl_pt.types import Array, Params, Prompts, RolloutBatch, SelectedBlocks
from pallas_kernels.dispatch import Generation

PREFILL_TOKENS = 512  # tokens of each row in one forward pass of the prefill
RECTIFIED_TOKENS = 256  # tokens of all rows in one forward pass of the rectification


# --- The parts --------------------------------------------------------------------


def prefill(model: Model, params: Params, cache: SparseCache, tokens_BT: Array,
            lengths_B: Array) -> tuple[Array, SparseCache]:
  """Runs right-padded prompts through the model in chunks.

  Args:
    model: the model that draws the responses.
    params: its parameters.
    cache: a cache whose tables have pages for the prompts; it should be donated.
    tokens_BT: i32[B, T].
    lengths_B: i32[B] in [1, T].

  Returns:
    f[B, D], the hidden states of the last tokens, and the filled cache.
  """
  num_rows, length = tokens_BT.shape
  chunk = min(length, PREFILL_TOKENS)
  tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, -length % chunk)))
  rows = jnp.arange(num_rows)

  def run(i: Array, carry: tuple[Array, SparseCache]) -> tuple[Array, SparseCache]:
    last, cache = carry
    positions = jnp.broadcast_to(i * chunk + jnp.arange(chunk), (num_rows, chunk))
    hidden, cache = model.extend(
        params, jax.lax.dynamic_slice_in_dim(tokens_BT, i * chunk, chunk, 1), positions, cache,
        resa_attention.dense(rows, positions, positions < lengths_B[:, None]))
    at = lengths_B - 1 - i * chunk
    newest = hidden[rows, jnp.clip(at, 0, chunk - 1)]
    return jnp.where((at // chunk == 0)[:, None], newest, last), cache

  last = jnp.zeros((num_rows, model.config.d_model), cache.pages.dtype)
  return jax.lax.fori_loop(0, -(-lengths_B.max() // chunk), run, (last, cache))


def decode(model: Model, params: Params, resa: cfg.ReSA, cache: SparseCache, tokens_B: Array,
           positions_B: Array, active_B: Array,
           generation: Generation | None = None) -> tuple[Array, SparseCache]:
  """One sparse step: the hidden states f[B, D] of one more token of each active row."""
  attend = resa_attention.sparse(resa, positions_B, active_B, generation)
  hidden, cache = model.extend(params, tokens_B[:, None], positions_B[:, None], cache, attend)
  return hidden[:, 0], cache


def rectify(model: Model, params: Params, cache: SparseCache, tokens_BF: Array, starts_B: Array,
            counts_B: Array) -> SparseCache:
  """Overwrites keys, values and descriptors of a window of each row by a dense forward pass.

  The rows that are due are gathered into forward passes of about RECTIFIED_TOKENS tokens; the
  other rows cost nothing.

  Args:
    model: the model that draws the responses.
    params: its parameters.
    cache: the rows' cache.
    tokens_BF: i32[B, F] the windows' tokens.
    starts_B: i32[B] the windows' first positions.
    counts_B: i32[B] how many tokens of each window are rectified; 0 where a row is not due.
  """
  num_rows, window = tokens_BF.shape
  size = min(num_rows, max(1, RECTIFIED_TOKENS // window))
  is_due = counts_B > 0
  due_first = jnp.pad(jnp.argsort(~is_due, stable=True), (0, -num_rows % size))
  num_due = is_due.sum()

  def turn(i: Array, cache: SparseCache) -> SparseCache:
    at = jax.lax.dynamic_slice_in_dim(due_first, i * size, size)
    is_row = i * size + jnp.arange(size) < num_due
    positions = starts_B[at][:, None] + jnp.arange(window)
    is_token = (jnp.arange(window) < counts_B[at][:, None]) & is_row[:, None]
    attend = resa_attention.dense(jnp.where(is_row, at, num_rows), positions, is_token)
    return model.extend(params, tokens_BF[at], positions, cache, attend)[1]

  return jax.lax.fori_loop(0, -(-num_due // size), turn, cache)


def draw(hidden: Array, head_DV: Array, keys: Array, positions: Array,
         sampler: cfg.Sampler) -> policies.Drawn:
  """Draws the token at each position from the hidden state f[..., D] of the token before."""
  logits = jnp.matmul(hidden, head_DV, preferred_element_type=jnp.float32)
  fold_in = jax.random.fold_in
  for _ in positions.shape:
    fold_in = jax.vmap(fold_in)
  return policies.draw(fold_in(keys, positions), policies.filtered_logits(logits, sampler))


def start(model: Model, params: Params, prompts: Prompts, num_samples: int, num_slots: int,
          block: int) -> tuple[Array, SparseCache]:
  """Prefills prompts and makes `num_samples` rows of each, which share its full pages.

  Args:
    model: the model that draws the responses.
    params: its parameters.
    prompts: N prompts, each a document of its own without suffix.
    num_samples: G.
    num_slots: the largest number of cached tokens of a row beyond its prompt.
    block: tokens of a block, which is a page.

  Returns:
    f[N · G, D], the hidden states of the prompts' last tokens, and the rows' cache.

  Raises:
    UserError: the prompts share documents or have a suffix.
  """
  num_prompts, prompt_len = prompts.tokens.shape
  if num_prompts != prompts.lengths.shape[0] or jax.tree.leaves(prompts.suffix):
    raise UserError('Rectified sparse attention takes one document a prompt and no suffix: write '
                    'the suffix into the prompts, or decode branches densely.')
  num_rows = num_prompts * num_samples
  prompt_table, first_own = resa_attention.rows_of_pages(num_prompts, -(-prompt_len // block))
  # A row's first own page begins with a copy of the prompt's last, partly filled page.
  own_len = -(-num_slots // block) + 1
  num_pages = first_own + num_rows * own_len
  dtype = jax.eval_shape(lambda: model.init_cache(1, 1)).k.dtype
  cache = resa_attention.init(model.config, prompt_table, num_pages, block, dtype)
  hidden_ND, cache = prefill(model, params, cache, prompts.tokens, prompts.lengths)

  repeat = lambda x, axis: jnp.repeat(x, num_samples, axis)
  full_B1 = repeat(prompts.lengths // block, 0)[:, None]
  longer = ((0, 0), (0, own_len))
  prompt_table = jnp.pad(repeat(prompt_table, 0), longer)
  own = jnp.arange(prompt_table.shape[1]) - full_B1
  first_B1 = first_own + jnp.arange(num_rows)[:, None] * own_len
  table = jnp.where(own < 0, prompt_table, jnp.where(own < own_len, first_B1 + own, NOBODY))
  layers = jnp.arange(model.config.num_layers)[:, None] * num_pages
  source = layers + jnp.take_along_axis(prompt_table, full_B1, 1)[:, 0]
  pages = cache.pages.at[:, layers + first_B1[:, 0]].set(cache.pages[:, source])
  bounds = jnp.pad(repeat(cache.bounds, 1), ((0, 0), (0, 0), (0, 0), (0, own_len), (0, 0)))
  return repeat(hidden_ND, 0), SparseCache(pages, bounds, table)


# --- Generation -------------------------------------------------------------------


@struct.dataclass
class _Decoding:
  """What the loop carries, of B = N · G rows."""

  step: Array  # i32[] response tokens drawn so far
  tokens: Array  # i32[B, S]
  mask: Array  # f32[B, S]
  logp: Array  # f32[B, S]
  done: Array  # bool[B]
  fresh: Array  # i32[B] response tokens whose keys and values are those of dense decoding
  selected: Any  # u32[B, S, L, K, W] blocks that each token was drawn from, or ()
  cache: SparseCache


def generate(model: Model, params: Params, prompts: Prompts, key: Array, *, sampler: cfg.Sampler,
             resa: cfg.ReSA, num_samples: int, num_tokens: int, stop_id: int = NO_TOKEN,
             version: Array | int = 0, first_samples: Array | None = None,
             generation: Generation | None = None) -> RolloutBatch:
  """`groups.generate` with rectified sparse attention.

  Args:
    resa: how blocks are selected and when rows are rectified. With an active share of 1 the
      result is that of `groups.generate`.
    first_samples: as there.
    generation: the generation of the TPU that runs it; None for any other device.

  Returns:
    RolloutBatch, whose logp is under the sparse distribution that a token was drawn from. With
    `resa.replay` it says which blocks each token was drawn from.
  """
  hidden_BD, cache = start(model, params, prompts, num_samples, num_tokens - 1, resa.block)
  starts_B = jnp.repeat(prompts.lengths, num_samples)
  keys_B = sample_keys(key, prompts.ids, num_samples, first_samples)
  head_DV = model.head(params)
  fill = max(stop_id, 0)

  def record(state: _Decoding, hidden_BD: Array) -> _Decoding:
    drawn = draw(hidden_BD, head_DV, keys_B, starts_B + state.step, sampler)
    running = ~state.done
    token = jnp.where(running, drawn.token, fill)
    selected = state.selected
    if resa.replay:
      selected = selected.at[:, state.step].set(state.cache.selected.swapaxes(0, 1))
    return dataclasses.replace(
        state, step=state.step + 1, selected=selected,
        tokens=state.tokens.at[:, state.step].set(token),
        mask=state.mask.at[:, state.step].set(running.astype(jnp.float32)),
        logp=state.logp.at[:, state.step].set(jnp.where(running, drawn.logp, 0.0)),
        done=state.done | (token == stop_id))

  def step(state: _Decoding) -> _Decoding:
    newest = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, 1, keepdims=False)
    hidden, cache = decode(model, params, resa, state.cache, newest, starts_B + state.step - 1,
                           ~state.done, generation)
    state = _refresh(model, params, resa.refresh, starts_B,
                     dataclasses.replace(state, cache=cache))
    return record(state, hidden)

  empty = jnp.zeros((starts_B.shape[0], num_tokens), jnp.float32)
  selected: Any = ()
  if resa.replay:
    cache = resa_attention.noting(cache)
    rows, *words = cache.selected.swapaxes(0, 1).shape
    selected = jnp.zeros((rows, num_tokens, *words), jnp.uint32)
  state = record(_Decoding(
      jnp.zeros((), jnp.int32), jnp.full(empty.shape, fill, jnp.int32), empty, empty,
      jnp.zeros(starts_B.shape, bool), jnp.zeros_like(starts_B), selected, cache), hidden_BD)
  # The last token needs no slot, since nothing is drawn after it.
  state = jax.lax.while_loop(lambda s: (s.step < num_tokens) & ~s.done.all(), step, state)
  by_prompt = lambda x: x.reshape(-1, num_samples, *x.shape[1:])
  rollouts = RolloutBatch.of_one_turn(by_prompt(state.tokens), by_prompt(state.mask),
                                      by_prompt(state.logp), version)
  if not resa.replay:
    return rollouts
  return dataclasses.replace(rollouts, selected=SelectedBlocks(
      by_prompt(state.selected), resa.block, resa.window))


def _refresh(model: Model, params: Params, refresh: cfg.RefreshEvery | cfg.RefreshNever,
             starts_B: Array, state: _Decoding) -> _Decoding:
  """Rectifies the running rows that have drawn f tokens since their last rectification.

  It is called when all drawn tokens are cached. The window of a row that ends before f tokens is
  not rectified, since nothing reads it again.
  """
  match refresh:
    case cfg.RefreshNever():
      return state
    case cfg.RefreshEvery(tokens=window):
      is_due = ~state.done & (state.step - state.fresh >= window)
      at = jnp.minimum(state.fresh[:, None] + jnp.arange(window), state.tokens.shape[1] - 1)
      cache = rectify(model, params, state.cache, jnp.take_along_axis(state.tokens, at, 1),
                      starts_B + state.fresh, jnp.where(is_due, window, 0))
      return dataclasses.replace(state, cache=cache,
                                 fresh=jnp.where(is_due, state.step, state.fresh))
