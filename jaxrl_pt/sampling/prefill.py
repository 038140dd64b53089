"""The forward pass over whole documents, which the fused step's sampler and learner share.

D counts documents and E is the model width.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_pt.models import kv_cache
from jaxrl_pt.models.base import Model
from jaxrl_pt.types import Array, Params


class Prefilled(NamedTuple):
  """Documents that have gone through the model."""

  hidden: Array  # f[D, T, E] hidden states after the last layer
  cache: kv_cache.KVCache  # T slots for each document


def prefill(model: Model, params: Params, tokens_DT: Array) -> Prefilled:
  """Runs right-padded documents into a fresh cache of T slots.

  Padding leaves garbage in the slots from a document's length on, which no query sees.

  Args:
    model: the model that draws the responses.
    params: its parameters.
    tokens_DT: i32[D, T].
  """
  num_rows, num_tokens = tokens_DT.shape
  positions = jnp.broadcast_to(jnp.arange(num_tokens), tokens_DT.shape)
  return Prefilled(*model.extend(params, tokens_DT, positions, model.init_cache(*tokens_DT.shape),
                                 kv_cache.prompts(model.ops, num_rows, num_tokens)))
