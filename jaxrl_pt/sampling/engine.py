"""The engine: it takes requests and draws their responses by continuous batching.

`Engine` is the host's half of `sampling/slots.py`: it checks requests, keeps their rows, hands
them to the device and collects the tokens that have been drawn. Its one program is compiled for
one set of shapes when the engine is made; to compile again is an error.

Floating-point sums depend on how many rows a product has. A change of `Engine.slots` or of
`Engine.prefill_chunk` can therefore move a logit by a rounding and, at a near tie, change a
token, most often in bfloat16 on an accelerator. The products of ternary weights and the absmax
of int8 activations are exact and have no part in this; the absmean of int4 activations, norms,
attention and head have.
"""

from collections.abc import Iterable, Sequence
import dataclasses
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import memory
from jaxrl_pt.parallel.rules import SAMPLE
from jaxrl_pt.sampling import slots as device
from jaxrl_pt.sampling.policies import RowSamplers
from jaxrl_pt.token_bytes import token_table
from jaxrl_pt.types import Params

REASONS = {device.STOP: 'stop', device.LENGTH: 'length', device.STOP_STRING: 'stop_string',
           device.CANCELLED: 'cancelled'}


class Constraint(Protocol):
  """Which tokens one response may go on with; the host asks it before each step."""

  @property
  def is_done(self) -> bool:
    """Whether nothing but a stop token may follow."""
    ...

  def mask(self) -> np.ndarray:
    """u32[⌈V / 32⌉]: bit t % 32 of word t // 32 says whether token t may come next."""
    ...

  def accept(self, token: int) -> None:
    """Goes on by a token that was drawn under the mask."""
    ...

  def copy(self) -> 'Constraint':
    """A constraint in the same state, for another sample."""
    ...


@dataclass(frozen=True)
class Request:
  """One prompt and how to answer it; its `num_samples` responses share one prefill.

  prompt: token ids.
  id: addresses the randomness: requests with equal ids draw equal responses.
  max_tokens: the largest number of tokens of a response, forced tokens included.
  sampler: temperature and filters.
  stop: tokens that end a response and belong to it.
  stop_strings: texts that end a response as soon as they are complete.
  forced: tokens that every response starts with.
  max_thought: drawn tokens after which the end of thinking is forced; None for responses without
    thinking.
  max_answer: the largest number of tokens after the end of thinking; None for no limit but
    `max_tokens`. It is read only where `max_thought` is set.
  top_logprobs: for how many of the most probable tokens log-probabilities are given.
  prompt_logprobs: whether those of the prompt's tokens are given; `max_tokens` may then be 0.
  constraint: what the response has to look like; each sample goes on with a copy of it.
  """

  prompt: tuple[int, ...]
  id: int
  max_tokens: int
  num_samples: int = 1
  sampler: cfg.Sampler = field(default_factory=cfg.Sampler)
  stop: tuple[int, ...] = ()
  stop_strings: tuple[str, ...] = ()
  forced: tuple[int, ...] = ()
  max_thought: int | None = None
  max_answer: int | None = None
  top_logprobs: int = 0
  prompt_logprobs: bool = False
  constraint: Constraint | None = None


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
  # The most probable tokens at each place, falling; None where nobody asked.
  top_tokens: np.ndarray | None = None  # i32[S, K]
  top_logp: np.ndarray | None = None  # f32[S, K]
  # The prompt under the model's own distribution, without temperature and filters.
  prompt_logp: np.ndarray | None = None  # f32[T], 0 for the first token
  prompt_top_tokens: np.ndarray | None = None  # i32[T, K]
  prompt_top_logp: np.ndarray | None = None  # f32[T, K]


@dataclass
class _Row:
  """What the host knows of a row of `slots.Requests` that is in use."""

  handle: int
  sample: int
  id: int
  serial: int  # how many responses were queued before this one, since the engine was made
  seen: int = 0  # tokens of the response that `advance` has reported


