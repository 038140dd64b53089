"""RMSNorm, Hadamard rotation and quantisation of rows in one pass, on the MXU.

With H = H_a ⊗ H_b, b ∈ {64, 128} and P = 128 / b, an index of D is (i, j) = (t, h, j): lane
tile t, part h of its lanes. P rows share the lanes of a tile while they are rotated:

  norm     the rows of a block, in x's dtype; parts of lanes change places between P rows, so
           that a tile holds the same i for P rows
  lanes    Y = X (I_P ⊗ H_bᵀ): rows stream through a fixed matrix. ±1 and 16-bit activations
           are exact, sums are float32
  scatter  rows of Y are stored with a stride, so that for P rows all i lie one below another
  tiles    Z = H_a Y for each P rows. Y is split into two bfloat16 terms: what they leave out is
           below 2⁻¹⁷ of a value
  gather   strided loads bring rows together again; scale, round, parts change places back

Nothing is normalised on the way: D^-½ goes into the scale.
"""

import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hadamard_quantize import reference
from pallas_kernels.hadamard_quantize.tuning import Blocks

Array = jax.Array
LANES = 128
SUBLANES = 8
# (statistic, its divisor, clip low, clip high); max|X| / 127 and max|X| / 7 never clip.
_MAX_CODE = {'int8': 127.0, 'int4': reference.SQRT_7, 'int4_absmax': 7.0}


