"""A sampler whose responses are under way over several steps, as a value that a checkpoint keeps.

    step t:  enqueue batch t + K;  decode until batch t has ended;  learn from batch t

K is `cfg.InFlight.staleness`. The slots work on the batches t … t + K. What is unfinished of the
later ones stays in its slots and pages, and goes on in the next step with the next parameters (an
in-flight weight update). A response may thus be drawn by up to K + 1 versions of the policy: each
token has the version that drew it, and the log-probability under the distribution that it was drawn
from, which is all that a correction needs. Keys and values of earlier tokens are not computed
again, so that this distribution is that of the new parameters over a cache which older ones have
filled, as in PipelineRL (2509.19128).

Batches are learned from in their order. N groups come and N go in each step, of (K + 1) N in all,
so that no other order keeps every token within K steps: after step t, N (t + 1) groups are gone,
and as many came so early that they must be. Nor are short responses preferred.

With constant parameters the responses are those of the on-policy sampler. The noise has the same
address: (seed, batch, prompt id, sample, position).
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel.rules import ROWS, num_shards
from jaxrl_pt.sampling import groups
from jaxrl_pt.sampling import slots as program
from jaxrl_pt.sampling.admission import IDLE
from jaxrl_pt.sampling.requests import MOST_STOPS, NO_TOKEN, Queue, Shape, Vocabulary
from jaxrl_pt.sampling.state import RUNNING, Slots
from jaxrl_pt.sampling.state import init as init_slots
from jaxrl_pt.types import Array, Params, Prompts, RolloutBatch, Weighted


@struct.dataclass
class InFlight:
  """The sampler between two steps: W = K + 1 batches of requests, and how far each of them is.

  Batch b has the (b mod W)-th part of the rows of documents, requests and responses. Every array
  begins with an axis of shards of the data, each of which is a sampler with prompts, slots and
  pages of its own.
  """

  queue: Queue
  slots: Slots


class Drawn(NamedTuple):
  """A step's batch, which has ended, and the sampler that goes on with the other batches."""

  in_flight: InFlight
  rollouts: RolloutBatch
  metrics: dict[str, Weighted]


class Sampler(NamedTuple):
  """The functions that `make_sampler` returns."""

  enqueue: Callable[[InFlight, Prompts, Array], InFlight]
  draw: Callable[[Params, InFlight, Array, Array], Drawn]


