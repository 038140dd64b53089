"""H-BitLinear's input: RMSNorm, Hadamard rotation and quantisation per token, in one pass."""

from typing import Any, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.hadamard_quantize import kernel_tpu, reference, tuning

Array = jax.Array


def hadamard_quantize(x_MD: Array, gain_D: Array | None, *, activations: reference.Activations,
                      epsilon: float, generation: dispatch.Generation | None,
                      interpret: Any = False) -> tuple[Array, Array]:
  """Integer codes of the rotated, normalised rows; the rotated rows never reach HBM.

    N = X / √(mean(X²) + ε) · gain, rounded to x's dtype; N = X without a gain
    codes, scale = quantize(N Hᵀ), with H and quantize of `reference`; N Hᵀ ≈ scale · codes

  Args:
    x_MD: bf16[M, D] or f32[M, D], D as `reference.hadamard_factors` accepts. Finite
      everywhere.
    gain_D: f[D], or None for no norm.
    activations: 'int8' (absmax), 'int4' (absmean) or 'int4_absmax', per row.
    epsilon: of the norm.
    generation: of the TPU to run on; None takes the definition.
    interpret: as in `pl.pallas_call`.

  Returns:
    codes int8[M, D] or int4[M, D] and scale f32[M, 1]. N Hᵀ is not rounded to x's dtype before
    it is quantised. A code of the kernel differs from the definition's only where the value
    lies within 2⁻¹⁴ of a row's largest |code| from a rounding boundary, and then by one.

  Raises:
    ValueError: shapes or types that do not fit together, or a width without such a matrix.

  Source: 2504.18415 section 2.
  """
  _validate(x_MD, gain_D, activations)
  def run_reference(x_MD: Array, gain_D: Array | None) -> tuple[Array, Array]:
    return reference.hadamard_quantize(x_MD, gain_D, activations, epsilon)

  implementations = [dispatch.Implementation('reference', run_reference)]
  if generation is not None:
    def run(x_MD: Array, gain_D: Array | None) -> tuple[Array, Array]:
      kernel_tpu.factors(x_MD.shape[1])
      M, D = x_MD.shape
      blocks = tuning.blocks(M, D, activations, generation)
      return kernel_tpu.hadamard_quantize(x_MD, gain_D, activations=activations,
                                          epsilon=epsilon, target=tuning.target(generation),
                                          blocks=blocks, interpret=interpret)
    implementations.insert(0, dispatch.Implementation('tpu', run))
  return dispatch.first_supported('hadamard_quantize', implementations, x_MD, gain_D)


def _validate(x: Array, gain: Array | None, activations: reference.Activations) -> None:
  if x.ndim != 2:
    raise ValueError(f'x must be [M, D], got {list(x.shape)}')
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f'x must be bfloat16 or float32, got {x.dtype}')
  if gain is not None and gain.shape != x.shape[1:]:
    raise ValueError(f'gain must be [{x.shape[1]}] beside x {list(x.shape)}, '
                     f'got {list(gain.shape)}')
  if activations not in get_args(reference.Activations):
    raise ValueError(f'activations must be one of {", ".join(get_args(reference.Activations))}, '
                     f'got {activations!r}')
  reference.hadamard_factors(x.shape[1])
