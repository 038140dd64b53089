"""The bytes that rectified sparse attention reads: the formula, and a count that checks it.

    mem(KV) · (1/b + p + 1/f)

is the cost model of 2506.04108 section 2.4. `attention_bytes` is exact for this program: it takes
into account n_min, partly filled blocks, the parts that the loops read at a time, and the blocks
whose descriptors are computed again. `count_reads` runs any function operation by operation and
adds up the bytes that it copies out of given arrays.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.nn import paged_attention
from jaxrl_pt.nn.sparse_attention import pages_per_turn, scored_per_turn
from jaxrl_pt.sampling.resa import RECTIFIED_TOKENS
from pallas_kernels.sparse_decode import Selection

# Operations that copy a part of their first operand.
_READS = ('gather', 'dynamic_slice', 'slice')


class AttentionBytes(NamedTuple):
  """Bytes that are read from the cache, in all layers."""

  descriptors: int  # the descriptors of all blocks and of the updated ones, in one decoding step
  pages: int  # the pages of the selected blocks, in one decoding step
  rectification: int  # the pages and the touched keys, in one rectification of all rows

  def per_token(self, window: float) -> float:
    """Mean bytes of a step with a rectification after every `window` tokens (may be infinite)."""
    return self.descriptors + self.pages + self.rectification / window


def dense_bytes(model: cfg.Model, length: int, itemsize: int) -> int:
  """mem(KV): bytes of the keys and values of `length` tokens in all layers."""
  return 2 * model.num_layers * model.num_kv_heads * model.head_dim * length * itemsize


def modelled_bytes(model: cfg.Model, resa: cfg.ReSA, length: int, itemsize: int) -> float:
  """The paper's mem(KV) (1/b + p + 1/f), with the share of blocks that is selected as p."""
  num_blocks = -(-length // resa.block)
  selection = Selection(resa.active, resa.min_blocks, resa.local_blocks)
  share = 1 / resa.block + selection.num_selected(num_blocks) / num_blocks
  if isinstance(resa.refresh, cfg.RefreshEvery):
    share += 1 / resa.refresh.tokens
  return dense_bytes(model, length, itemsize) * share


def attention_bytes(model: cfg.Model, resa: cfg.ReSA, num_rows: int, length: int,
                    table_len: int, itemsize: int) -> AttentionBytes:
  """Bytes that one step and one rectification read, exactly.

  Args:
    model: the model's sizes.
    resa: the settings of the sparse attention.
    num_rows: B; all rows have the same length and are due together.
    length: cached tokens of a row, the one of this step included.
    table_len: blocks that a row has room for.
    itemsize: bytes of a cached number.
  """
  lists, width = num_rows * model.num_kv_heads, model.head_dim
  page = 2 * resa.block * width
  num_blocks = -(-length // resa.block)
  selection = Selection(resa.active, resa.min_blocks, resa.local_blocks)
  scored = scored_per_turn(lists, table_len, 2 * width)
  descriptors = _whole_turns(num_blocks, scored) + 1  # The new key updates one more.
  per_turn = pages_per_turn(lists, selection.num_selected(table_len), page)
  pages = _whole_turns(selection.num_selected(num_blocks), per_turn)
  rectified = 0
  if isinstance(resa.refresh, cfg.RefreshEvery):
    window = resa.refresh.tokens
    rows = min(num_rows, max(1, RECTIFIED_TOKENS // window))
    per_turn = paged_attention.pages_per_turn(table_len, resa.block,
                                              paged_attention.BLOCK)
    touched = (-(-window // resa.block) + 1) * page // 2  # Descriptors read keys alone.
    # Nothing depends on what the last layer attends to, of which the loop reads one turn.
    layers = (model.num_layers - 1) * _whole_turns(num_blocks, per_turn) + per_turn
    forward = layers * page + model.num_layers * touched
    rectified = itemsize * -(-num_rows // rows) * rows * model.num_kv_heads * forward
  scale = model.num_layers * itemsize
  return AttentionBytes(scale * lists * descriptors * 2 * width, scale * lists * pages * page,
                        rectified)


def _whole_turns(num: int, per_turn: int) -> int:
  return -(-num // per_turn) * per_turn


# --- Counting what a function reads ------------------------------------------------


def count_reads(f: Callable[..., Any], args: Sequence[Any],
                num_elements: Sequence[int]) -> list[int]:
  """Runs f(*args), one operation at a time, and counts the bytes copied out of some arrays.

  Args:
    f: any function that JAX can trace.
    args: its arguments.
    num_elements: the sizes of the arrays in question, which no other array may have. Gathers and
      slices of an operand with one of these numbers of elements are counted, whatever its shape.

  Returns:
    The bytes, one number for each size.
  """
  counts = dict.fromkeys(num_elements, 0)
  closed, leaves = jax.make_jaxpr(f)(*args), jax.tree.leaves(list(args))
  _run(closed.jaxpr, closed.consts, leaves, counts)
  return [counts[size] for size in num_elements]


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any],
         counts: dict[int, int]) -> list[Any]:
  values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args],
                                    strict=True))
  read = lambda x: x.val if isinstance(x, core.Literal) else values[x]
  for eqn in jaxpr.eqns:
    operands = [read(x) for x in eqn.invars]
    results = _evaluate(eqn, operands, counts)
    values.update(zip(eqn.outvars, results, strict=True))
  return [read(x) for x in jaxpr.outvars]


def _evaluate(eqn: Any, operands: list[Any], counts: dict[int, int]) -> Sequence[Any]:
  name, params = eqn.primitive.name, eqn.params
  inner = params.get('jaxpr', params.get('call_jaxpr'))
  match name:
    case 'while':
      return _while(params, operands, counts)
    case 'scan':
      return _scan(params, operands, counts)
    case 'cond':
      branch = params['branches'][int(np.clip(operands[0], 0, len(params['branches']) - 1))]
      return _run(branch.jaxpr, branch.consts, operands[1:], counts)
    case _ if inner is not None:
      closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
      return _run(closed.jaxpr, closed.consts, operands, counts)
  results = eqn.primitive.bind(*operands, **params)
  results = results if eqn.primitive.multiple_results else [results]
  if name in _READS and np.size(operands[0]) in counts:
    counts[np.size(operands[0])] += math.prod(results[0].shape) * results[0].dtype.itemsize
  return results


def _while(params: dict[str, Any], operands: list[Any], counts: dict[int, int]) -> list[Any]:
  num_cond, num_body = params['cond_nconsts'], params['body_nconsts']
  of_cond, of_body = operands[:num_cond], operands[num_cond:num_cond + num_body]
  carry = operands[num_cond + num_body:]
  cond, body = params['cond_jaxpr'], params['body_jaxpr']
  while bool(_run(cond.jaxpr, cond.consts, [*of_cond, *carry], counts)[0]):
    carry = _run(body.jaxpr, body.consts, [*of_body, *carry], counts)
  return carry


def _scan(params: dict[str, Any], operands: list[Any], counts: dict[int, int]) -> list[Any]:
  num_consts, num_carry = params['num_consts'], params['num_carry']
  consts, carry = operands[:num_consts], operands[num_consts:num_consts + num_carry]
  slices = operands[num_consts + num_carry:]
  body, outs = params['jaxpr'], []
  order = range(params['length'])
  for i in reversed(order) if params['reverse'] else order:
    results = _run(body.jaxpr, body.consts, [*consts, *carry, *(x[i] for x in slices)], counts)
    carry = results[:num_carry]
    outs.append(results[num_carry:])
  stacked = [np.stack(x) for x in zip(*(outs[::-1] if params['reverse'] else outs), strict=True)]
  return [*carry, *stacked]
