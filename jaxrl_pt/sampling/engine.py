"""The engine: requests in, tokens out, while the device keeps its slots busy.

`Engine` is the host's half of `slots`: it checks requests, keeps their rows, hands them over
and collects what has been drawn. Its one program is compiled when the engine is made, for one
set of shapes; to compile again is an error.

Floating-point sums depend on how many rows a product has, so a change of `Engine.slots` or of
`prefill_chunk` can move a logit by a rounding and, at a near-tie, flip a token; most of all in
bfloat16 on an accelerator. The products of ternary weights take no part in that (sums of
integers are exact), nor does int8's absmax; int4's absmean, norms, attention and head do.
"""

from collections.abc import Iterable, Sequence
import dataclasses
from dataclasses import dataclass, field
from typing import Any, NoReturn

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


@dataclass(frozen=True)
class Request:
  """One prompt and how to answer it; `num_samples` responses share its prefill.

  prompt: token ids. id: addresses the randomness; equal ids draw equal responses.
  forced: tokens that every response starts with. stop: tokens that end a response and belong
  to it; stop_strings: texts that end it as soon as they are complete.
  max_thought: drawn tokens after which the end of thinking is forced, None for a response
  without thinking; max_answer: tokens after the end of thinking.
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


@dataclass(frozen=True)
class Response:
  """A response so far, or (with a finish reason) whole."""

  id: int
  sample: int
  tokens: np.ndarray  # i32[S]
  logp: np.ndarray  # f32[S] under the distribution drawn from; 0 where a token was forced
  sampled: np.ndarray  # f32[S] 1 where a token was drawn, 0 where it was forced
  finish: str  # '' while it runs, or 'stop', 'length', 'stop_string', 'cancelled'
  version: int  # of the policy that drew it


@dataclass
class _Row:
  """The host's note of a row in use."""

  handle: int
  sample: int
  id: int
  serial: int  # its place among all that were ever queued
  seen: int = 0  # tokens already reported


class Engine:
  """Continuous batching over one model. Not thread-safe: one caller at a time."""

  def __init__(self, model: Model, params: Params, config: cfg.Engine, *, seed: int,
               token_bytes: Sequence[bytes], unused_ids: Sequence[int] = (),
               think_end: tuple[int, ...] = (), version: int = 0, mesh: Mesh | None = None
               ) -> None:
    """Compiles the program.

    Args:
      params: the policy; packed weights too.
      config: sizes.
      seed: of all noise, with a request's id, sample and position.
      token_bytes: of every token of the tokenizer; ids beyond them are never drawn, nor are
        `unused_ids`, which no token has either.
      think_end: tokens of the marker that ends thinking.
      version: optimiser step of `params`.
      mesh: over which `params` lie; key/value heads are split over its tensor axis. None for
        the default device.
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
    """Rows that can be submitted before some response is collected."""
    return len(self._free)

  def check(self, request: Request) -> None:
    """Says what is wrong with a request.

    Raises:
      UserError: what, and what the engine takes.
    """
    _check(request, self._shape, self._vocabulary.think_end)

  def submit(self, request: Request) -> int:
    """Queues a request and returns the handle that its responses carry.

    Raises:
      UserError: the request is wrong; nothing is queued.
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
    """Ends the responses of a request at the next step; they are still collected."""
    for row, note in self._rows.items():
      if note.handle == handle:
        self._queue.rows.cancelled[row] = True
    self._on_device = None

  # --- Work -----------------------------------------------------------------------------

  def advance(self, max_steps: int | None = None) -> list[tuple[int, Response]]:
    """Decodes up to `max_steps` tokens a slot (default `Engine.steps_per_call`).

    Returns:
      (handle, response) for every response that has new tokens or has finished. A finished
      one is forgotten here.
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
    news = []
    for row, note in list(self._rows.items()):
      if note.serial >= head or (count[row] == note.seen and not finish[row]):
        continue  # Until it is admitted, the row holds an earlier response.
      note.seen, num = int(count[row]), int(count[row])
      news.append((note.handle, Response(
          note.id, note.sample, tokens[row, :num].copy(), logp[row, :num].copy(),
          sampled[row, :num].copy(), REASONS.get(int(finish[row]), ''), self.version)))
      if finish[row]:
        del self._rows[row]
        self._free.append(row)
    return news

  def run(self, requests: Iterable[Request]) -> list[list[Response]]:
    """Answers requests to the end; those of the largest budget start first, so that no long
    response is left to run alone.

    Returns:
      For each request its whole responses, by sample.

    Raises:
      UserError: one of the requests is wrong; none has been queued.
    """
    requests = list(requests)
    for request in requests:
      self.check(request)
    waiting = sorted(range(len(requests)), key=lambda i: requests[i].max_tokens)  # From its end.
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
    """Takes other parameters of the same shapes.

    Raises:
      UserError: a response is under way: its group would mix two policies.
    """
    if self._rows:
      raise UserError(f'{len(self._rows)} responses of version {self.version} are under way: '
                      f'collect or cancel them before loading version {version}.')
    self._params, self.version = params, version

  def counters(self) -> dict[str, float]:
    """Decode steps, share of slots that drew in them, and prompt tokens computed, so far."""
    steps, busy, prefilled, references = jax.device_get(
        (self._slots.steps, self._slots.busy, self._slots.prefilled, self._slots.references))
    return {'steps': int(steps), 'prefilled': int(prefilled),
            'occupancy': float(busy) / max(1, int(steps) * self.config.slots),
            'pages_in_use': int((references[1:] > 0).sum())}


# --- Rows of arrays -------------------------------------------------------------------


def _shape(config: cfg.Engine, vocab_size: int) -> device.Shape:
  sequence = -(-(config.prompt_len + config.response_len) // config.page_size)
  # A slot's pages, a prompt kept for sharing, and nobody's page.
  most = config.slots * sequence + -(-config.prompt_len // config.page_size) + 1
  return device.Shape(
      slots=config.slots, page_size=config.page_size, num_pages=config.num_pages or most,
      queue=config.queue, prompt_len=config.prompt_len, response_len=config.response_len,
      prefill_chunk=config.prefill_chunk, num_stop=4, num_forced=16, num_strings=8,
      string_len=32, num_banned=16,
      vocab_size=vocab_size)


def _layout(mesh: Mesh, slots: device.Slots) -> Any:
  """Shardings of the state: pages by heads, all else everywhere."""
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
  fields: dict[str, Any] = dict(  # NumPy until it is handed over.
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
  """Writes a response's row in place."""
  for name, values, filler in (('tokens', request.prompt, 0), ('forced', request.forced, 0),
                               ('stop', request.stop, -1)):
    array = getattr(rows, name)
    array[row] = filler
    array[row, :len(values)] = values
  rows.strings[row], rows.string_lens[row] = 0, 0
  for i, text in enumerate(s.encode() for s in request.stop_strings):
    rows.strings[row, i, -len(text):] = np.frombuffer(text, np.uint8)
    rows.string_lens[row, i] = len(text)
  one = RowSamplers.of([request.sampler], shape.vocab_size, shape.num_banned)
  for array, values in zip(jax.tree.leaves(rows.samplers), jax.tree.leaves(one), strict=True):
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
  if request.max_thought is not None and not think_end:
    refuse('max_thought is set, but this model has no marker that ends thinking')