class Engine:
  """Continuous batching over one model. Not thread-safe: one caller at a time."""

  def __init__(self, model: Model, params: Params, config: cfg.Engine, *, seed: int,
               token_bytes: Sequence[bytes], unused_ids: Sequence[int] = (),
               think_end: tuple[int, ...] = (), version: int = 0, mesh: Mesh | None = None
               ) -> None:
    """Compiles the program.

    Args:
      model: the model that draws the responses.
      params: the policy's parameters; their weights may be packed.
      config: the engine's sizes.
      seed: addresses all noise, together with a request's id, the sample and the position.
      token_bytes: the bytes of every token of the tokenizer; ids beyond this list are never drawn.
      unused_ids: further ids that no token has and that are never drawn.
      think_end: the tokens of the marker that ends thinking.
      version: the optimiser step of `params`.
      mesh: the devices that `params` lie on; key/value heads are split over the tensor axis. None
        for the default device.
    """
    self.config, self._params = config, params
    self.version = version
    self._key = jax.random.key(seed)
    self._shape = _shape(config, model.config.vocab_size)
    self._vocabulary = _vocabulary(token_bytes, unused_ids, model.config.vocab_size, think_end)
    dtype = jnp.int8 if config.kv == 'int8' else model.init_cache(1, 1).k.dtype
    init = lambda: device.init(model, self._shape, self._vocabulary, dtype)
    memory.check_arrays(
        jax.eval_shape(init), f'The cache of {config.slots} slots of up to {config.prompt_len} + '
        f'{config.response_len} tokens', 'ask for fewer or shorter ones')
    layout = None if mesh is None else _layout(mesh, jax.eval_shape(init))
    self._everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    self._slots = jax.jit(init, out_shardings=layout)()
    self._queue: Any = _empty_queue(self._shape)  # of NumPy arrays
    self._on_device: device.Queue | None = None
    self._free = list(range(config.queue - 1, -1, -1))
    self._rows: dict[int, _Row] = {}
    self._num_handles = self._num_prompts = 0
    self._num_traces = 0

    def run(*args: Any) -> device.Slots:
      self._num_traces += 1
      return device.advance(model, self._shape, self._vocabulary, *args)

    # The device's state is donated: a call updates it in place.
    self._run = jax.jit(run, donate_argnums=3, out_shardings=layout)
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
    _check(request, self._shape, self._vocabulary.think_end)

  def submit(self, request: Request) -> int:
    """Queues a request and returns the handle that its responses carry.

    Raises:
      UserError: the request cannot be answered, and nothing is queued.
      BlockingIOError: the queue is full; try again after `advance`.
    """
    self.check(request)
    if request.num_samples > len(self._free):
      raise BlockingIOError(f'the queue has room for {len(self._free)} responses')
    handle, self._num_handles = self._num_handles, self._num_handles + 1
    for sample in range(request.num_samples):
      row = self._free.pop()
      _fill(self._queue.rows, self._shape, row, request, sample, self._num_prompts)
      tail = int(self._queue.tail)
      self._queue.order[tail % len(self._queue.order)] = row
      self._queue = dataclasses.replace(self._queue, tail=np.int32(tail + 1))
      self._rows[row] = _Row(handle, sample, request.id, tail)
    self._num_prompts += 1
    self._on_device = None
    return handle

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
    self._slots = self._run(self._params, self._key, self._on_device, self._slots,
                            np.int32(steps))
    if self._num_traces > 1:
      raise RuntimeError('the engine compiled again: its parameters changed their shapes')
    out = self._slots
    head, count, finish, tokens, logp, sampled = jax.device_get(
        (out.head, out.count, out.finish, out.tokens, out.logp, out.sampled))
    changed = []
    for row, note in list(self._rows.items()):
      # A row holds an earlier response until the device has admitted its request.
      if note.serial >= head or (count[row] == note.seen and not finish[row]):
        continue
      note.seen, num = int(count[row]), int(count[row])
      changed.append((note.handle, Response(
          note.id, note.sample, tokens[row, :num].copy(), logp[row, :num].copy(),
          sampled[row, :num].copy(), REASONS.get(int(finish[row]), ''), self.version)))
      if finish[row]:
        del self._rows[row]
        self._free.append(row)
    return changed

  def run(self, requests: Iterable[Request]) -> list[list[Response]]:
    """Answers requests to the end.

    Requests with the largest `max_tokens` start first, so that no long response runs alone at
    the end.

    Returns:
      For each request its whole responses, in the order of their samples.

    Raises:
      UserError: one of the requests cannot be answered, and none has been queued.
    """
    requests = list(requests)
    for request in requests:
      self.check(request)
    # The next request is popped from the end of this list.
    waiting = sorted(range(len(requests)), key=lambda i: requests[i].max_tokens)
    numbers: dict[int, int] = {}
    done: list[list[Response]] = [[] for _ in requests]
    while waiting or self._rows:
      while waiting and requests[waiting[-1]].num_samples <= self.room():
        number = waiting.pop()
        numbers[self.submit(requests[number])] = number
      for handle, response in self.advance(None if waiting else self._shape.response_len):
        if response.finish:
          done[numbers[handle]].append(response)
    return [sorted(group, key=lambda r: r.sample) for group in done]

  def load(self, params: Params, version: int) -> None:
    """Replaces the parameters by others of the same shapes.

    Raises:
      UserError: a response is under way, and two policies would mix in its group.
    """
    if self._rows:
      raise UserError(f'{len(self._rows)} responses of version {self.version} are under way: '
                      f'collect or cancel them before loading version {version}.')
    self._params, self.version = params, version

  def counters(self) -> dict[str, float]:
    """Counts since the engine was made, and the pages that are in use now.

    Returns:
      steps: decode steps; prefilled: prompt tokens that went through the model; occupancy: the
      share of slots that drew a token, over all steps; pages_in_use.
    """
    steps, busy, prefilled, holders = jax.device_get(
        (self._slots.steps, self._slots.busy, self._slots.prefilled, self._slots.holders))
    return {'steps': int(steps), 'prefilled': int(prefilled),
            'occupancy': float(busy) / max(1, int(steps) * self.config.slots),
            'pages_in_use': int((holders[1:] > 0).sum()),
            'kept_pages': 0, 'prefix_hits': 0, 'prefix_hit_tokens': 0}


