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

import dataclasses
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import groups
from jaxrl_pt.sampling import slots as program
from jaxrl_pt.sampling.admission import IDLE
from jaxrl_pt.sampling.requests import Queue, Shape, Vocabulary
from jaxrl_pt.sampling.state import RUNNING, Counters, Slots
from jaxrl_pt.sampling.state import init as init_slots
from jaxrl_pt.types import Array, Params, Prompts, RolloutBatch, Weighted


@struct.dataclass
class InFlight:
  """The sampler between two steps: W = K + 1 batches of requests, and how far each of them is.

  Batch b has the (b mod W)-th part of the rows of documents, requests and responses.
  """

  queue: Queue
  slots: Slots


class Drawn(NamedTuple):
  """A step's batch, which has ended, and the sampler that goes on with the other batches."""

  in_flight: InFlight
  rollouts: RolloutBatch
  metrics: dict[str, Weighted]


def check_mesh(mesh: Mesh) -> None:
  """Raises UserError if there are several devices."""
  if mesh.size > 1:
    raise UserError('Rollouts.mode = @cfg.InFlight() keeps its sampler on one device, and the mesh '
                    f'has {mesh.size}: set the axes of cfg.Mesh to 1, or choose @cfg.OneStepOff().')


def num_batches(rollouts: cfg.Rollouts) -> int:
  """W, the number of batches that are under way at once."""
  assert isinstance(rollouts.mode, cfg.InFlight)
  return rollouts.mode.staleness + 1


def entering(rollouts: cfg.Rollouts, batch: int) -> range:
  """The batches to enqueue before batch `batch` is drawn: all W at first, and then the newest."""
  most = num_batches(rollouts)
  return range(batch + most - 1 if batch else 0, batch + most)


def shape_of(vocab_size: int, rollouts: cfg.Rollouts) -> Shape:
  """The sizes of the program, whose queue holds W batches."""
  prompts = _empty_prompts(rollouts, num_batches(rollouts))
  shape = groups.shape_of(vocab_size, prompts, rollouts.group_size, rollouts.response_tokens,
                          rollouts.sampler, rollouts.slots)
  return shape._replace(due=_num_rows(rollouts))


def init(model: Model, rollouts: cfg.Rollouts) -> InFlight:
  """An idle sampler with an empty queue."""
  shape = shape_of(model.config.vocab_size, rollouts)
  queue = _requests(rollouts, _empty_prompts(rollouts, num_batches(rollouts)), 0, groups.NO_STOP)
  empty = dataclasses.replace(queue, tail=jnp.zeros((), jnp.int32), documents=dataclasses.replace(
      queue.documents, asked=jnp.zeros_like(queue.documents.asked)))
  return InFlight(empty, init_slots(model, shape, Vocabulary(),
                                    groups.page_dtype(model, rollouts.slots)))


def enqueue(rollouts: cfg.Rollouts, stop_id: int, in_flight: InFlight, prompts: Prompts,
            batch: Array) -> InFlight:
  """Appends the requests of a batch, in the rows of the batch that was W batches before it.

  Args:
    rollouts: the settings.
    stop_id: the token that ends a response.
    in_flight: the sampler, to which batch − 1 was the last to be appended; all responses of batch
      − W have been taken.
    prompts: the batch's prompts, each with a document of its own.
    batch: i32[] its number.
  """
  queue, part = in_flight.queue, batch % num_batches(rollouts)
  new = _requests(rollouts, prompts, batch, stop_id)
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


def draw(model: Model, seed: int, rollouts: cfg.Rollouts, stop_id: int, params: Params,
         in_flight: InFlight, batch: Array, version: Array) -> Drawn:
  """Decodes until all responses of a batch have ended.

  Args:
    model: the policy's model.
    seed: the run's seed.
    rollouts: the settings.
    stop_id: the token that ends a response.
    params: the policy's parameters.
    in_flight: the sampler, to which the batches up to batch + K have been appended.
    batch: i32[] the number of the batch to draw, which follows the one that was drawn last.
    version: i32[] steps that the parameters have taken.
  """
  shape = shape_of(model.config.vocab_size, rollouts)
  part, num_rows, before = batch % num_batches(rollouts), _num_rows(rollouts), in_flight.slots
  is_under_way = lambda slots: (_part(slots.responses.finish, part, num_rows) == RUNNING).any()
  slots = program.advance(
      model, shape, Vocabulary(), params, jax.random.key(seed), version, in_flight.queue, before,
      groups.most_turns(shape, has_all_pages=not rollouts.slots.num_pages), is_under_way)
  of_batch = jax.tree.map(lambda x: _part(x, part, num_rows), slots.responses)
  drawn = groups.rollouts_of(of_batch, rollouts.num_prompts, stop_id, version)
  return Drawn(InFlight(in_flight.queue, slots), drawn, _metrics(shape, before, slots, drawn,
                                                                  version))


def _metrics(shape: Shape, before: Slots, after: Slots, drawn: RolloutBatch, version: Array
             ) -> dict[str, Weighted]:
  """How old what is learned from is, and what the sampler did in this step."""
  behind = (version - drawn.version) * (drawn.sampled > 0)
  of_step = Counters(**{field.name: getattr(after.counters, field.name)
                        - getattr(before.counters, field.name)
                        for field in dataclasses.fields(Counters)})
  num_tokens = lambda responses: responses.count.sum()
  return {
      'versions_behind': Weighted.of(behind.astype(jnp.float32), drawn.sampled),
      'most_versions_behind': Weighted.single(behind.max()),
      'drawn_tokens': Weighted.single(num_tokens(after.responses) - num_tokens(before.responses)),
      'carried_responses': Weighted.single((after.places.row != IDLE).sum()),
      'decode_steps': Weighted.single(of_step.steps),
      'slot_occupancy': Weighted(of_step.busy.astype(jnp.float32),
                                 (of_step.steps * shape.slots).astype(jnp.float32)),
  }


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


def _requests(rollouts: cfg.Rollouts, prompts: Prompts, batch: Array | int, stop_id: int) -> Queue:
  """`groups.queue_of` with the batch's number in every row."""
  queue = groups.queue_of(prompts, rollouts.group_size, rollouts.response_tokens, stop_id,
                          groups.occurrences(prompts.ids) * rollouts.group_size)
  rows = dataclasses.replace(queue.rows, batch=jnp.full_like(queue.rows.ids, batch))
  return dataclasses.replace(queue, rows=rows)
