"""The learner's side of rectified sparse decoding: it reads the blocks that the sampler read.

    dense   [document | own tokens]   the keys and values that rectification leaves behind
    sparse  [response tokens]         the steps that drew the response

Before a chunk of f response tokens starts, all keys and values of the tokens before it are those of
dense decoding; inside the chunk they are those of the sparse steps. So a chunk is a branch of the
dense sequence. A query of the sparse stream sees, of the positions up to its own, those in the
blocks that were selected for it (per layer and key/value head): before the chunk's start with
keys and values of the dense stream, from there on with those of the sparse stream. A token's
log-probability comes from the sparse stream alone, and gradients flow through both.

The selection is a constant, as a top-k always is, so that π_train = π_sampler up to rounding and
the gradient is that of the sampler's own computation.

E is the model width or a head's, D counts documents and R branches of each.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt.models import kv_cache
from jaxrl_pt.models.base import Model
from jaxrl_pt.nn import block_selection
from jaxrl_pt.nn.attention import MASKED, QUERIES_AT_ONCE
from jaxrl_pt.sampling.prefill import Prefilled
from jaxrl_pt.types import Array, Params, Prompts, SelectedBlocks

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class _Streams(NamedTuple):
  """How a row [document | own tokens of the branches | chunks of the branches] is cut."""

  lengths_DR: Array  # i32[D, R] how many tokens of its document each branch sees
  num_suffix: int  # own tokens of a branch before its response
  num_own: int  # own tokens of a branch in the dense stream
  num_chunks: int  # C, chunks of a branch in the sparse stream
  window: int  # f, tokens of a chunk


def response_hidden(model: Model, params: Params, prompts: Prompts, tokens_NGS: Array,
                    selected: SelectedBlocks, prefilled: Prefilled | None = None) -> Array:
  """f[N, G, S, E]: the hidden state that the sampler drew each response token from.

  Args:
    model: the model that scores the responses.
    params: its parameters.
    prompts: the prompts, which may share documents and have suffixes.
    tokens_NGS: i32[N, G, S] responses, of at least two tokens.
    selected: the blocks that were read when they were drawn.
    prefilled: the prompts' documents where they have gone through the model already.
  """
  (num_docs, length), num_tokens = prompts.tokens.shape, tokens_NGS.shape[-1]
  lengths_DR = jnp.repeat(prompts.lengths.reshape(num_docs, -1), tokens_NGS.shape[1], 1)
  window = min(selected.window or num_tokens, num_tokens - 1)
  num_chunks = -(-(num_tokens - 1) // window)
  streams = _Streams(lengths_DR, prompts.num_suffix,
                     prompts.num_suffix + (num_chunks - 1) * window, num_chunks, window)
  tokens, positions = _rows(prompts, tokens_NGS, streams)
  if prefilled is None:
    tokens = jnp.concatenate([prompts.tokens, tokens], 1)
    places = jnp.broadcast_to(jnp.arange(length), prompts.tokens.shape)
    positions = jnp.concatenate([places, positions], 1)
  bits = _bits_by_layer(selected, num_docs, streams)
  hidden, _ = model.extend(params, tokens, positions, (),
                           _attend(model, streams, bits, selected.block, length, prefilled))
  if prefilled is None:
    first = _first(hidden[:, :length], hidden[:, length:], streams)
    hidden = hidden[:, length:]
  else:
    first = _first(prefilled.hidden, hidden, streams)
  sparse = hidden[:, lengths_DR.shape[1] * streams.num_own:]
  sparse = sparse.reshape(*lengths_DR.shape, -1, sparse.shape[-1])[:, :, :num_tokens - 1]
  return jnp.concatenate([first[:, :, None], sparse], 2).reshape(*tokens_NGS.shape, -1)


# --- Rows -------------------------------------------------------------------------


def _rows(prompts: Prompts, tokens_NGS: Array, streams: _Streams) -> tuple[Array, Array]:
  """i32[D, R (O + C f)] the tokens after the documents, own ones and then chunks, and positions."""
  num_docs, num_branches = streams.lengths_DR.shape
  response = tokens_NGS.reshape(num_docs, num_branches, -1)[..., :-1]
  num_fed = streams.num_chunks * streams.window
  response = jnp.pad(response, ((0, 0), (0, 0), (0, num_fed - response.shape[-1])))
  own = response[..., :streams.num_own - streams.num_suffix]
  if streams.num_suffix:
    suffix = jnp.repeat(prompts.suffix[:, None], num_branches, 1)
    own = jnp.concatenate([suffix, own], -1)
  ends = streams.lengths_DR[..., None]
  positions = ends + jnp.arange(streams.num_own), (
      ends + streams.num_suffix + jnp.arange(num_fed))
  side_by_side = lambda parts: jnp.concatenate([x.reshape(num_docs, -1) for x in parts], 1)
  return side_by_side((own, response)), side_by_side(positions)


def _bits_by_layer(selected: SelectedBlocks, num_docs: int, streams: _Streams) -> Array:
  """u32[L, D, R, C, f, K, W]: the blocks that each query of the sparse stream sees."""
  _, _, num_tokens, *rest = selected.bits.shape
  num_fed = streams.num_chunks * streams.window
  bits = selected.bits.reshape(num_docs, -1, num_tokens, *rest)[:, :, 1:]
  bits = jnp.pad(bits, [(0, 0)] * 2 + [(0, num_fed - num_tokens + 1)] + [(0, 0)] * 3)
  bits = bits.reshape(*bits.shape[:2], streams.num_chunks, streams.window, *rest)
  return jnp.moveaxis(bits, 4, 0)


def _first(document_hidden: Array, hidden: Array, streams: _Streams) -> Array:
  """f[D, R, E]: the states that first tokens are drawn from, of the dense stream."""
  if streams.num_suffix:
    num_branches = streams.lengths_DR.shape[1]
    own = hidden[:, :num_branches * streams.num_own]
    own = own.reshape(*streams.lengths_DR.shape, streams.num_own, -1)
    return own[:, :, streams.num_suffix - 1]
  # The gradients of all branches that start at one token are summed in float32, as it is read.
  first = jnp.take_along_axis(document_hidden.astype(jnp.float32),
                              (streams.lengths_DR - 1)[..., None], axis=1)
  return first.astype(document_hidden.dtype)


# --- Attention --------------------------------------------------------------------


def _attend(model: Model, streams: _Streams, bits_L: Array, block: int, length: int,
            prefilled: Prefilled | None) -> kv_cache.Attend:
  """Attention of both streams; `bits_L` is from `_bits_by_layer`."""
  num_docs, num_branches = streams.lengths_DR.shape
  end = num_branches * streams.num_own

  def attend(q: Array, k: Array, v: Array, cache: Any, layer: Array) -> tuple[Array, Any]:
    outs = []
    if prefilled is None:
      k_doc, v_doc = k[:, :length], v[:, :length]
      outs.append(model.ops.attention(q[:, :length], k_doc, v_doc,
                                      jnp.ones((num_docs, length), jnp.int32)))
      q, k, v = (x[:, length:] for x in (q, k, v))
      k_doc, v_doc = jnp.swapaxes(k_doc, 1, 2), jnp.swapaxes(v_doc, 1, 2)
    else:
      k_doc, v_doc = prefilled.cache.k[layer], prefilled.cache.v[layer]
    if end:
      outs.append(kv_cache.whole_branches(q[:, :end], k[:, :end], v[:, :end], k_doc, v_doc,
                                          streams.lengths_DR))
    own = lambda x: x[:, :end].reshape(
        num_docs, num_branches, streams.num_own, *x.shape[2:]).transpose(0, 3, 1, 2, 4)
    chunks = lambda x: x[:, end:].reshape(
        num_docs, num_branches, streams.num_chunks, streams.window, *x.shape[2:])
    out = chunk_attention(chunks(q), _Dense(k_doc, v_doc, own(k), own(v)), chunks(k), chunks(v),
                          bits_L[layer], block, streams)
    outs.append(out.reshape(num_docs, -1, *out.shape[-2:]))
    return jnp.concatenate(outs, 1), cache

  return attend


class _Dense(NamedTuple):
  """Keys and values of the dense stream, in one layer."""

  k_document: Array  # f[D, K, T, E]
  v_document: Array
  k_own: Array  # f[D, K, R, O, E]
  v_own: Array


def chunk_attention(q_DRCFHE: Array, dense: _Dense, k_DRCFKE: Array, v_DRCFKE: Array,
                    bits_DRCFKW: Array, block: int, streams: _Streams) -> Array:
  """Attention of the sparse stream, which takes some chunks at a time.

    out = softmax(q [K_dense[j < start]; K_chunk[j ≤ i]]ᵀ / √E) [V_dense; V_chunk]

  over the positions j in the blocks whose bits are set. The backward pass computes the scores
  again.

  Returns:
    f[D, R, C, F, H, E] in q's dtype; the softmax is float32.
  """
  num_chunks, window = q_DRCFHE.shape[2:4]
  size = min(num_chunks, max(1, QUERIES_AT_ONCE // window))
  starts = jnp.arange(-(-num_chunks // size)) * size
  attend = functools.partial(_some_chunks, block=block, streams=streams)
  if len(starts) == 1:
    return attend(dense, q_DRCFHE, k_DRCFKE, v_DRCFKE, bits_DRCFKW, starts[0])

  def turns(x: Array) -> Array:
    x = jnp.pad(x, [(0, 0)] * 2 + [(0, -num_chunks % size)] + [(0, 0)] * (x.ndim - 3))
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)

  # The loop adds up the gradients of keys and values in the type that they have here.
  dense = jax.tree.map(lambda x: x.astype(jnp.float32), dense)
  out = jax.lax.map(jax.checkpoint(lambda x: attend(dense, *x)),
                    (*map(turns, (q_DRCFHE, k_DRCFKE, v_DRCFKE, bits_DRCFKW)), starts))
  out = jnp.moveaxis(out, 0, 2)
  return out.reshape(*out.shape[:2], -1, *out.shape[4:])[:, :, :num_chunks]


def _some_chunks(dense: _Dense, q: Array, k: Array, v: Array, bits: Array, first: Array, *,
                 block: int, streams: _Streams) -> Array:
  """`chunk_attention` of some chunks, of which number `first` is the first."""
  num_docs, num_branches, num_chunks, window, num_heads, width = q.shape
  num_groups = k.shape[4]
  length, num_own = dense.k_document.shape[2], dense.k_own.shape[3]
  shape = num_docs, num_groups, num_branches, num_heads // num_groups, num_chunks, window
  grouped = q.reshape(*q.shape[:4], num_groups, -1, width).transpose(0, 4, 1, 5, 2, 3, 6)
  as_type = lambda x: x.astype(q.dtype)
  k_chunk, v_chunk = (x.transpose(0, 4, 1, 2, 3, 5) for x in (k, v))  # [D, K, R, C, F, E]
  # Sizes are named, since there may be no own tokens, of which −1 cannot be inferred.
  by_document = lambda x: x.reshape(*shape[:2], math.prod(shape[2:]), x.shape[-1])
  by_branch = lambda x: x.reshape(*shape[:3], math.prod(shape[3:]), x.shape[-1])
  by_chunk = lambda x: x.swapaxes(3, 4).reshape(*shape[:3], num_chunks, -1, x.shape[-1])
  from_chunk = lambda x: x.reshape(*shape[:3], num_chunks, shape[3], window, -1).swapaxes(3, 4)
  scores = jnp.concatenate([
      _dot('dkqe,dkte->dkqt', by_document(grouped),
           as_type(dense.k_document)).reshape(*shape, length),
      _dot('dkrqe,dkroe->dkrqo', by_branch(grouped),
           as_type(dense.k_own)).reshape(*shape, num_own),
      from_chunk(_dot('dkrcqe,dkrcje->dkrcqj', by_chunk(grouped), as_type(k_chunk)))], -1)
  seen = _seen(bits, first, length, block, streams)  # [D, R, C, F, K, T + O + F]
  seen = seen.transpose(0, 4, 1, 2, 3, 5)[:, :, :, None]
  weights = as_type(jax.nn.softmax(jnp.where(seen, scores * width**-0.5, MASKED), -1))
  to_document, to_own, to_chunk = jnp.split(weights, [length, length + num_own], -1)
  out = (_dot('dkqt,dkte->dkqe', by_document(to_document),
              as_type(dense.v_document)).reshape(*shape, width)
         + _dot('dkrqo,dkroe->dkrqe', by_branch(to_own),
                as_type(dense.v_own)).reshape(*shape, width)
         + from_chunk(_dot('dkrcqj,dkrcje->dkrcqe', by_chunk(to_chunk), as_type(v_chunk))))
  return as_type(out).transpose(0, 2, 4, 5, 1, 3, 6).reshape(q.shape)


def _seen(bits_DRCFKW: Array, first: Array, length: int, block: int, streams: _Streams) -> Array:
  """bool[D, R, C, F, K, T + O + F]: which keys of document, own tokens and chunk a query sees."""
  is_read = block_selection.unpacked(bits_DRCFKW)
  num_chunks, window = bits_DRCFKW.shape[2:4]
  starts_C = (first + jnp.arange(num_chunks)) * window  # Response tokens before each chunk.
  ends_DR1 = streams.lengths_DR[..., None]

  def selected(positions: Array) -> Array:
    """Whether the blocks of positions i32[D, R, C or 1, ·] are read, bool[D, R, C, F, K, ·]."""
    at = (positions // block)[:, :, :, None, None]
    return jnp.take_along_axis(is_read, jnp.broadcast_to(
        at, (*is_read.shape[:-1], at.shape[-1])), -1, mode='clip')

  places = jnp.arange(length)
  in_document = selected(jnp.broadcast_to(places, (*ends_DR1.shape, length)))
  in_document &= (places < ends_DR1)[:, :, None, None, None]
  own = jnp.arange(streams.num_own)
  in_own = selected((ends_DR1 + own)[:, :, None])
  in_own &= (own < streams.num_suffix + starts_C[:, None])[:, None, None]
  chunk = jnp.arange(window)
  in_chunk = selected(ends_DR1[..., None] + streams.num_suffix + starts_C[:, None] + chunk)
  in_chunk &= (chunk <= chunk[:, None])[:, None]
  return jnp.concatenate([in_document, in_own, in_chunk], -1)
