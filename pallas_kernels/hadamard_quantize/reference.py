"""The definitions: activation quantisers, Hadamard matrices, and the fused op built of them.

Statistics are clamped to at least 1e-5 and rounding is half-to-even: the papers
leave both open and the authors' training tips do so.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Activations = Literal['int8', 'int4', 'int4_absmax']
EPSILON = 1e-5
SQRT_7 = math.sqrt(7.0)


def quantize(x: jax.Array, activations: Activations) -> tuple[jax.Array, jax.Array]:
  """Per-token integer activations.

    int8:        codes = RoundClip(127 · X / γ, −128, 127), γ = max|X|
    int4:        codes = RoundClip(√7 · X / β, −8, 7),      β = mean|X|
    int4_absmax: codes = RoundClip(7 · X / γ, −8, 7),       γ = max|X| (control arm)

  Args:
    x: f[..., D]; statistics are over D.
    activations: which of the three.

  Returns:
    codes f[..., D] (integers in x's dtype) and scale f32[..., 1]; X ≈ scale · codes.

  Source: 2504.18415 section 2 (int8: 2504.12285 section 2).
  """
  x32 = x.astype(jnp.float32)
  absolute = jnp.abs(x32)
  if activations == 'int8':
    scale, low, high = jnp.maximum(absolute.max(-1, keepdims=True), EPSILON) / 127, -128, 127
  elif activations == 'int4':
    scale, low, high = jnp.maximum(absolute.mean(-1, keepdims=True), EPSILON) / SQRT_7, -8, 7
  else:
    scale, low, high = jnp.maximum(absolute.max(-1, keepdims=True), EPSILON) / 7, -8, 7
  codes = jnp.clip(jnp.round(x32 / scale), low, high)
  return codes.astype(x.dtype), scale


# --- Hadamard -------------------------------------------------------------------


def _is_prime(n: int) -> bool:
  return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _paley(order: int) -> np.ndarray:
  """Hadamard matrix of order q + 1 for a prime q ≡ 3 (mod 4): Paley's first construction."""
  q = order - 1
  squares = {i * i % q for i in range(1, q)}
  character = np.array([0] + [1 if i in squares else -1 for i in range(1, q)])
  index = np.arange(q)
  skew = np.zeros((order, order))
  skew[0, 1:], skew[1:, 0] = 1, -1
  skew[1:, 1:] = character[(index[None, :] - index[:, None]) % q]
  return np.eye(order) + skew


def sylvester(order: int) -> np.ndarray:
  """Hadamard matrix of order 2^k: [[H, H], [H, −H]] from H = [1]."""
  matrix = np.ones((1, 1))
  while matrix.shape[0] < order:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  return matrix


@functools.cache
def hadamard_factors(n: int) -> tuple[np.ndarray, ...]:
  """±1 matrices whose Kronecker product is a Hadamard matrix of order n.

  Powers of two give Sylvester factors of at most 128; otherwise the first factor is
  a Paley matrix (2560 = 20 · 128, 6912 = 108 · 64) and is not symmetric.

  Raises:
    ValueError: n is not 2^k or 2^k · (q + 1) with q prime, q ≡ 3 (mod 4).
  """
  odd = n // (n & -n)
  first: tuple[np.ndarray, ...] = ()
  if odd > 1:
    orders = [odd * 2**k for k in range(2, 12) if n % (odd * 2**k) == 0
              and _is_prime(odd * 2**k - 1)]
    if not orders:
      raise ValueError(f'no Hadamard matrix of order {n} is built here: use a width of 2^k, or '
                       '2^k times 12, 20, 44, 60, 68, 84 or 108')
    first, n = (_paley(orders[0]),), n // orders[0]
  while n > 128:
    first, n = (*first, sylvester(128)), n // 128
  return (*first, sylvester(n)) if n > 1 or not first else first


def hadamard(x: jax.Array) -> jax.Array:
  """Orthonormal Hadamard rotation of the last axis: X_r = X Hᵀ, H Hᵀ = I.

  The gradient is dL/dX = (dL/dX_r) H, which autodiff of the products below gives.

  Args:
    x: f[..., D] with D as `hadamard_factors` accepts.

  Returns:
    f[..., D] in x's dtype, computed in float32.

  Source: 2504.18415 section 2; docs/methods/bitnet_v2.md on the Kronecker factors.
  Departs from the paper in covering widths that are not powers of two.
  """
  factors = hadamard_factors(x.shape[-1])
  sizes = [f.shape[0] for f in factors]
  y = x.astype(jnp.float32).reshape(*x.shape[:-1], *sizes)
  for axis, factor in enumerate(factors):
    normalised = jnp.asarray(factor / math.sqrt(factor.shape[0]), jnp.float32)
    place = axis - len(factors)
    y = jnp.matmul(jnp.moveaxis(y, place, -1), normalised.T,
                   precision=jax.lax.Precision.HIGHEST)
    y = jnp.moveaxis(y, -1, place)
  return y.reshape(x.shape).astype(x.dtype)


# --- The fused op ---------------------------------------------------------------


def rotated(x: jax.Array, gain: jax.Array | None, epsilon: float) -> jax.Array:
  """What is quantised: N Hᵀ in float32, N = X / √(mean(X²) + ε) · gain rounded to X's type.

  Args:
    x: f[..., D]; gain: f[D], or None for N = X.

  Returns:
    f32[..., D].
  """
  normed = x
  if gain is not None:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + epsilon)
    normed = (x32 * inverse * gain).astype(x.dtype)
  return hadamard(normed.astype(jnp.float32))


def hadamard_quantize(x_MD: jax.Array, gain_D: jax.Array | None, activations: Activations,
                      epsilon: float) -> tuple[jax.Array, jax.Array]:
  """The definition of `api.hadamard_quantize`, which see."""
  codes, scale = quantize(rotated(x_MD, gain_D, epsilon), activations)
  return codes.astype(jnp.int8 if activations == 'int8' else jnp.int4), scale
