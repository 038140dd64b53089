"""Groups in parts: a document in several rows of the learner, which share out its responses.

A row of the learner holds a document and all responses to its prompts, which for 16 responses of
20,480 tokens no device can hold. `split` makes of each row several, each with the document and a
part of every group; they are then accumulated like other rows. The gradient stays what it was,
since advantages and token weights are those of the whole batch; the document goes through the
model once more for each further part.

D counts documents, N prompts, G a group's responses and m the parts of a group.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxrl_pt.types import Array, Prompts, TrainBatch

Tree = TypeVar('Tree')


def split(batch: TrainBatch, parts: int) -> TrainBatch:
  """The batch with D · m documents, N · m prompts, and groups of G / m responses.

  The rows of one document are neighbours. `rows`, which numbers them, must not be set yet.
  """
  if parts == 1:
    return batch
  num_docs = batch.prompts.tokens.shape[0]
  responses = dataclasses.replace(batch, prompts=())
  responses = split_responses(responses, num_docs, parts)
  return dataclasses.replace(responses, prompts=repeat(batch.prompts, parts))


def repeat(prompts: Prompts, parts: int) -> Prompts:
  """Each document with its prompts `parts` times, one copy after the other."""
  num_docs = prompts.tokens.shape[0]

  def each(x: Array) -> Array:
    by_doc = x.reshape(num_docs, -1, *x.shape[1:])
    return jnp.repeat(by_doc, parts, axis=0).reshape(-1, *x.shape[1:])

  repeated: Prompts = jax.tree.map(each, prompts)
  return repeated


def split_responses(tree: Tree, num_docs: int, parts: int) -> Tree:
  """[N, G, …] → [N · m, G / m, …] for every array, in the order of `repeat`."""
  def each(x: Array) -> Array:
    by_part = x.reshape(num_docs, -1, parts, x.shape[1] // parts, *x.shape[2:])
    return by_part.swapaxes(1, 2).reshape(-1, x.shape[1] // parts, *x.shape[2:])

  divided: Tree = jax.tree.map(each, tree)
  return divided


def join_responses(tree: Tree, num_docs: int, parts: int) -> Tree:
  """The inverse of `split_responses`: [N · m, G / m, …] → [N, G, …]."""
  def each(x: Array) -> Array:
    by_part = x.reshape(num_docs, parts, -1, *x.shape[1:])
    return by_part.swapaxes(1, 2).reshape(-1, parts * x.shape[1], *x.shape[2:])

  joined: Tree = jax.tree.map(each, tree)
  return joined