def make_sampler(model: Model, seed: int, rollouts: cfg.Rollouts, stop_ids: tuple[int, ...],
                 mesh: Mesh | None = None, mode_ids: tuple[int, ...] = groups.NO_MODES
                 ) -> Sampler:
  """Returns enqueue(in_flight, prompts, batch) and draw(params, in_flight, batch, version).

  `enqueue` appends a batch's requests in the rows of the batch W before it, whose responses must
  have been taken; each prompt has a document of its own. `draw` decodes until all responses of a
  batch have ended, which is the one after the batch that was drawn last; the batches up to
  batch + K must have been appended. `version` is the number of steps that `params` have taken.

  Args:
    model: the policy's model; on several devices made for `rules.SHARD`.
    seed: the run's seed.
    rollouts: the settings.
    stop_ids: the tokens of which any ends a response.
    mesh: the devices, if there are several. No shard waits for another while it decodes.
    mode_ids: the tokens of `rollouts.modes`, which are () where there are none.
  """
  marks = _Marks(stop_ids, mode_ids)
  own = dataclasses.replace(rollouts, num_prompts=rollouts.num_prompts // num_shards(mesh))
  rows, whole = PartitionSpec(ROWS), PartitionSpec()

  def on_shards(function: Any, *specs: PartitionSpec) -> Any:
    if mesh is None:
      return function
    return jax.shard_map(function, mesh=mesh, axis_names=set(ROWS), check_vma=False, in_specs=specs,
                         out_specs=rows)

  def enqueue(in_flight: InFlight, prompts: Prompts, batch: Array) -> InFlight:
    def enqueue_shard(state: InFlight, prompts: Prompts, first: Array, batch: Array) -> InFlight:
      return _of_shards(_enqueue(own, marks, _of_shard(state), prompts, first, batch))

    first = groups.occurrences(prompts.ids) * rollouts.group_size
    return on_shards(enqueue_shard, rows, rows, rows, whole)(in_flight, prompts, first, batch)

  def draw(params: Params, in_flight: InFlight, batch: Array, version: Array) -> Drawn:
    def draw_shard(params: Params, state: InFlight, batch: Array, version: Array
                   ) -> tuple[InFlight, RolloutBatch, _Counts]:
      state, drawn, counts = _draw(model, seed, own, marks, params, _of_shard(state), batch,
                                   version)
      return _of_shards(state), drawn, _of_shards(counts)

    state, drawn, counts = on_shards(draw_shard, whole, rows, whole, whole)(
        params, in_flight, batch, version)
    return Drawn(state, drawn, _metrics(counts, drawn, version))

  return Sampler(enqueue, draw)


def num_batches(rollouts: cfg.Rollouts) -> int:
  """W, the number of batches that are under way at once."""
  assert isinstance(rollouts.mode, cfg.InFlight)
  return rollouts.mode.staleness + 1


def entering(rollouts: cfg.Rollouts, batch: int) -> range:
  """The batches to enqueue before batch `batch` is drawn: all W at first, and then the newest."""
  most = num_batches(rollouts)
  return range(batch + most - 1 if batch else 0, batch + most)


def init(model: Model, rollouts: cfg.Rollouts, mesh: Mesh | None = None) -> InFlight:
  """An idle sampler with an empty queue, for each shard of the data."""
  shards = num_shards(mesh)
  own = dataclasses.replace(rollouts, num_prompts=rollouts.num_prompts // shards)
  prompts, none = _empty_prompts(own, num_batches(own)), jnp.zeros((), jnp.int32)
  # The tokenizer is not known yet, and no request of this queue is ever answered.
  nobody = _Marks(groups.NO_STOP, (0, 0) if own.forces_modes else groups.NO_MODES)
  queue = _requests(own, prompts, jnp.zeros_like(prompts.ids), 0, nobody)
  empty = dataclasses.replace(queue, tail=none, documents=dataclasses.replace(
      queue.documents, asked=jnp.zeros_like(queue.documents.asked)))
  state = InFlight(empty, init_slots(model, _shape_of(model.config.vocab_size, own), Vocabulary(),
                                     own.slots.kv))
  return jax.tree.map(lambda x: jnp.repeat(x[None], shards, 0), state)


def shardings(in_flight: InFlight, mesh: Mesh) -> InFlight:
  """The NamedSharding of every array: shards over data and fsdp, pages also by heads over tensor.

  Args:
    in_flight: the arrays, or their shapes.
    mesh: the devices.
  """
  rows, heads = PartitionSpec(ROWS), PartitionSpec(ROWS, 'tensor')
  of_all: InFlight = jax.tree.map(lambda _: NamedSharding(mesh, rows), in_flight)
  pages = jax.tree.map(lambda _: NamedSharding(mesh, heads), in_flight.slots.cache)
  return dataclasses.replace(of_all, slots=dataclasses.replace(of_all.slots, cache=pages))


# --- One shard ------------------------------------------------------------------------


class _Marks(NamedTuple):
  """Tokens that mean something to the sampler."""

  stop_ids: tuple[int, ...]  # of which any ends a response
  mode_ids: tuple[int, ...]  # with which the responses of each mode begin


class _Counts(NamedTuple):
  """What the sampler did in one step; i32[] in a shard, i32[shards] outside."""

  tokens: Array  # drawn
  carried: Array  # responses that are left in slots
  steps: Array  # decode steps
  busy: Array  # slots that were extended, summed over steps
  slots: Array  # slots × steps


def _enqueue(rollouts: cfg.Rollouts, marks: _Marks, in_flight: InFlight, prompts: Prompts,
             first: Array, batch: Array) -> InFlight:
  """Appends a batch; `first` is i32[N], the number of each prompt's first sample."""
  queue, part = in_flight.queue, batch % num_batches(rollouts)
  new = _requests(rollouts, prompts, first, batch, marks)
  documents, rows = new.documents, new.rows
  # A content's number is never 0, which an empty row has.
  documents = dataclasses.replace(
      documents, content=jnp.full_like(documents.content, batch + 1),
      asked=_part(queue.documents.asked, part, len(documents.asked)) + documents.asked)
  rows = dataclasses.replace(rows, document=rows.document + part * rollouts.num_prompts)
  put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, part * len(new), 0)
  responses = in_flight.slots.responses
  nothing = jnp.zeros(_num_rows(rollouts), jnp.int32)
  responses = dataclasses.replace(responses, count=put(responses.count, nothing),
                                  finish=put(responses.finish, nothing + RUNNING))
  return InFlight(
      dataclasses.replace(queue, documents=jax.tree.map(put, queue.documents, documents),
                          rows=jax.tree.map(put, queue.rows, rows), tail=queue.tail + new.tail),
      dataclasses.replace(in_flight.slots, responses=responses))


def _draw(model: Model, seed: int, rollouts: cfg.Rollouts, marks: _Marks, params: Params,
          in_flight: InFlight, batch: Array, version: Array
          ) -> tuple[InFlight, RolloutBatch, _Counts]:
  """Decodes until no response of the batch is under way."""
  shape = _shape_of(model.config.vocab_size, rollouts)
  part, num_rows, before = batch % num_batches(rollouts), _num_rows(rollouts), in_flight.slots
  is_under_way = lambda slots: (_part(slots.responses.finish, part, num_rows) == RUNNING).any()
  after = program.advance(
      model, shape, Vocabulary(), params, jax.random.key(seed), version, in_flight.queue, before,
      groups.most_turns(shape, has_all_pages=not rollouts.slots.num_pages), is_under_way)
  of_batch = jax.tree.map(lambda x: _part(x, part, num_rows), after.responses)
  drawn = groups.rollouts_of(of_batch, rollouts.num_prompts, marks.stop_ids, version,
                             marks.mode_ids)
  steps = after.counters.steps - before.counters.steps
  counts = _Counts(after.responses.count.sum() - before.responses.count.sum(),
                   (after.places.row != IDLE).sum(), steps,
                   after.counters.busy - before.counters.busy, steps * shape.slots)
  return InFlight(in_flight.queue, after), drawn, counts


def _metrics(counts: _Counts, drawn: RolloutBatch, version: Array) -> dict[str, Weighted]:
  """How old what is learned from is, and what the sampler did in this step."""
  behind = (version - drawn.version) * (drawn.sampled > 0)
  real = lambda count: count.sum().astype(jnp.float32)
  return {
      'versions_behind': Weighted.of(behind.astype(jnp.float32), drawn.sampled),
      'most_versions_behind': Weighted.single(behind.max()),
      'drawn_tokens': Weighted.single(real(counts.tokens)),
      'carried_responses': Weighted.single(real(counts.carried)),
      'decode_steps': Weighted.single(counts.steps.max()),
      'slot_occupancy': Weighted(real(counts.busy), real(counts.slots)),
  }


def _shape_of(vocab_size: int, rollouts: cfg.Rollouts) -> Shape:
  """The sizes of the program, whose queue holds W batches."""
  prompts = _empty_prompts(rollouts, num_batches(rollouts))
  shape = groups.shape_of(vocab_size, prompts, rollouts.group_size, rollouts.response_tokens,
                          rollouts.sampler, rollouts.slots, forces_modes=rollouts.forces_modes)
  return shape._replace(due=_num_rows(rollouts))


def _of_shard(tree: Any) -> Any:
  return jax.tree.map(lambda x: x[0], tree)


def _of_shards(tree: Any) -> Any:
  return jax.tree.map(lambda x: x[None], tree)


# --- Rows -----------------------------------------------------------------------------


def _num_rows(rollouts: cfg.Rollouts) -> int:
  """The responses of one batch."""
  return rollouts.num_prompts * rollouts.group_size


def _part(rows: Array, part: Array, size: int) -> Array:
  """The part-th `size` rows."""
  return jax.lax.dynamic_slice_in_dim(rows, part * size, size)


def _empty_prompts(rollouts: cfg.Rollouts, times: int) -> Prompts:
  num_prompts = times * rollouts.num_prompts
  each = jnp.zeros(num_prompts, jnp.int32)
  return Prompts(jnp.zeros((num_prompts, rollouts.prompt_len), jnp.int32), each + 1, each)


def _requests(rollouts: cfg.Rollouts, prompts: Prompts, first: Array, batch: Array | int,
              marks: _Marks) -> Queue:
  """`groups.queue_of` with the batch's number in every row."""
  # The queue is made before the tokenizer is known, so that it has room for several tokens.
  stops = (*marks.stop_ids, *[NO_TOKEN] * (MOST_STOPS - len(marks.stop_ids)))
  queue = groups.queue_of(prompts, rollouts.group_size, rollouts.response_tokens, stops, first,
                          marks.mode_ids if rollouts.forces_modes else groups.NO_MODES)
  rows = dataclasses.replace(queue.rows, batch=jnp.full_like(queue.rows.ids, batch))
  return dataclasses.replace(queue, rows=rows)