# --- Rows of arrays -------------------------------------------------------------------


def _shape(config: cfg.Engine, vocab_size: int) -> device.Shape:
  sequence = -(-(config.prompt_len + config.response_len) // config.page_size)
  # Pages for every slot's longest sequence, for one prompt that is kept for sharing, and page 0.
  most = config.slots * sequence + -(-config.prompt_len // config.page_size) + 1
  return device.Shape(
      slots=config.slots, page_size=config.page_size, num_pages=config.num_pages or most,
      queue=config.queue, prompt_len=config.prompt_len, response_len=config.response_len,
      prefill_chunk=config.prefill_chunk, num_stop=4, num_forced=16, num_strings=8,
      string_len=32, num_banned=16,
      vocab_size=vocab_size)


def _layout(mesh: Mesh, slots: device.Slots) -> Any:
  """Shardings of the state: pages are split by heads, all else is replicated."""
  everywhere = NamedSharding(mesh, PartitionSpec())
  by_heads = NamedSharding(mesh, PartitionSpec(None, SAMPLE['kv_heads']))
  layout = jax.tree.map(lambda _: everywhere, slots)
  return dataclasses.replace(layout, cache=jax.tree.map(lambda _: by_heads, slots.cache))


def _vocabulary(token_bytes: Sequence[bytes], unused_ids: Sequence[int], vocab_size: int,
                think_end: tuple[int, ...]) -> device.Vocabulary:
  is_token = np.arange(vocab_size) < len(token_bytes)
  is_token[list(unused_ids)] = False
  return device.Vocabulary(think_end, token_table(token_bytes, vocab_size), jnp.asarray(is_token))


def _empty_queue(shape: device.Shape) -> Any:
  ints = lambda *dims: np.zeros((shape.queue, *dims), np.int32)
  fields: dict[str, Any] = dict(  # NumPy arrays until `Engine.advance` hands them to the device.
      tokens=ints(shape.prompt_len), lengths=ints(), ids=ints(), samples=ints(), prompts=ints(),
      max_tokens=ints(), max_thought=ints(), max_answer=ints(), forced=ints(shape.num_forced),
      num_forced=ints(), stop=ints(shape.num_stop),
      strings=np.zeros((shape.queue, shape.num_strings, shape.string_len), np.uint8),
      string_lens=ints(shape.num_strings),
      samplers=RowSamplers.of([cfg.Sampler()] * shape.queue, shape.vocab_size, shape.num_banned),
      cancelled=np.zeros(shape.queue, bool))
  ring: dict[str, Any] = dict(order=ints(), tail=np.int32(0))
  return device.Queue(device.Requests(**fields), **ring)


def _fill(rows: Any, shape: device.Shape, row: int, request: Request, sample: int,
          prompt: int) -> None:
  """Writes the row of one response of a request in place; `prompt` is its `Requests.prompts`."""
  for name, values, filler in (('tokens', request.prompt, 0), ('forced', request.forced, 0),
                               ('stop', request.stop, -1)):
    array = getattr(rows, name)
    array[row] = filler
    array[row, :len(values)] = values
  rows.strings[row], rows.string_lens[row] = 0, 0
  for i, text in enumerate(s.encode() for s in request.stop_strings):
    rows.strings[row, i, -len(text):] = np.frombuffer(text, np.uint8)
    rows.string_lens[row, i] = len(text)
  sampler = RowSamplers.of([request.sampler], shape.vocab_size, shape.num_banned)
  for array, values in zip(jax.tree.leaves(rows.samplers), jax.tree.leaves(sampler), strict=True):
    array[row] = values[0]
  for name, value in (
      ('lengths', len(request.prompt)), ('ids', np.uint32(request.id % 2**32).astype(np.int32)),
      ('samples', sample), ('prompts', prompt), ('max_tokens', request.max_tokens),
      ('max_thought', -1 if request.max_thought is None else request.max_thought),
      ('max_answer', request.max_tokens if request.max_answer is None else request.max_answer),
      ('num_forced', len(request.forced)), ('cancelled', False)):
    getattr(rows, name)[row] = value


def _check(request: Request, shape: device.Shape, think_end: tuple[int, ...]) -> None:
  def refuse(what: str) -> NoReturn:
    raise UserError(f'This cannot be answered: {what}.')

  if not request.prompt:
    refuse('the prompt is empty; start it with the token that begins a text')
  if len(request.prompt) > shape.prompt_len:
    refuse(f'the prompt has {len(request.prompt)} tokens and the cache takes {shape.prompt_len}; '
           'shorten it or raise Engine.prompt_len')
  if not 1 <= request.max_tokens <= shape.response_len:
    refuse(f'max_tokens = {request.max_tokens}; write 1 to {shape.response_len}, or raise '
           'Engine.response_len')
  if not 1 <= request.num_samples <= shape.queue:
    refuse(f'num_samples = {request.num_samples}; write 1 to {shape.queue}')
  for name, ids in (('prompt', request.prompt), ('forced', request.forced),
                    ('stop', request.stop), ('banned', request.sampler.banned)):
    for token in ids:
      if not 0 <= token < shape.vocab_size:
        refuse(f'{name} holds token {token}, outside the vocabulary of {shape.vocab_size}')
  for name, values, most in (
      ('stop', request.stop, shape.num_stop), ('forced', request.forced, shape.num_forced),
      ('stop_strings', request.stop_strings, shape.num_strings),
      ('banned', request.sampler.banned, shape.num_banned)):
    if len(values) > most:
      refuse(f'{len(values)} entries in {name}; at most {most} are taken')
  for text in request.stop_strings:
    if not 1 <= len(text.encode()) <= shape.string_len or '\0' in text:
      refuse(f'stop string {text!r}; write 1 to {shape.string_len} bytes without NUL')
  for name, budget in (('max_thought', request.max_thought), ('max_answer', request.max_answer)):
    if budget is not None and budget < 0:
      refuse(f'{name} = {budget}; write 0 or more')
  if request.top_logprobs or request.prompt_logprobs or request.constraint is not None:
    refuse('top_logprobs, prompt_logprobs and constraints are not there yet')
  if request.max_thought is not None and not think_end:
    refuse('max_thought is set, but this model has no marker that ends thinking')
