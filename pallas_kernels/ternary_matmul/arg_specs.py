"""The calls of the ternary product that are compiled, reported and tuned."""

from collections.abc import Iterable
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.dispatch import Generation
from pallas_kernels.ternary_matmul import kernel_tpu
from pallas_kernels.ternary_matmul.api import Activations
from pallas_kernels.ternary_matmul.tuning import Blocks, blocks, key

Array = jax.Array
# K, N: BitNet b1.58 2B4T's matrices, then the widths of BitNet v2's 3B and 7B.
SHAPES = ((2560, 6912), (6912, 2560), (2560, 2560), (4096, 4096), (8192, 8192))
ROWS = (1, 32, 64, 128, 2048)


def cases(generation: Generation) -> list[tuning.Case]:
  """Prefill or training (2048 rows) and decoding. None on v4, whose compiler has no int2."""
  return [_case(M, K, N, activations, blocks(M, K, N, activations, generation), generation)
          for M, (K, N), activations in _calls(generation)]


def candidates(generation: Generation) -> dict[str, list[tuple[dict, tuning.Case]]]:
  """Block choices for the tuner; rows of one bucket are tuned at its largest."""
  return {key(M, K, N, activations): [
      (choice._asdict(), _case(M, K, N, activations, choice, generation))
      for choice in _choices(M, K, N, activations, generation)]
      for M, (K, N), activations in _calls(generation) if M > 1}


def _calls(generation: Generation) -> Iterable[tuple[int, tuple[int, int], Activations]]:
  if generation != 'v4':
    yield from ((M, shape, activations) for M in ROWS for shape in SHAPES
                for activations in get_args(Activations))


def _choices(M: int, K: int, N: int, activations: Activations,
             generation: Generation) -> list[Blocks]:
  """Columns that divide N: a last block of few columns costs as much as a full one.

  Few rows take at least four blocks. The first waits for its weights, which the static floor
  does not see.
  """
  if M <= kernel_tpu.FEW_ROWS:
    return [Blocks(M, columns, M) for columns in (256, 512, 640, 768, 1024, 1152, 2048)
            if N % columns == 0 and N // columns >= 4]
  if generation in ('v5e', 'v5p'):  # Small MXUs: code grows four times as fast.
    return [Blocks(2048, 256, chunk) for chunk in (256, 512)]
  # Fewer, wider steps hide more, in longer code: of int8 products they save little.
  widest = (9 if activations == 'int4' else 4) << 20
  return [Blocks(2048, columns, chunk) for columns in (512, 768, 1024, 1280, 2304)
          if N % columns == 0 and K * columns <= widest for chunk in (256, 512, 1024)]


def _case(M: int, K: int, N: int, activations: Activations, chosen: Blocks,
          generation: Generation) -> tuning.Case:
  array = jax.ShapeDtypeStruct
  x, x_scale = array((M, K), jnp.dtype(activations)), array((M, 1), jnp.float32)
  w, w_scale = array((K, N), jnp.int2), array((1, 1), jnp.float32)
  out = array((M, N), jnp.bfloat16)
  args = (x, x_scale, w, w_scale)
  least = tuning.num_bytes(*args, out)
  # Besides: weights once more for every further block of rows.
  moved = least + (-(-M // chosen.rows) - 1) * tuning.num_bytes(w)
  run = functools.partial(kernel_tpu.ternary_matmul, out_dtype=jnp.bfloat16,
                          generation=generation, blocks=chosen)
  operand = kernel_tpu.unit(generation, x.dtype).operand
  multiply_adds = {_OPERANDS[jnp.dtype(operand).name]: M * K * N}
  return tuning.Case(
      kernel='ternary_matmul', variant='', activations=activations, shape=f'{M}x{K}->{N}',
      call=tuning.Call(run, args, tuning.Cost(multiply_adds, moved)), minimum_bytes=least,
      alternatives=_alternatives(M, K, N, generation))


_OPERANDS: dict[str, tuning.Operand] = {
    'int4': 'int4', 'int8': 'int8', 'bfloat16': 'bf16', 'float8_e4m3fn': 'fp8'}


def _alternatives(M: int, K: int, N: int, generation: Generation) -> dict[str, tuning.Call]:
  def call(run: Any, operand: tuning.Operand, *args: jax.ShapeDtypeStruct) -> tuning.Call:
    least = tuning.num_bytes(*args, jax.ShapeDtypeStruct((M, N), jnp.bfloat16))
    return tuning.Call(run, args, tuning.Cost({operand: M * K * N}, least))

  array = jax.ShapeDtypeStruct
  calls = {'xla_bf16': call(_xla_bf16, 'bf16', array((M, K), jnp.bfloat16),
                            array((K, N), jnp.bfloat16))}
  if generation != 'tpu7x':  # It has no integer MXU.
    calls['xla_int8'] = call(
        _xla_int8, 'int8', array((M, K), jnp.int8), array((M, 1), jnp.float32),
        array((K, N), jnp.int8), array((1, 1), jnp.float32))
  return calls


def _xla_bf16(x_MK: Array, w_KN: Array) -> Array:
  return jnp.matmul(x_MK, w_KN)


def _xla_int8(x_codes_MK: Array, x_scale_M1: Array, w_codes_KN: Array, w_scale: Array) -> Array:
  sums = jnp.matmul(x_codes_MK, w_codes_KN, preferred_element_type=jnp.int32)
  return (sums.astype(jnp.float32) * (x_scale_M1 * w_scale)).astype(jnp.bfloat16)
