"""The distribution that each slot draws its next token from, and the noise that it draws with."""

import jax
import jax.numpy as jnp

from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling.policies import Drawn, RowSamplers, draw, filtered_logits, filtered_rows
from jaxrl_pt.sampling.requests import NO_MASK, Queue, Requests, Shape, Vocabulary
from jaxrl_pt.types import Array


def filtered(shape: Shape, vocabulary: Vocabulary, queue: Queue, asked: Requests,
             logits_BV: Array) -> Array:
  """f32[B, V]: logits of the distribution that each slot draws from."""
  if shape.sampler is not None:
    return filtered_logits(logits_BV, shape.sampler)
  assert isinstance(asked.samplers, RowSamplers) and vocabulary.is_token is not None
  allowed = vocabulary.is_token
  if shape.num_masks:
    words = queue.masks[jnp.maximum(asked.mask, 0)]
    tokens = jnp.arange(shape.vocab_size)
    bits = (words[:, tokens // 32] >> (tokens % 32).astype(jnp.uint32)) & 1
    allowed &= (bits == 1) | (asked.mask == NO_MASK)[:, None]
  return filtered_rows(logits_BV, asked.samplers, allowed)


def drawn(model: Model, key: Array, asked: Requests, positions_B: Array, filtered_BV: Array
          ) -> Drawn:
  """The tokens at these positions.

  Their noise is addressed by (key, batch, id, sample, position), or without the batch where the
  requests name none.
  """
  if isinstance(asked.batch, tuple):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, asked.ids)
  else:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, asked.batch)
    keys = jax.vmap(jax.random.fold_in)(keys, asked.ids)
  keys = jax.vmap(jax.random.fold_in)(keys, asked.samples)
  whole = lambda x: model.constrain(x, (None,) * x.ndim)
  return draw(jax.vmap(jax.random.fold_in)(keys, positions_B), filtered_BV, whole)
