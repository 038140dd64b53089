"""Groups of responses to prompts, drawn on the device by the sampler's program.

`generate` is a pure function, to be called under `jit`: it turns prompts into documents and
requests, runs `slots.advance` to the end, and turns the responses into a RolloutBatch.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel.rules import ROWS
from jaxrl_pt.sampling import slots as program
from jaxrl_pt.sampling.admission import own_pages
from jaxrl_pt.sampling.prefill import Prefilled, prefill
from jaxrl_pt.sampling.requests import (
  NO_DOCUMENT,
  NO_TOKEN,
  Documents,
  Queue,
  Requests,
  Shape,
  Vocabulary,
  pages_of,
)
from jaxrl_pt.sampling.state import Responses, init
from jaxrl_pt.types import (
  NO_MODE,
  NO_THINK,
  THINK,
  Array,
  Params,
  Prompts,
  RolloutBatch,
  SelectedBlocks,
)

NO_STOP: tuple[int, ...] = ()  # No token ends a response.
NO_MODES: tuple[int, ...] = ()  # No token stands for a mode.
ALL_SLOTS, DENSE = cfg.Slots(), cfg.Dense()


class Sample(Protocol):
  """The function that `make_sampler` returns; its arguments are described there."""

  def __call__(self, params: Params, prompts: Prompts, batch: Array, version: Array,
               prefilled: Prefilled | None = None, order: Array | None = None
               ) -> RolloutBatch: ...


def make_sampler(model: Model, seed: int, rollouts: cfg.Rollouts, stop_ids: tuple[int, ...],
                 mesh: Mesh | None = None, mode_ids: tuple[int, ...] = NO_MODES) -> Sample:
  """Returns sample(params, prompts, batch, version, prefilled, order) → RolloutBatch.

  The noise is addressed by (seed, batch, prompt id, sample, position). The batch's number is in
  this address so that a prompt which comes again in a later epoch gets new responses. A prompt
  that stands in one batch several times gets further samples each time: its k-th occurrence (from
  0) has the samples k · G … (k + 1) · G − 1.

  `prefilled` holds the prompts' documents where they have gone through the model already; without
  it the sampler prefills them. `order` is i32[N], where prompts have documents of their own: the
  shards draw equal stretches of the prompts in this order, and the result is in the old one.

  Args:
    model: the model that draws the responses.
    seed: the run's seed.
    rollouts: the number and length of the responses, and the filters they are drawn with.
    stop_ids: the tokens of which any ends a response.
    mesh: the devices, if there are several. Each shard of its axes ROWS then has slots and pages of
      its own, draws the responses to its own prompts, and waits for no other shard; the model must
      be made for `rules.SHARD`.
    mode_ids: the tokens of `rollouts.modes`, which are () where there are none.
  """
  draw = functools.partial(
      generate, model, sampler=rollouts.sampler, num_samples=rollouts.group_size,
      num_tokens=rollouts.response_tokens, stop_ids=stop_ids, slots=rollouts.slots,
      sparse=rollouts.sparse, mode_ids=mode_ids, forces_modes=rollouts.forces_modes)

  def sample(params: Params, prompts: Prompts, batch: Array, version: Array,
             prefilled: Prefilled | None = None, order: Array | None = None) -> RolloutBatch:
    key = jax.random.fold_in(jax.random.key(seed), batch)
    first = occurrences(prompts.ids) * rollouts.group_size
    if mesh is None:
      return draw(params, prompts, key, version=version, first_samples=first, prefilled=prefilled)
    assert prefilled is None  # Only the fused step has it, which runs on one device.
    if order is not None:
      prompts, first = jax.tree.map(lambda x: x[order], (prompts, first))

    def draw_shard(params: Params, prompts: Prompts, key: Array, version: Array,
                   first: Array) -> RolloutBatch:
      return draw(params, prompts, key, version=version, first_samples=first)

    rows, whole = PartitionSpec(ROWS), PartitionSpec()
    drawn = jax.shard_map(
        draw_shard, mesh=mesh, axis_names=set(ROWS), check_vma=False, out_specs=rows,
        in_specs=(whole, rows, whole, whole, rows))(params, prompts, key, version, first)
    if order is None:
      return drawn
    old, sharding = jnp.argsort(order), NamedSharding(mesh, rows)
    in_old_order: RolloutBatch = jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x[old], sharding), drawn)
    return in_old_order

  return sample


def generate(model: Model, params: Params, prompts: Prompts, key: Array, *, sampler: cfg.Sampler,
             num_samples: int, num_tokens: int, stop_ids: tuple[int, ...] = NO_STOP,
             version: Array | int = 0, prefilled: Prefilled | None = None,
             first_samples: Array | None = None, slots: cfg.Slots = ALL_SLOTS,
             sparse: cfg.Dense | cfg.ReSA = DENSE, mode_ids: tuple[int, ...] = NO_MODES,
             forces_modes: bool = False) -> RolloutBatch:
  """Draws `num_samples` responses of at most `num_tokens` to each prompt.

    token_{n,g,s} = draw(k, filtered_logits(z))   with the key
    k = fold(fold(fold(key, id_n), first_n + g), p)   and the position
    p = length_n + M + s

  A document goes through the model once. The prompts that end at its positions, and all samples of
  these prompts, share its pages. A response does not depend on the batch that it is drawn in, on
  its slot, on padding or on the other prompts of its document: its tokens equal those of a prompt
  on its own, and its log-probabilities differ by the order of sums alone.

  Args:
    model: the model that draws the responses.
    params: its parameters.
    prompts: N prompts, of which tokens, lengths, ids and suffix (M tokens) are read.
    key: the key of the run and, in training, of the step.
    sampler: temperature and filters.
    num_samples: G.
    num_tokens: S.
    stop_ids: the tokens of which any ends a response and belongs to it.
    version: the optimiser step of `params`.
    prefilled: the prompts' documents where they have gone through the model already.
    first_samples: i32[N] the number first_n of each prompt's first sample; None for 0. Prompts
      with equal ids and equal sample numbers get equal responses.
    slots: how many responses are decoded at once, and in how many pages.
    sparse: how sparse attention draws responses, whose logp is then under the distribution that it
      drew from. Prompts are read densely. With an active share of 1 the result is that of dense
      attention, up to rounding.
    mode_ids: the tokens with which responses that think, and such that do not, begin; () where
      responses have no modes.
    forces_modes: whether the first half of each group is made to think and the second half not
      to, by a first token that is not drawn. Its logp is the one that it would have been drawn
      with.

  Returns:
    RolloutBatch. After a response's end its tokens are the first of `stop_ids`, or 0 where there
    is none, and its masks and logp are 0. With `ReSA.replay` it says which blocks each token was
    drawn from.
  """
  num_prompts = prompts.lengths.shape[0]
  forced = mode_ids if forces_modes else NO_MODES
  shape = shape_of(model.config.vocab_size, prompts, num_samples, num_tokens, sampler, slots,
                   sparse, forces_modes)
  queue = queue_of(prompts, num_samples, num_tokens, stop_ids, first_samples, forced)
  state = init(model, shape, Vocabulary(), slots.kv)
  if shape.slots == shape.queue:
    if prefilled is None:
      prefilled = prefill(model, params, prompts.tokens)
    state = program.draw_all(model, shape, Vocabulary(), params, key, version, queue, state,
                             prefilled.cache)
  else:
    state = program.advance(model, shape, Vocabulary(), params, key, version, queue, state,
                            most_turns(shape, has_all_pages=not slots.num_pages))
  rollouts = rollouts_of(state.responses, num_prompts, stop_ids, version, mode_ids)
  if not (isinstance(sparse, cfg.ReSA) and sparse.replay):
    return rollouts
  bits = state.sparse.selected
  return dataclasses.replace(rollouts, selected=SelectedBlocks(
      bits.reshape(num_prompts, num_samples, *bits.shape[1:]), sparse.block, sparse.window))


def rollouts_of(responses: Responses, num_prompts: int, stop_ids: tuple[int, ...],
                version: Array | int, mode_ids: tuple[int, ...] = NO_MODES) -> RolloutBatch:
  """Responses as groups.

  After a response's end its tokens are the first of `stop_ids`, or 0 where there is none, and its
  masks and logp are 0.

  Args:
    responses: the rows of all groups, prompt by prompt.
    num_prompts: N.
    stop_ids: the tokens of which any ends a response.
    version: i32[] the version that stands after a response's end.
    mode_ids: as for `generate`.
  """
  num_tokens = responses.tokens.shape[1]
  there = jnp.arange(num_tokens) < responses.count[:, None]
  whole = lambda x: x.reshape(num_prompts, -1, num_tokens)
  rollouts = RolloutBatch.of_one_turn(
      whole(jnp.where(there, responses.tokens, stop_ids[0] if stop_ids else 0)),
      whole(there.astype(jnp.float32)), whole(jnp.where(there, responses.logp, 0.0)),
      whole(jnp.where(there, responses.version, version)))
  if not mode_ids:
    return rollouts
  first = rollouts.tokens[..., 0]
  mode = jnp.where(first == mode_ids[THINK], THINK,
                   jnp.where(first == mode_ids[NO_THINK], NO_THINK, NO_MODE))
  return dataclasses.replace(
      rollouts, mode=mode, sampled=whole(jnp.where(there, responses.sampled, 0.0)))


def shape_of(vocab_size: int, prompts: Prompts, num_samples: int, num_tokens: int,
             sampler: cfg.Sampler, slots: cfg.Slots, sparse: cfg.Dense | cfg.ReSA = DENSE,
             forces_modes: bool = False) -> Shape:
  """The sizes of the program that draws `num_samples` responses to each prompt."""
  num_docs, document_len = prompts.tokens.shape
  num_rows = prompts.lengths.shape[0] * num_samples
  num_slots = min(slots.slots or num_rows, num_rows)
  chunk = min(slots.prefill_chunk, document_len)
  resa = sparse if isinstance(sparse, cfg.ReSA) else None
  drafts = None if isinstance(slots.drafts, cfg.NoDrafts) else slots.drafts
  page_size = cfg.block_of(sparse, slots.drafts) or slots.page_size
  shape = Shape(
      slots=num_slots, page_size=page_size, num_pages=slots.num_pages, documents=num_docs,
      queue=num_rows, document_len=document_len, tail_len=1 + prompts.num_suffix,
      response_len=num_tokens, lanes=min(num_docs, max(1, slots.prefill_tokens // chunk)),
      chunk=chunk, vocab_size=vocab_size, num_forced=int(forces_modes), forced_logp=forces_modes,
      sampler=sampler, sparse=resa, drafts=drafts)
  if slots.num_pages and num_slots < num_rows:
    # Page 0 belongs to nobody, and a document's pages stay until its last response has begun.
    least = 1 + own_pages(shape) + pages_of(document_len, page_size)
    if slots.num_pages < least:
      raise UserError(f'Slots.num_pages = {slots.num_pages} cannot hold one response of '
                      f'{num_tokens} tokens to a prompt of {document_len}: set it to at least '
                      f'{least}, or to 0.')
    return shape
  kept = num_docs if num_slots == num_rows else min(num_docs, num_slots + shape.lanes)
  return shape._replace(num_pages=1 + num_slots * own_pages(shape) + kept * pages_of(
      document_len, page_size))


def most_turns(shape: Shape, *, has_all_pages: bool) -> int:
  """The largest number of turns that drawing the whole queue can take.

  In a turn the lanes prefill, or all slots decode, or the queue is empty and the last responses
  end. With too few pages perhaps only one slot decodes.
  """
  each = shape.most_fed
  at_once = shape.slots if has_all_pages else 1
  chunks = shape.documents * -(-shape.document_len // shape.chunk)
  return chunks + each + shape.queue * each // at_once


def queue_of(prompts: Prompts, num_samples: int, num_tokens: int, stop_ids: tuple[int, ...],
             first_samples: Array | None = None, forced_ids: tuple[int, ...] = NO_MODES) -> Queue:
  """Documents and requests of prompts, in their order.

  A request begins with all tokens of its prompt but the last, which is the first token of its tail:
  the hidden state that the first token is drawn from is computed in a step like every other. Each
  of `forced_ids` is the first token of an equal part of every group.
  """
  num_docs, num_prompts = prompts.tokens.shape[0], prompts.lengths.shape[0]
  num_rows = num_prompts * num_samples
  lengths_DP = prompts.lengths.reshape(num_docs, -1)
  last = jnp.take_along_axis(prompts.tokens, lengths_DP - 1, axis=1).reshape(num_prompts, 1)
  tail = last
  if prompts.num_suffix:
    tail = jnp.concatenate([last, jnp.repeat(prompts.suffix, lengths_DP.shape[1], 0)], 1)
  first = jnp.zeros_like(prompts.ids) if first_samples is None else first_samples
  samples = first[:, None] + jnp.arange(num_samples)
  each = lambda x: jnp.repeat(x, num_samples, 0)
  every = lambda value: jnp.full(num_rows, value, jnp.int32)
  per_document = num_rows // num_docs
  documents = Documents(
      tokens=prompts.tokens, lengths=lengths_DP.max(1) - 1,
      parents=jnp.full(num_docs, NO_DOCUMENT, jnp.int32), shared=jnp.zeros(num_docs, jnp.int32),
      content=jnp.zeros(num_docs, jnp.int32), asked=jnp.full(num_docs, per_document, jnp.int32))
  requests = Requests(
      document=jnp.arange(num_rows, dtype=jnp.int32) // per_document,
      prefix=each(prompts.lengths - 1), tail=each(tail), num_tail=every(tail.shape[1]),
      ids=each(prompts.ids), samples=samples.reshape(-1), max_tokens=every(num_tokens),
      stop=jnp.tile(jnp.asarray([stop_ids or (NO_TOKEN,)], jnp.int32), (num_rows, 1)),
      keep=every(NO_DOCUMENT),
      cancelled=jnp.zeros(num_rows, bool))
  if forced_ids:
    of_group = jnp.repeat(jnp.asarray(forced_ids, jnp.int32), num_samples // len(forced_ids))
    requests = dataclasses.replace(requests, forced=jnp.tile(of_group, num_prompts)[:, None],
                                   num_forced=every(1))
  return Queue(documents, requests, jnp.arange(num_rows, dtype=jnp.int32),
               jnp.asarray(num_rows, jnp.int32))


def occurrences(ids_N: Array) -> Array:
  """i32[N]: how many times each id occurs before its own place."""
  order = jnp.argsort(ids_N, stable=True)
  sorted_ids = ids_N[order]
  place = jnp.arange(ids_N.shape[0], dtype=jnp.int32)
  first = jnp.searchsorted(sorted_ids, sorted_ids, side='left').astype(jnp.int32)
  return jnp.zeros_like(place).at[order].set(place - first)
