"""The product of quantised activations and ternary weights, forward and straight-through."""

from collections.abc import Callable
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import dispatch
from pallas_kernels.ternary_matmul import kernel_tpu, reference, tuning

Array = jax.Array
Activations = Literal['int8', 'int4']


def ternary_matmul(x_codes_MK: Array, x_scale_M1: Array, w_codes_KN: Array, w_scale: Array, *,
                   activations: Activations, out_dtype: DTypeLike,
                   generation: dispatch.Generation | None, interpret: Any = False) -> Array:
  """A matrix product on 2-bit weights, exact in integers up to its scales.

    Y = (codes_x · codes_w) · (scale_x · scale_w)

  Args:
    x_codes_MK: int4[M, K] or int8[M, K], as `activations` says.
    x_scale_M1: f32[M, 1] per token.
    w_codes_KN: int2[K, N] in {−1, 0, 1}.
    w_scale: f32[] or f32[1, 1] of the matrix, or f32[1, N] per output (matrices side by side).
    activations: 'int8' or 'int4'.
    out_dtype: of Y. int32 returns the sums codes_x · codes_w without any scale: where K is
      split over chips they are added (exactly, in any order) before they are scaled.
    generation: of the TPU to run on; None takes the definition.
    interpret: as in `pl.pallas_call`.

  Returns:
    out_dtype[M, N]; the same bits from every implementation.

  Raises:
    ValueError: shapes or types that do not fit together.

  Source: 2504.18415 section 2; 2504.12285 section 2.
  """
  _validate(x_codes_MK, x_scale_M1, w_codes_KN, w_scale, activations)
  M, K, N = *x_codes_MK.shape, w_codes_KN.shape[1]
  def run_reference(x_codes: Array, x_scale: Array, w_codes: Array, w_scale: Array) -> Array:
    return reference.ternary_matmul(x_codes, x_scale, w_codes, w_scale, out_dtype)

  implementations = [dispatch.Implementation('reference', run_reference)]
  if generation is not None:
    def run(x_codes: Array, x_scale: Array, w_codes: Array, w_scale: Array) -> Array:
      blocks = tuning.blocks(M, K, N, activations, generation)
      return kernel_tpu.ternary_matmul(x_codes, x_scale, w_codes, w_scale, out_dtype=out_dtype,
                                       generation=generation, blocks=blocks, interpret=interpret)
    implementations.insert(0, dispatch.Implementation('tpu', run))
  return dispatch.first_supported('ternary_matmul', implementations, x_codes_MK, x_scale_M1,
                                  w_codes_KN, w_scale)


# multiply(x_codes, x_scale, w_codes, w_scale) → y: `ternary_matmul`, or an equal of it.
Multiply = Callable[[Array, Array, Array, Array], Array]


def straight_through(multiply: Multiply, x: Array, w: Array | None, x_codes: Array,
                     x_scale: Array, w_codes: Array, w_scale: Array) -> Array:
  """A product of codes whose gradient goes to what was quantised.

    forward   Y = Q(X) · Q(W),  Q(X) = codes_x · scale_x,  Q(W) = codes_w · scale_w
    backward  dX = dY · Q(W)ᵀ,  dW = Q(X)ᵀ · dY,  both quantisers counting as identity

  Args:
    multiply: computes Y from the codes and scales.
    x: f[..., K] and w: f[K, N] carry the gradient; their values are never read. None for
      weights that are codes only: they get no gradient.
    x_codes: [..., K] integers in any type; x_scale: f32[..., 1].
    w_codes: [K, N] in {−1, 0, 1} in any type; w_scale: f32[], f32[1, 1] or f32[1, N].

  Returns:
    f[..., N] in the type that `multiply` gives. The backward products are XLA's, in that type,
    dW with float32 sums; codes and scales get no gradient.

  Raises:
    ValueError: x or w has another shape than its codes.

  Source: 2504.18415 section 2 (STE).
  """
  for name, carrier, codes in (('x', x, x_codes), ('w', w, w_codes)):
    if carrier is not None and carrier.shape != codes.shape:
      raise ValueError(f'{name} {list(carrier.shape)} must have the shape of its codes, '
                       f'{list(codes.shape)}')
  return _straight_through(multiply, x, w, x_codes, x_scale, w_codes, w_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(multiply: Multiply, x: Array, w: Array | None, *quantised: Array) -> Array:
  del x, w
  return multiply(*quantised)


def _forward(multiply: Multiply, x: Array, w: Array | None,
             *quantised: Array) -> tuple[Array, tuple[Any, ...]]:
  del x
  # Codes are kept as they are; an empty array remembers the type of the latent weights.
  latent = None if w is None else jnp.zeros((0,), w.dtype)
  return multiply(*quantised), (*quantised, latent)


def _backward(multiply: Multiply, saved: tuple[Any, ...],
              dy: Array) -> tuple[Array | None, ...]:
  del multiply
  x_codes, x_scale, w_codes, w_scale, latent = saved
  dtype = dy.dtype
  dy_w = (dy.astype(jnp.float32) * w_scale).astype(dtype)
  dx = jnp.matmul(dy_w, w_codes.T.astype(dtype))
  if latent is None:
    return dx, None, None, None, None, None
  dy_x = (dy.astype(jnp.float32) * x_scale).astype(dtype)
  dw = jnp.matmul(x_codes.astype(dtype).reshape(-1, x_codes.shape[-1]).T,
                  dy_x.reshape(-1, dy.shape[-1]), preferred_element_type=jnp.float32)
  return dx, dw.astype(latent.dtype), None, None, None, None


_straight_through.defvjp(_forward, _backward)


def _validate(x_codes: Array, x_scale: Array, w_codes: Array, w_scale: Array,
              activations: Activations) -> None:
  if activations not in get_args(Activations):
    raise ValueError(f'activations must be one of {", ".join(get_args(Activations))}, '
                     f'got {activations!r}')
  if x_codes.ndim != 2 or x_codes.dtype != jnp.dtype(activations):
    raise ValueError(f'x_codes must be {activations}[M, K], got {x_codes.dtype}'
                     f'{list(x_codes.shape)}')
  M, K = x_codes.shape
  if w_codes.ndim != 2 or w_codes.shape[0] != K or w_codes.dtype != jnp.int2:
    raise ValueError(f'w_codes must be int2[{K}, N] beside x_codes {list(x_codes.shape)}, got '
                     f'{w_codes.dtype}{list(w_codes.shape)}')
  N = w_codes.shape[1]
  if x_scale.shape != (M, 1) or x_scale.dtype != jnp.float32:
    raise ValueError(f'x_scale must be float32[{M}, 1], got {x_scale.dtype}'
                     f'{list(x_scale.shape)}')
  if w_scale.shape not in ((), (1, 1), (1, N)) or w_scale.dtype != jnp.float32:
    raise ValueError(f'w_scale must be float32[], [1, 1] or [1, {N}], got {w_scale.dtype}'
                     f'{list(w_scale.shape)}')
