"""The engine: it takes requests and draws their responses by continuous batching.

`Engine` is the host's half of `sampling/slots.py`: it checks requests, keeps their rows, hands
them to the device and collects the tokens that have been drawn. Its one program is compiled for
one set of types (shapes and dtypes) when the engine is made; to compile again is an error.

Floating-point sums depend on how many rows a product has. A change of `Engine.slots` or of
`Engine.prefill_chunk` can therefore move a logit by a rounding and, at a near tie, change a
token, most often in bfloat16 on an accelerator. The products of ternary weights and the absmax
of int8 activations are exact and have no part in this; the absmean of int4 activations, norms,
attention and head have.
"""

from collections.abc import Iterable, Sequence
import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import memory
from jaxrl_pt.sampling import engine_rows, slots, state
from jaxrl_pt.sampling.engine_request import Constraint, Request, check
from jaxrl_pt.sampling.prefix_cache import PrefixCache
from jaxrl_pt.sampling.prompt_scores import Scored, Scorer
from jaxrl_pt.sampling.requests import NO_DOCUMENT, NO_MASK, Queue
from jaxrl_pt.types import Params

REASONS = {state.STOP: 'stop', state.LENGTH: 'length', state.STOP_STRING: 'stop_string',
           state.CANCELLED: 'cancelled'}


@dataclass(frozen=True)
class Response:
  """A response so far, or a whole one if it has a finish reason."""

  id: int
  sample: int
  tokens: np.ndarray  # i32[S]
  logp: np.ndarray  # f32[S] under the distribution that was drawn from; 0 where forced
  sampled: np.ndarray  # f32[S] 1 where a token was drawn, 0 where it was forced
  finish: str  # '' while it runs, or 'stop', 'length', 'stop_string', 'cancelled'
  version: int  # optimiser step of the policy that drew it
  # The likeliest tokens at each place under the distribution that was drawn from, falling; None
  # where nobody asked.
  top_tokens: np.ndarray | None = None  # i32[S, K]
  top_logp: np.ndarray | None = None  # f32[S, K]
  # The prompt under the model's own distribution, without temperature and filters.
  prompt: Scored | None = None


@dataclass
class _Row:
  """What the host knows of a row of `slots.Requests` that is in use."""

  handle: int
  sample: int
  id: int
  serial: int  # how many responses were queued before this one, since the engine was made
  request: Request
  document: int  # row of the prompt's document
  keep: int  # row of the document that the whole sequence becomes, or NO_DOCUMENT
  mask: int  # row of `Queue.masks`, or NO_MASK
  constraint: Constraint | None
  prompt: Scored | None  # the prompt's log-probabilities, if they are asked for
  seen: int = 0  # tokens of the response that `advance` has reported


