"""The ternary product on a TPU: 2-bit weights are converted in VMEM, sums are exact.

A grid step holds `rows` of the activations and `columns` of the weights with the whole
contraction. The weights are converted to the type that the chip multiplies; then, `chunk`
rows at a time, the sums are made and scaled, so that one chunk is scaled while the next is
multiplied.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.dispatch import Generation
from pallas_kernels.ternary_matmul.tuning import LANES, VMEM_BYTES, Blocks

Array = jax.Array
# Up to here scales come as a column; more come as a row, which takes 128 times fewer bytes, and
# are turned in the kernel.
FEW_ROWS = 128
# Scaled at a time: two float32 registers make one of bfloat16, and one store.
WIDTH = 2 * LANES


class Unit(NamedTuple):
  """What the MXU takes and sums in; all of them exact for codes below 2²⁴ / 127 apart."""

  operand: Any
  sums: Any


def unit(generation: Generation, activations_dtype: DTypeLike) -> Unit:
  """The fastest exact multiplication of codes.

  Raises:
    NotImplementedError: v4, whose compiler has no 2-bit integers.
  """
  is_4bit = activations_dtype == jnp.int4
  match generation:
    case 'v5e' | 'v5p' | 'v6e':
      return Unit(jnp.int4 if is_4bit else jnp.int8, jnp.int32)
    case 'tpu7x':  # No integer MXU. Sums of codes stay below 2²⁴: float32 is exact.
      return Unit(jnp.float8_e4m3fn if is_4bit else jnp.bfloat16, jnp.float32)
    case 'v4':
      raise NotImplementedError('2-bit integers in VMEM')


def _column(scale_ref: Any, start: int, rows: int) -> Array:
  """[rows, LANES] of scales that lie in a row, whole tiles from `start` on."""
  tiles = [jnp.broadcast_to(scale_ref[:, pl.ds(tile, LANES)], (LANES, LANES)).T
           for tile in range(start, start + rows, LANES)]
  return jnp.concatenate(tiles)[:rows]


def _body(x_ref: Any, scale_ref: Any, w_ref: Any, *refs: Any, unit: Unit, chunk: int,
          is_row: bool) -> None:
  *column_scale, out_ref, converted_ref = refs
  rows, columns = out_ref.shape
  converted_ref[...] = w_ref[...].astype(unit.operand)
  for start in range(0, rows, chunk):
    size = min(chunk, rows - start)
    r = pl.ds(start, size)
    sums = jax.lax.dot_general(x_ref[r, :].astype(unit.operand), converted_ref[...],
                               (((1,), (0,)), ((), ())), preferred_element_type=unit.sums)
    if out_ref.dtype == jnp.int32:
      out_ref[r, :] = sums.astype(jnp.int32)
      continue
    row_scale = _column(scale_ref, start, size) if is_row else scale_ref[r, :]
    for lane in range(0, columns, WIDTH):
      width = min(WIDTH, columns - lane)
      c = pl.ds(lane, width)
      scale = jnp.concatenate([row_scale] * (width // LANES), 1) if is_row else row_scale
      if column_scale:
        scale = scale * column_scale[0][:, c]
      y = sums[:, lane:lane + width].astype(jnp.float32) * scale
      out_ref[r, c] = y.astype(out_ref.dtype)


@functools.partial(jax.jit, static_argnames=('out_dtype', 'generation', 'blocks', 'interpret'))
def ternary_matmul(x_codes_MK: Array, x_scale_M1: Array, w_codes_KN: Array, w_scale: Array, *,
                   out_dtype: DTypeLike, generation: Generation, blocks: Blocks,
                   interpret: Any = False) -> Array:
  """The kernel. See `api.ternary_matmul`.

  Raises:
    NotImplementedError: a chip that does not take it.
  """
  kind = unit(generation, x_codes_MK.dtype)
  if interpret and kind.operand == jnp.int4:  # XLA's CPU backend has no product of 4-bit types.
    kind = kind._replace(operand=jnp.int8)
  M, N = x_codes_MK.shape[0], w_codes_KN.shape[1]
  missing = -x_codes_MK.shape[1] % LANES
  if missing:  # Codes of 0 add nothing.
    x_codes_MK = jnp.pad(x_codes_MK, ((0, 0), (0, missing)))
    w_codes_KN = jnp.pad(w_codes_KN, ((0, missing), (0, 0)))
  K = x_codes_MK.shape[1]
  rows, columns, chunk = blocks
  row_block, column_block = (lambda m, n: (m, 0)), (lambda m, n: (0, n))
  per_column = w_scale.size > 1
  scale = x_scale_M1 if per_column else x_scale_M1 * w_scale.reshape(1, 1)
  is_row = M > FEW_ROWS
  if is_row:
    scale = jnp.pad(scale.reshape(1, M), ((0, 0), (0, -M % LANES)))
    scale_spec = pl.BlockSpec((1, -(-rows // LANES) * LANES), lambda m, n: (0, m))
  else:
    scale_spec = pl.BlockSpec((rows, 1), row_block)
  args = [x_codes_MK, scale, w_codes_KN]
  in_specs = [pl.BlockSpec((rows, K), row_block), scale_spec,
              pl.BlockSpec((K, columns), column_block)]
  if per_column:
    args.append(w_scale)
    in_specs.append(pl.BlockSpec((1, columns), column_block))
  return pl.pallas_call(
      functools.partial(_body, unit=kind, chunk=chunk, is_row=is_row),
      grid=(pl.cdiv(M, rows), pl.cdiv(N, columns)),
      in_specs=in_specs,
      out_specs=pl.BlockSpec((rows, columns), lambda m, n: (m, n)),
      out_shape=jax.ShapeDtypeStruct((M, N), out_dtype),
      scratch_shapes=[pltpu.VMEM((K, columns), kind.operand)],
      # All copies are the grid's own: checking their bounds takes 40 cycles a step.
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel'),
                                           vmem_limit_bytes=VMEM_BYTES[generation],
                                           disable_bounds_checks=True),
      name='ternary_matmul', interpret=interpret)(*args)
