"""The arrays of the engine's requests, which the host writes row by row."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.parallel.rules import SAMPLE
from jaxrl_pt.sampling.engine_request import Request
from jaxrl_pt.sampling.policies import RowSamplers
from jaxrl_pt.sampling.prefix_cache import PrefixCache
from jaxrl_pt.sampling.requests import (
  MOST_STOPS,
  NO_MASK,
  NO_TOKEN,
  Documents,
  Queue,
  Requests,
  Shape,
  Vocabulary,
  pages_of,
)
from jaxrl_pt.sampling.state import Slots
from jaxrl_pt.token_bytes import token_table


def shape(config: cfg.Engine, vocab_size: int) -> Shape:
  shape = Shape(
      slots=config.slots, page_size=config.page_size, num_pages=config.num_pages,
      documents=2 * config.queue + config.slots, queue=config.queue,
      document_len=config.prompt_len, tail_len=1, response_len=config.response_len,
      lanes=config.prefill_rows, chunk=config.prefill_chunk, vocab_size=vocab_size,
      num_stop=MOST_STOPS, num_forced=16, num_strings=8, string_len=32, num_banned=16,
      num_top=min(config.top_logprobs, vocab_size), num_masks=config.constrained,
      sparse=config.sparse if isinstance(config.sparse, cfg.ReSA) else None,
      drafts=None if isinstance(config.drafts, cfg.NoDrafts) else config.drafts)
  # Pages for every slot's longest sequence, for the next prompt, and page 0.
  most = config.slots * shape.table_len + pages_of(config.prompt_len, config.page_size) + 1
  return shape if config.num_pages else shape._replace(num_pages=most)


def layout(mesh: Mesh, slots: Slots) -> Any:
  """Shardings of the state: pages are split by heads, all else is replicated."""
  everywhere = NamedSharding(mesh, PartitionSpec())
  by_heads = NamedSharding(mesh, PartitionSpec(SAMPLE['kv_heads']))
  layout = jax.tree.map(lambda _: everywhere, slots)
  if not isinstance(slots.sparse, tuple):
    bounds = NamedSharding(mesh, PartitionSpec(None, None, SAMPLE['kv_heads']))
    layout = dataclasses.replace(layout, sparse=dataclasses.replace(layout.sparse, bounds=bounds))
  return dataclasses.replace(layout, cache=jax.tree.map(lambda _: by_heads, slots.cache))


def vocabulary(token_bytes: Sequence[bytes], unused_ids: Sequence[int], vocab_size: int,
                think_end: tuple[int, ...], think_start: tuple[int, ...]) -> Vocabulary:
  is_token = np.arange(vocab_size) < len(token_bytes)
  is_token[list(unused_ids)] = False
  return Vocabulary(think_end, token_table(token_bytes, vocab_size), jnp.asarray(is_token),
                    think_start)


def empty_queue(shape: Shape, cache: PrefixCache) -> Any:
  ints = lambda *dims: np.zeros((shape.queue, *dims), np.int32)
  fields: dict[str, Any] = dict(  # NumPy arrays until `Engine.advance` hands them to the device.
      document=ints(), prefix=ints(), tail=ints(shape.tail_len), num_tail=ints() + 1, ids=ints(),
      samples=ints(), keep=ints(), max_tokens=ints(), max_thought=ints(), max_answer=ints(),
      forced=ints(shape.num_forced), num_forced=ints(), stop=ints(shape.num_stop),
      strings=np.zeros((shape.queue, shape.num_strings, shape.string_len), np.uint8),
      string_lens=ints(shape.num_strings),
      samplers=RowSamplers.of([cfg.Sampler()] * shape.queue, shape.vocab_size, shape.num_banned),
      cancelled=np.zeros(shape.queue, bool), wants_top=np.zeros(shape.queue, bool),
      begins_thinking=np.zeros(shape.queue, bool),
      mask=ints() + NO_MASK)
  documents: dict[str, Any] = dict(
      tokens=cache.tokens, lengths=cache.lengths, parents=cache.parents, shared=cache.shared,
      content=cache.content, asked=cache.asked)
  ring: dict[str, Any] = dict(
      order=ints(), tail=np.int32(0),
      masks=np.zeros((shape.num_masks, -(-shape.vocab_size // 32)), np.uint32))
  return Queue(Documents(**documents), Requests(**fields), **ring)


def fill(rows: Any, shape: Shape, row: int, request: Request, sample: int, document: int,
          keep: int, mask: int) -> None:
  """Writes the row of one response of a request in place.

  Args:
    rows: the `Requests`, of NumPy arrays.
    shape: the program's sizes.
    row: the response's row.
    request, sample: the request, and the number of the response among its samples.
    document: the row of its prompt's document.
    keep: the row of the document that its sequence becomes, or NO_DOCUMENT.
    mask: its row of `Queue.masks`, or NO_MASK.
  """
  for name, values, filler in (('tail', request.prompt[-1:], 0), ('forced', request.forced, 0),
                               ('stop', request.stop, NO_TOKEN)):
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
      ('document', document), ('prefix', len(request.prompt) - 1), ('keep', keep),
      ('ids', np.uint32(request.id % 2**32).astype(np.int32)),
      ('samples', sample), ('max_tokens', request.max_tokens),
      ('max_thought', -1 if request.max_thought is None else request.max_thought),
      ('max_answer', request.max_tokens if request.max_answer is None else request.max_answer),
      ('begins_thinking', request.begins_thinking), ('num_forced', len(request.forced)),
      ('cancelled', False),
      ('wants_top', request.top_logprobs > 0), ('mask', mask)):
    getattr(rows, name)[row] = value