def factors(D: int) -> tuple[np.ndarray, np.ndarray]:
  """H_a and H_b with H = H_a ⊗ H_b and b = 64 or 128.

  Raises:
    NotImplementedError: this width has none.
  """
  first, *_ = reference.hadamard_factors(D)
  is_power = D & (D - 1) == 0
  power = D if is_power else D // first.shape[0]  # The order of the Sylvester part: it is
  b = min(power, LANES)  # one matrix however it is cut into factors.
  if b < LANES // 2 or D % LANES or D // b > LANES:
    raise NotImplementedError(f'width {D} is not at most 128 times a factor of 64 or 128')
  h_a = reference.sylvester(power // b)
  return (h_a if is_power else np.kron(first, h_a)), reference.sylvester(b)


def _exchange(tiles: list[Array], part: int) -> Array:
  """Lanes of part q come from tile q, where they are lanes of `part`."""
  if len(tiles) == 1:
    return tiles[0]
  words = [pltpu.bitcast(x, jnp.int32) if x.dtype.itemsize < 4 else x for x in tiles]
  left = jax.lax.broadcasted_iota(jnp.int32, words[0].shape, 1) < LANES // 2
  other = pltpu.roll(words[1 - part], LANES // 2, 1)
  out = jnp.where(left, *((words[0], other) if part == 0 else (other, words[1])))
  return pltpu.bitcast(out, tiles[0].dtype) if tiles[0].dtype.itemsize < 4 else out


def _split(x: Array) -> tuple[Array, Array]:
  """Two bfloat16 terms that sum to x within 2⁻¹⁷ of it."""
  high = x.astype(jnp.bfloat16)
  return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _dot(x: Array, y: Array) -> Array:
  return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _body(x_ref: Any, *refs: Any, activations: reference.Activations, epsilon: float,
          has_gain: bool, num_parts: int, order: int) -> None:
  gain_ref: Any = refs[0] if has_gain else None
  refs = refs[1:] if has_gain else refs
  h_a_ref, h_b_ref, codes_ref, scale_ref, y_ref, stat_ref = refs
  R, D = x_ref.shape
  P, S, stride = num_parts, R // num_parts, h_a_ref.shape[0]
  rows = [pl.ds(p * S, S) for p in range(P)]
  tiles = [pl.ds(t * LANES, LANES) for t in range(D // LANES)]

  if has_gain:
    squares = jnp.zeros((R, LANES), jnp.float32)
    for tile in tiles:
      x32 = x_ref[:, tile].astype(jnp.float32)
      squares += x32 * x32
    inverse = jax.lax.rsqrt(squares.sum(1, keepdims=True) / D + epsilon)

  for k in range(order, stride):  # What H_a's columns of zeros meet must be finite.
    y_ref[pl.ds(k, S, stride=stride), :] = jnp.zeros((S, LANES), jnp.float32)
  for t, tile in enumerate(tiles):
    xs = [x_ref[r, tile] for r in rows]
    if has_gain:
      xs = [(x.astype(jnp.float32) * inverse[p * S:(p + 1) * S] * gain_ref[:, tile]
             ).astype(x.dtype) for p, x in enumerate(xs)]
    ys = []
    for x in xs:
      terms = (x,) if x.dtype == jnp.bfloat16 else _split(x)
      products = [_dot(term, h_b_ref[...]) for term in terms]
      ys.append(functools.reduce(jnp.add, products))
    for part in range(P):
      y_ref[pl.ds(t * P + part, S, stride=stride), :] = _exchange(ys, part)

  reduce = jnp.sum if activations == 'int4' else jnp.max
  for s in range(S):
    group = pl.ds(s * stride, stride)
    high, low = _split(y_ref[group, :])
    z = _dot(h_a_ref[...], high) + _dot(h_a_ref[...], low)
    y_ref[group, :] = z
    stat_ref[pl.ds(s, SUBLANES, stride=S), :] = reduce(
        jnp.abs(z).reshape(-1, SUBLANES, LANES), axis=0)

  stat = reduce(jnp.stack([stat_ref[pl.ds(k * S, S), :] for k in range(SUBLANES)]), axis=0)
  lane = jax.lax.broadcasted_iota(jnp.int32, (S, LANES), 1)
  multiplier = jnp.zeros((S, LANES), jnp.float32)
  for p in range(P):
    is_part = (lane >= p * LANES // P) & (lane < (p + 1) * LANES // P)
    value = reduce(jnp.where(is_part, stat, 0.0), axis=1, keepdims=True)
    value = value * (D**-0.5 / (D if activations == 'int4' else 1))
    scale = jnp.maximum(value, reference.EPSILON) / _MAX_CODE[activations]
    scale_ref[rows[p], :] = scale
    multiplier = jnp.where(is_part, D**-0.5 / scale, multiplier)

  for t, tile in enumerate(tiles):
    codes = []
    for part in range(P):
      code = jnp.round(y_ref[pl.ds(t * P + part, S, stride=stride), :] * multiplier)
      if activations == 'int4':
        code = jnp.clip(code, -8, 7)
      codes.append(code.astype(jnp.int32))
    for p in range(P):
      codes_ref[rows[p], tile] = _exchange(codes, p).astype(codes_ref.dtype)


@functools.partial(jax.jit, static_argnames=('activations', 'epsilon', 'blocks', 'interpret'))
def hadamard_quantize(x_MD: Array, gain_D: Array | None, *, activations: reference.Activations,
                      epsilon: float, blocks: Blocks, interpret: Any = False
                      ) -> tuple[Array, Array]:
  """The kernel. See `api.hadamard_quantize`.

  Raises:
    NotImplementedError: a width whose factors do not fit the tiles.
  """
  M, D = x_MD.shape
  h_a, h_b = factors(D)
  P, a = LANES // h_b.shape[0], h_a.shape[0]
  R = blocks.rows
  stride = math.ceil(a / SUBLANES) * SUBLANES
  padded = np.zeros((stride, stride))
  padded[:a, :a] = h_a
  whole = lambda i: (0, 0)
  row_block = lambda i: (i, 0)
  args = [x_MD]
  in_specs = [pl.BlockSpec((R, D), row_block)]
  if gain_D is not None:
    args.append(gain_D.astype(jnp.float32)[None])
    in_specs.append(pl.BlockSpec((1, D), whole))
  for matrix in (padded, np.kron(np.eye(P), h_b.T)):
    args.append(jnp.asarray(matrix, jnp.bfloat16))
    in_specs.append(pl.BlockSpec(matrix.shape, whole))
  codes_dtype = jnp.int8 if activations == 'int8' else jnp.int4
  return pl.pallas_call(
      functools.partial(_body, activations=activations, epsilon=epsilon,
                        has_gain=gain_D is not None, num_parts=P, order=a),
      grid=(pl.cdiv(M, R),),
      in_specs=in_specs,
      out_specs=[pl.BlockSpec((R, D), row_block), pl.BlockSpec((R, 1), row_block)],
      out_shape=[jax.ShapeDtypeStruct((M, D), codes_dtype),
                 jax.ShapeDtypeStruct((M, 1), jnp.float32)],
      scratch_shapes=[pltpu.VMEM((R // P * stride, LANES), jnp.float32),
                      pltpu.VMEM((R // P * SUBLANES, LANES), jnp.float32)],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
      name='hadamard_quantize', interpret=interpret)(*args)
