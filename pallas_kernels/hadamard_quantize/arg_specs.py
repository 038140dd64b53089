"""The calls of the rotating quantiser that are compiled, reported and tuned."""

from collections.abc import Iterable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.dispatch import Generation
from pallas_kernels.hadamard_quantize import kernel_tpu, reference
from pallas_kernels.hadamard_quantize.tuning import Blocks, blocks, key, target

Array = jax.Array
EPSILON = 1e-5
# [M, D]: widths of BitNet b1.58 2B4T, then of BitNet v2's 3B.
SHAPES = ((2048, 6912), (32, 6912), (2048, 2560), (32, 2560), (2048, 4096), (2048, 8192))
ACTIVATIONS: tuple[reference.Activations, ...] = ('int8', 'int4')


def cases(generation: Generation) -> list[tuning.Case]:
  """W_o's and W_down's inputs in training or prefill, and in decoding."""
  return [_case(M, D, kind, generation, blocks(M, D, kind, generation))
          for (M, D), kind in _calls()]


def candidates(generation: Generation) -> dict[str, list[tuple[dict, tuning.Case]]]:
  """Rows of a group and tiles of a product for the tuner."""
  return {key(M, D, kind): [(choice._asdict(), _case(M, D, kind, generation, choice))
                            for choice in _choices(M, generation)]
          for (M, D), kind in _calls()}


def _calls() -> Iterable[tuple[tuple[int, int], reference.Activations]]:
  return ((shape, kind) for shape in SHAPES for kind in ACTIVATIONS)


def _choices(M: int, generation: Generation) -> list[Blocks]:
  rows = (32,) if M <= 32 or generation == 'v4' else (32, 64)
  return [Blocks(r, tiles) for r in rows for tiles in (1, 2, 3, 5)]


def _case(M: int, D: int, kind: reference.Activations, generation: Generation,
          chosen: Blocks) -> tuning.Case:
  """The arithmetic counted is what the factors need: M · D · (b + 2a) in bfloat16, as H_a
  meets two terms. MXUs do more, where neither a nor b is their size."""
  array = jax.ShapeDtypeStruct
  args = (array((M, D), jnp.bfloat16), array((D,), jnp.float32))
  out = (array((M, D), jnp.int8 if kind == 'int8' else jnp.int4), array((M, 1), jnp.float32))
  least = tuning.num_bytes(*args, *out)
  h_a, h_b = kernel_tpu.factors(D)
  cost = tuning.Cost({'bf16': M * D * (2 * h_a.shape[0] + h_b.shape[0])}, least)
  run = functools.partial(kernel_tpu.hadamard_quantize, activations=kind, epsilon=EPSILON,
                          target=target(generation), blocks=chosen)
  definition = functools.partial(_definition, kind=kind)
  return tuning.Case(
      kernel='hadamard_quantize', variant='', activations=kind, shape=f'{M}x{D}',
      call=tuning.Call(run, args, cost), minimum_bytes=least,
      alternatives={'xla': tuning.Call(definition, args, cost)})


def _definition(x_MD: Array, gain_D: Array, kind: reference.Activations) -> tuple[Any, Any]:
  return reference.hadamard_quantize(x_MD, gain_D, kind, EPSILON)
