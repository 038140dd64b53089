"""RPT's data stage: positions worth predicting, and prompts that end at them.

A proxy policy scores every position of the packed examples by the entropy of its prediction. The
positions it is unsure of make a table, which is kept on disk, and the prompts of a step are a
function of (table, seed, step). All but the scoring is numpy on the host.
"""

from collections.abc import Callable
import dataclasses
from dataclasses import dataclass
import functools
import hashlib
import json
from pathlib import Path
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import files
from jaxrl_pt.checksum import checksum
from jaxrl_pt.models.base import Model
from jaxrl_pt.types import Array, Batch, Params, Prompts

ENTROPY_TOP = 16


@dataclass(frozen=True)
class Positions:
  """Chosen positions; each asks for `targets[t]` of an example, given the tokens up to t."""

  example: np.ndarray  # i64[R] the example's id in the data set
  t: np.ndarray  # i32[R]
  entropy: np.ndarray  # f32[R] entropy of the proxy's prediction, nats

  def __len__(self) -> int:
    return len(self.example)

  def take(self, index: np.ndarray) -> 'Positions':
    """The rows of `index`, in its order."""
    return Positions(self.example[index], self.t[index], self.entropy[index])


# --- Scoring --------------------------------------------------------------------


def position_entropy(model: Model, params: Params, batch: Batch) -> Array:
  """The entropy of the prediction at each position, over its 16 likeliest tokens.

    q = p[top 16] / Σ p[top 16],  H = −Σ q ln q

  Call it under `jit`: the float32 logits of only one row exist at a time.

  Args:
    batch: rows of the packed data set.

  Returns:
    f32[B, T], nats.

  Source: 2506.08007 section 3.2. Departs from the paper in saying what it leaves open:
  the 16 probabilities are renormalised and the unit is the nat.
  """
  head_DV = model.head(params)
  top = min(ENTROPY_TOP, head_DV.shape[-1])

  def of_row(hidden_TD: Array) -> Array:
    logits_TV = jnp.matmul(hidden_TD, head_DV, preferred_element_type=jnp.float32)
    log_q = jax.nn.log_softmax(jax.lax.top_k(logits_TV, top)[0])
    return -(jnp.exp(log_q) * log_q).sum(-1)

  return jax.lax.map(of_row, model.apply(params, batch.tokens, batch.positions, batch.segments))


def select_positions(entropy: np.ndarray, batch: Batch, *, min_entropy: float,
                     min_context: int = 1, min_continuation: int = 1,
                     predictable: np.ndarray | None = None) -> Positions:
  """Selects the positions of one batch that are worth a prompt.

  Args:
    entropy: f32[B, T] from `position_entropy`.
    batch: the scored rows.
    min_entropy: nats; positions below are dropped.
    min_context: how many context tokens a position needs, the current one included.
    min_continuation: how many true tokens must follow in the segment.
    predictable: bool[V]; positions whose target is False are dropped (a token without
      bytes, such as end of text, can never earn RPT's reward).

  Returns:
    Positions in (row, t) order.
  """
  entropy, segments, targets = (np.asarray(x) for x in (entropy, batch.segments, batch.targets))
  counts = (np.asarray(batch.weights) > 0) & (segments > 0)
  keep = counts & (entropy >= min_entropy)
  if predictable is not None:
    keep &= predictable[targets]
  back, ahead = min_context - 1, min_continuation - 1
  length = segments.shape[1]
  keep &= _same_segment(segments, segments > 0, -back) if back < length else False
  keep &= _same_segment(segments, counts, ahead) if ahead < length else False
  row, t = np.nonzero(keep)
  return Positions(np.asarray(batch.ids)[row].astype(np.int64), t.astype(np.int32),
                   entropy[row, t].astype(np.float32))


def _same_segment(segments: np.ndarray, usable: np.ndarray, shift: int) -> np.ndarray:
  """Says where position t + shift exists, is usable and lies in t's segment; bool[B, T]."""
  there = np.arange(segments.shape[1]) + shift
  inside = (there >= 0) & (there < segments.shape[1])
  there = np.clip(there, 0, segments.shape[1] - 1)
  return inside & usable[:, there] & (segments[:, there] == segments)