class Engine:
  """Continuous batching over one model. Not thread-safe: one caller at a time."""

  def __init__(self, model: Model, params: Params, config: cfg.Engine, *, seed: int,
               token_bytes: Sequence[bytes], unused_ids: Sequence[int] = (),
               think_end: tuple[int, ...] = (), think_start: tuple[int, ...] = (),
               version: int = 0, mesh: Mesh | None = None) -> None:
    """Compiles the program.

    Args:
      model: the model that draws the responses.
      params: the policy's parameters; their weights may be packed.
      config: the engine's sizes.
      seed: addresses all noise, together with a request's id, the sample and the position.
      token_bytes: the bytes of every token of the tokenizer; ids beyond this list are never drawn.
      unused_ids: further ids that no token has and that are never drawn.
      think_end: the tokens of the marker that ends thinking.
      think_start: those of the marker that starts it, for requests that leave it to the policy
        whether to think.
      version: the optimiser step of `params`.
      mesh: the devices that `params` lie on; key/value heads are split over the tensor axis. None
        for the default device.
    """
    self.config, self._params = config, params
    self.version = version
    self._shape = engine_rows.shape(config, model.config.vocab_size)
    self._vocabulary = engine_rows.vocabulary(token_bytes, unused_ids, model.config.vocab_size,
                                              think_end, think_start)
    init = lambda: state.init(model, self._shape, self._vocabulary, config.kv)
    memory.check_arrays(
        jax.eval_shape(init), f'The cache of {config.slots} slots of up to {config.prompt_len} + '
        f'{config.response_len} tokens', 'ask for fewer or shorter ones')
    layout = None if mesh is None else engine_rows.layout(mesh, jax.eval_shape(init))
    self._everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    # The key lies where the program runs: another device may be busy when it is asked for.
    self._run_key = self._key = jax.device_put(jax.random.key(seed), self._everywhere)
    self._slots = jax.jit(init, out_shardings=layout)()
    self._documents = PrefixCache(self._shape.documents, self._shape.document_len)
    self._queue: Any = engine_rows.empty_queue(self._shape, self._documents)  # of NumPy arrays
    self._on_device: Queue | None = None
    self._free = list(range(config.queue - 1, -1, -1))
    self._free_masks = list(range(config.constrained))
    self._scorer = Scorer(model, config.prompt_len, self._shape.num_top)
    self._scored: list[tuple[int, Response]] = []  # of requests that draw nothing
    self._rows: dict[int, _Row] = {}
    self._num_handles = self._num_hits = self._num_hit_tokens = 0
    self._traced: set[tuple[Any, ...]] = set()  # types of the arguments

    def run(*args: Any) -> state.Slots:
      self._traced.add(tuple(jax.typeof(x) for x in jax.tree.leaves(args)))
      return slots.advance(model, self._shape, self._vocabulary, *args)

    # The device's state is donated: a call updates it in place.
    self._run = jax.jit(run, donate_argnums=4, out_shardings=layout)
    self.advance(0)

  # --- Requests -------------------------------------------------------------------------

  def room(self) -> int:
    """How many responses can be submitted before one has to be collected."""
    return len(self._free)

  def check(self, request: Request) -> None:
    """Accepts a request that this engine can answer, and refuses any other.

    Raises:
      UserError: the request cannot be answered; the message says why and what the engine takes.
    """
    check(request, self._shape, self._vocabulary)

  def submit(self, request: Request) -> int:
    """Queues a request and returns the handle that its responses carry.

    Raises:
      UserError: the request cannot be answered, and nothing is queued.
      BlockingIOError: the queue is full; try again after `advance`.
    """
    self.check(request)
    if not self._has_room(request):
      raise BlockingIOError(f'the queue has room for {len(self._free)} responses, of which '
                            f'{len(self._free_masks)} may be constrained')
    handle, self._num_handles = self._num_handles, self._num_handles + 1
    scored = None
    if request.prompt_logprobs:
      scored = self._scorer.score(self._params, request.prompt, request.top_logprobs)
    if request.max_tokens == 0:
      self._scored += [(handle, self._nothing_drawn(request, g, scored))
                       for g in _samples(request)]
      return handle
    found = self._documents.find(request.prompt[:-1], request.num_samples)
    self._num_hits += found.hit > 0
    self._num_hit_tokens += found.hit
    # What a lone response becomes is kept for the next turn of its conversation.
    # The last keys and values of sparse attention have not been rectified.
    is_kept = request.num_samples == 1 and self._shape.sparse is None
    keep = self._documents.reserve() if is_kept else NO_DOCUMENT
    for sample in _samples(request):
      row, mask, constraint = self._free.pop(), NO_MASK, None
      if request.constraint is not None:
        mask, constraint = self._free_masks.pop(), request.constraint.copy()
        self._queue.masks[mask] = constraint.mask()
      engine_rows.fill(self._queue.rows, self._shape, row, request, sample, found.document, keep,
                       mask)
      tail = int(self._queue.tail)
      self._queue.order[tail % len(self._queue.order)] = row
      self._queue = dataclasses.replace(self._queue, tail=np.int32(tail + 1))
      self._rows[row] = _Row(handle, sample, request.id, tail, request, found.document, keep, mask,
                             constraint, scored)
    self._on_device = None
    return handle

  def _has_room(self, request: Request) -> bool:
    masks = 0 if request.constraint is None else request.num_samples
    return request.num_samples <= len(self._free) and masks <= len(self._free_masks)

  def _nothing_drawn(self, request: Request, sample: int, scored: Scored | None) -> Response:
    nothing = np.zeros(0, np.float32)
    return Response(request.id, sample, np.zeros(0, np.int32), nothing, nothing, 'length',
                    self.version, prompt=scored)

  def cancel(self, handle: int) -> None:
    """Ends the responses of a request at the next step; `advance` still returns them."""
    for row, note in self._rows.items():
      if note.handle == handle:
        self._queue.rows.cancelled[row] = True
    self._on_device = None

  # --- Work -----------------------------------------------------------------------------

  def advance(self, max_steps: int | None = None) -> list[tuple[int, Response]]:
    """Decodes up to `max_steps` tokens a slot (default `Engine.steps_per_call`).

    Returns:
      (handle, response) for every response that has new tokens or has finished. The engine
      forgets a response with its finish.
    """
    if self._on_device is None:
      self._on_device = jax.device_put(self._queue, self._everywhere)
    steps = self.config.steps_per_call if max_steps is None else max_steps
    if any(note.constraint is not None for note in self._rows.values()):
      steps = min(steps, 1)  # Each token of a constrained response changes its mask.
    self._slots = self._run(self._params, self._key, np.int32(self.version), self._on_device,
                            self._slots, np.int32(steps))
    if len(self._traced) > 1:
      raise RuntimeError('the engine compiled again: its parameters changed their types (shape or '
                         'dtype)')
    places, out = self._slots.places, dataclasses.replace(self._slots.responses, version=())
    if not any(note.request.top_logprobs for note in self._rows.values()):
      out = dataclasses.replace(out, top_tokens=(), top_logp=())  # They are not fetched.
    head, kept, out = jax.device_get((places.head, places.state, out))
    changed, self._scored = self._scored, []
    new_masks = False
    for row, note in list(self._rows.items()):
      # A row holds an earlier response until the device has admitted its request.
      if note.serial >= head or (out.count[row] == note.seen and not out.finish[row]):
        continue
      response = self._response(row, note, out)
      changed.append((note.handle, response))
      if note.constraint is not None and not response.finish:
        for token in response.tokens[note.seen:].tolist():
          note.constraint.accept(token)
        self._queue.masks[note.mask] = note.constraint.mask()
        new_masks = True
      note.seen = len(response.tokens)
      if response.finish:
        self._forget(row, note, response.tokens)
    if new_masks:
      self._on_device = dataclasses.replace(
          self._on_device, masks=jax.device_put(self._queue.masks, self._everywhere))
    self._documents.report(kept)
    return changed

  def _response(self, row: int, note: _Row, out: Any) -> Response:
    """The response so far in a row of the device's `Responses`."""
    num, num_top = int(out.count[row]), note.request.top_logprobs
    top = lambda x: x[row, :num, :num_top].copy() if num_top else None
    return Response(
        note.id, note.sample, out.tokens[row, :num].copy(), out.logp[row, :num].copy(),
        out.sampled[row, :num].copy(), REASONS.get(int(out.finish[row]), ''), self.version,
        top(out.top_tokens), top(out.top_logp), note.prompt)

  def _forget(self, row: int, note: _Row, tokens: np.ndarray) -> None:
    """Frees the row of a response that has ended."""
    del self._rows[row]
    self._free.append(row)
    if note.mask != NO_MASK:
      self._free_masks.append(note.mask)
    self._documents.done(note.document)
    if note.keep != NO_DOCUMENT:
      self._documents.fill(note.keep, (*note.request.prompt, *tokens[:-1].tolist()))

  def run(self, requests: Iterable[Request]) -> list[list[Response]]:
    """Answers requests to the end.

    Requests with the largest `max_tokens` start first, so that no long response runs alone at
    the end; those with equal ones start in their order.

    Returns:
      For each request its whole responses, in the order of their samples.

    Raises:
      UserError: one of the requests cannot be answered, and none has been queued.
    """
    requests = list(requests)
    for request in requests:
      self.check(request)
    # The next request is popped from the end of this list.
    waiting = sorted(range(len(requests)), key=lambda i: (requests[i].max_tokens, -i))
    numbers: dict[int, int] = {}
    done: list[list[Response]] = [[] for _ in requests]
    while waiting or self._rows or self._scored:
      while waiting and self._has_room(requests[waiting[-1]]):
        number = waiting.pop()
        numbers[self.submit(requests[number])] = number
      for handle, response in self.advance(None if waiting else self._shape.response_len):
        if response.finish:
          done[numbers[handle]].append(response)
    return [sorted(group, key=lambda r: r.sample) for group in done]

  def load(self, params: Params, version: int, batch: int | None = None) -> None:
    """Replaces the parameters by others of the same types, and forgets what they have cached.

    Args:
      params: the policy's parameters.
      version: the optimiser step of `params`.
      batch: the number of a batch of rollouts, which then addresses the noise beside the seed, as
        it does in `groups.make_sampler`. None for noise that no batch addresses.

    Raises:
      UserError: a response is under way, and two policies would mix in its group.
    """
    if self._rows:
      raise UserError(f'{len(self._rows)} responses of version {self.version} are under way: '
                      f'collect or cancel them before loading version {version}.')
    self._params, self.version = params, version
    key = self._run_key if batch is None else jax.random.fold_in(self._run_key, batch)
    self._key = jax.device_put(key, self._everywhere)
    self._documents.clear()
    self._on_device = None

  def unload(self) -> None:
    """Lets go of the parameters, whose memory others may use until `load` brings new ones."""
    self._params = {}

  def counters(self) -> dict[str, float]:
    """Counts since the engine was made, and the pages that are in use now.

    Returns:
      steps: decode steps; prefilled: prompt tokens that went through the model before their
      responses began; prefix_hits, prefix_hit_tokens: requests whose prompt began like something
      that was kept, and the tokens they had in common; occupancy: the share of slots that held a
      response, over all steps; drafted, agreed: drafts that went through the model, and how many of
      them were right; pages_in_use; kept_pages: those of them that no response under way
      holds.
    """
    counters, holders, table = jax.device_get(
        (self._slots.counters, self._slots.places.holders, self._slots.places.table))
    in_use = holders[1:] > 0
    running = np.zeros(holders.shape, bool)
    running[table.ravel()] = True
    return {'steps': int(counters.steps), 'prefilled': int(counters.prefilled),
            'prefix_hits': self._num_hits, 'prefix_hit_tokens': self._num_hit_tokens,
            'occupancy': float(counters.busy) / max(1, int(counters.steps) * self.config.slots),
            'drafted': int(counters.drafted), 'agreed': int(counters.agreed),
            'pages_in_use': int(in_use.sum()),
            'kept_pages': int((in_use & ~running[1:]).sum())}


def _samples(request: Request) -> range:
  """The numbers of a request's responses among the samples of its id."""
  return range(request.first_sample, request.first_sample + request.num_samples)