def concatenate(parts: list[Positions]) -> Positions:
  """Joins the positions of many batches into one table."""
  empty = Positions(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
  parts = [empty, *parts]
  return Positions(np.concatenate([p.example for p in parts]),
                   np.concatenate([p.t for p in parts]),
                   np.concatenate([p.entropy for p in parts]))


# --- The table on disk ----------------------------------------------------------


def table_key(params: Params, **settings: float | int | str) -> str:
  """A name of a table, made of the proxy's weights and of the settings of the choice."""
  text = json.dumps({'proxy': checksum(params), 'settings': settings}, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def load_or_score(path: Path, key: str, score: Callable[[], Positions]) -> Positions:
  """The table in `path` if it was made under `key`, else `score()`, which is then kept.

  A damaged or unfinished file counts as absent. A new file appears whole or not at all.

  Raises:
    Unwritable: the table cannot be kept.
  """
  found = _load(path, key)
  if found is not None:
    return found
  table = score()
  files.write_bytes(path, files.npz_bytes({'key': np.array(key), 'example': table.example,
                                           't': table.t, 'entropy': table.entropy}))
  return table


def _load(path: Path, key: str) -> Positions | None:
  try:
    with np.load(path, allow_pickle=False) as arrays:
      if str(arrays['key']) != key:
        return None
      return Positions(arrays['example'], arrays['t'], arrays['entropy'])
  except (FileNotFoundError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
    return None


# --- Prompts --------------------------------------------------------------------


def step_rows(num_rows: int, num_prompts: int, seed: int, step: int) -> np.ndarray:
  """The rows of the table that step `step` (from 0) uses, i64[num_prompts].

  Each epoch goes through the table in a new order, a function of (seed, epoch), and no row is left
  out between epochs. A step that runs over the end of an epoch repeats no row while others are
  left: the next epoch then begins with rows that the step has not had. The order depends on
  num_prompts too, because num_prompts decides where steps end.
  """
  place = step * num_prompts + np.arange(num_prompts, dtype=np.int64)
  epoch = place // num_rows
  rows = np.empty(num_prompts, np.int64)
  for e in np.unique(epoch):
    chosen = epoch == e
    rows[chosen] = _order(num_rows, num_prompts, seed, int(e))[place[chosen] % num_rows]
  return rows


@functools.lru_cache(maxsize=2)
def _order(num_rows: int, num_prompts: int, seed: int, epoch: int) -> np.ndarray:
  """The rows of an epoch in their order, i64[num_rows]."""
  first = epoch
  while _shared(num_rows, num_prompts, first)[0]:
    first -= 1  # Back to an epoch that begins with a step, or as if it did.
  order = np.empty(0, np.int64)
  for e in range(first, epoch + 1):
    before, own = _shared(num_rows, num_prompts, e)
    had = order[len(order) - before:]
    order = np.random.default_rng([seed, e]).permutation(num_rows)
    if np.isin(order[:own], had).any():
      new = ~np.isin(order, had)
      head = order[new][:own]
      order = np.concatenate([head, order[~np.isin(order, head)]])
  return order


def _shared(num_rows: int, num_prompts: int, epoch: int) -> tuple[int, int]:
  """How many last rows of the epoch before, and first rows of this one, must all differ.

  In the step that runs over the boundary, each run of num_rows rows is to be distinct. Only runs
  that contain the boundary belong to two epochs; all others are a whole epoch or a part of one.
  """
  boundary = epoch * num_rows
  before = boundary % num_prompts
  left = num_prompts - before if before else 0
  before %= num_rows
  return (before, min(left, num_rows - before)) if before and left else (0, 0)


def document_rows(examples: Batch, rows: Positions, *, prompt_len: int,
                  num_positions: int) -> np.ndarray:
  """The rows of the table that may share a document.

  The first `prompt_len` tokens of the document hold the contexts of all its rows.

  Args:
    examples: the host rows of all examples of the table.
    rows: R positions.
    prompt_len: how many first tokens of a document can be context.
    num_positions: P; documents with fewer positions are left out.

  Returns:
    i64[D, R'] rows of each document, rising, −1 beyond its last; R' ≥ P.
  """
  row, t = _rows_of(np.asarray(examples.ids), rows.example), rows.t.astype(np.int64)
  segments = np.asarray(examples.segments)[row]
  here = segments[np.arange(len(row)), t]
  start = (segments == here[:, None]).argmax(1)  # A segment is one stretch of its example.
  fits = np.flatnonzero(t - start < prompt_len)
  order = fits[np.lexsort((t[fits], start[fits], rows.example[fits]))]
  keys = np.stack([rows.example[order], start[order]], 1)
  _, first, counts = np.unique(keys, axis=0, return_index=True, return_counts=True)
  table = np.full((len(first), max(counts, default=1)), -1, np.int64)
  for document, (begin, count) in zip(table, zip(first, counts, strict=True), strict=True):
    document[:count] = order[begin:begin + count]
  return table[counts >= num_positions]


def step_documents(documents: np.ndarray, num_documents: int, num_positions: int, seed: int,
                   step: int) -> np.ndarray:
  """The rows of step `step` (from 0), i64[num_documents · num_positions].

  The rows of a document lie side by side and rise. Documents come in the order of `step_rows`;
  which positions of a document are taken is a function of (seed, step, its place in the step).
  """
  chosen = documents[step_rows(len(documents), num_documents, seed, step)]
  rows = []
  for place, document in enumerate(chosen):
    rng = np.random.default_rng([seed, step, place])
    there = document[document >= 0]
    rows.append(there[np.sort(rng.choice(len(there), num_positions, replace=False))])
  return np.concatenate(rows)


def share_documents(prompts: Prompts, num_positions: int) -> Prompts:
  """Keeps the tokens of each document once: those of the longest context of its prompts."""
  tokens: Any = np.asarray(prompts.tokens)[num_positions - 1::num_positions]
  return dataclasses.replace(prompts, tokens=tokens)


def build_prompts(examples: Batch, rows: Positions, *, prompt_len: int,
                  num_continuation: int) -> Prompts:
  """Builds the prompts that end at the chosen positions, with what truly follows.

  The context is the last `prompt_len` tokens of the segment up to t, the continuation the
  next `num_continuation` targets of the segment; both are right-padded with 0.

  Args:
    examples: host rows of the data set, in any order; they are found by their `ids`.
    rows: R positions.
    prompt_len: T of the prompts.
    num_continuation: W. A prediction of S tokens may spell what the truth spells in more tokens:
      take W ≥ the bytes that S tokens can have, or accept that such predictions count as wrong.

  Returns:
    Prompts of numpy arrays. ids are example · length + t, modulo 2³².

  Raises:
    ValueError: `examples` lacks an example of `rows`.
  """
  row = _rows_of(np.asarray(examples.ids), rows.example)
  segments, tokens, targets, weights = (
      np.asarray(x)[row] for x in (examples.segments, examples.tokens, examples.targets,
                                   examples.weights))
  num_rows, length = segments.shape
  each, t = np.arange(num_rows)[:, None], rows.t.astype(np.int64)[:, None]
  here = segments[each, t]

  window = t - np.arange(prompt_len)  # t, t − 1, …
  in_context = (window >= 0) & (segments[each, np.maximum(window, 0)] == here)
  lengths = np.logical_and.accumulate(in_context, axis=1).sum(1)
  place = t + 1 - lengths[:, None] + np.arange(prompt_len)
  is_token = np.arange(prompt_len) < lengths[:, None]
  context = np.where(is_token, tokens[each, np.clip(place, 0, length - 1)], 0)

  place = t + np.arange(num_continuation)
  inside = np.minimum(place, length - 1)
  follows = (place < length) & (segments[each, inside] == here) & (weights[each, inside] > 0)
  follows = np.logical_and.accumulate(follows, axis=1)
  continuation = np.where(follows, targets[each, inside], 0)
  ids = (rows.example.astype(np.int64) * length + rows.t).astype(np.uint32).view(np.int32)
  extras = {'continuation': _host(continuation), 'continuation_lengths': _host(follows.sum(1)),
            'entropy': _host(rows.entropy, np.float32)}
  return Prompts(_host(context), _host(lengths), _host(ids), extras=extras)


def _host(x: np.ndarray, dtype: Any = np.int32) -> Any:
  """A host array, typed as the device array that will take its place."""
  return x.astype(dtype)


def _rows_of(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  order = np.argsort(ids, kind='stable')
  place = np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)
  row = order[place]
  if len(ids) == 0 or (ids[row] != wanted).any():
    raise ValueError('the examples given do not hold every example of the positions')
  return row


def distinct_rows(prompts: Prompts) -> np.ndarray:
  """The rows whose prompt no earlier row has, i64[R], rising."""
  keys = np.concatenate([np.asarray(prompts.lengths)[:, None], np.asarray(prompts.tokens)], 1)
  return np.sort(np.unique(keys, axis=0, return_index=True)[1])


def pad_prompts(prompts: Prompts, num_prompts: int) -> Prompts:
  """Fills prompts up to N rows; the new rows have no continuation and evaluation skips them."""
  missing = num_prompts - prompts.tokens.shape[0]

  def pad(x: Any) -> np.ndarray:
    return np.pad(np.asarray(x), [(0, missing)] + [(0, 0)] * (np.ndim(x) - 1))

  padded: Prompts = jax.tree.map(pad, prompts)
  return dataclasses.replace(padded, lengths=_host(np.maximum(padded.lengths, 1)))
