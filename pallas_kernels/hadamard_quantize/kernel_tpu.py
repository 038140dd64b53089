"""RMSNorm, Hadamard rotation and quantisation of rows in one pass, on the MXU.

With H = H_a ⊗ H_b, b ∈ {64, 128} and P = 128 / b, an index of D is (i, j) = (t, h, j): lane
tile t, part h of its lanes. P rows share the lanes of a tile while they are rotated:

  enter  norm, in x's dtype; parts of lanes change places between P rows, so that a tile holds
         the same i for P rows; Y = X (I ⊗ H_bᵀ): rows stream through a fixed matrix. ±1 and
         16-bit activations are exact, sums are float32. Rows of Y are stored with a stride, so
         that for P rows all i lie one below another
  mix    Z = H_a Y for each P rows. Y is split into two bfloat16 terms: what they leave out is
         below 2⁻¹⁶ of a value
  leave  strided loads bring rows together again; scale, round, parts change places back

Nothing is normalised on the way: D^-½ goes into the scale. `enter` and `leave` keep the vector
units busy, `mix` the MXU. So a grid step takes two groups of rows and each stage of a group is
emitted beside other stages of other groups: a group enters, is mixed in the next half step and
leaves in the one after that, in the next grid step.
"""

from collections.abc import Iterator
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hadamard_quantize import reference
from pallas_kernels.hadamard_quantize.tuning import Blocks, Target

Array = jax.Array
LANES = 128
SUBLANES = 8
# Rows that one strided access takes must not be a multiple of 8 apart: they would share banks
# of VMEM, and the access would be cut into two or four.
SKEW = 4
SPARE_BYTES = 4 << 20  # of VMEM, for what the compiler keeps there
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


def _lanes_matrix(h_b: np.ndarray, width: int) -> np.ndarray:
  """[width, width]: H_bᵀ for each part of a tile's lanes. Two tiles that come from P = 2 rows
  also exchange parts there: (row, part, lane) goes to (part, row, lane)."""
  b = h_b.shape[0]
  matrix = np.kron(np.eye(width // b), h_b.T)
  if width > LANES > b:
    matrix = matrix.reshape(width, 2, 2, b).swapaxes(1, 2).reshape(width, width)
  return matrix


def _exchange(tiles: list[Array], part: int) -> Array:
  """Lanes of part q come from tile q, where they are lanes of `part`."""
  if len(tiles) == 1:
    return tiles[0]
  words = [pltpu.bitcast(x, jnp.int32) if x.dtype.itemsize < 4 else x for x in tiles]
  left = jax.lax.broadcasted_iota(jnp.int32, words[0].shape, 1) < LANES // 2
  other = pltpu.roll(words[1 - part], LANES // 2, 1)
  out = jnp.where(left, *((words[0], other) if part == 0 else (other, words[1])))
  return pltpu.bitcast(out, tiles[0].dtype) if tiles[0].dtype.itemsize < 4 else out


def _split(x: Array, rounds: bool) -> list[Array]:
  """Two bfloat16 terms that sum to x within 2⁻¹⁶ of it.

  The first is x rounded or x cut off, which is cheaper where narrow MXUs are (rounding there
  takes a detour over packed words).
  """
  if rounds:
    high = x.astype(jnp.bfloat16)
    return [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]
  upper = jax.lax.bitcast_convert_type(
      jax.lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16), jnp.float32)
  return [upper.astype(jnp.bfloat16), (x - upper).astype(jnp.bfloat16)]


def _dot(x: Array, y: Array) -> Array:
  return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _weave(*stages: tuple[int, Iterator[None], float, float]) -> None:
  """Emits stages side by side: each (steps, what emits one step a turn, first and last turn).

  The compiler keeps much of the order in which work is emitted.
  """
  turns = sorted((start + (end - start) * (step + 0.5) / length, order)
                 for order, (length, _, start, end) in enumerate(stages)
                 for step in range(length))
  for _, order in turns:
    next(stages[order][1])


def _body(x_ref: Any, *refs: Any, activations: reference.Activations, epsilon: float,
          has_gain: bool, num_parts: int, order: int, num_groups: int, tiles: int,
          mxu: int, num_rows: int) -> None:
  gain_ref: Any = refs[0] if has_gain else None
  refs = refs[1:] if has_gain else refs
  h_a_ref, h_b_ref, codes_ref, scale_ref, y_ref, z_ref, stat_ref = refs
  D, G, P = x_ref.shape[1], x_ref.shape[0] // num_groups, num_parts
  S, height = G // P, h_a_ref.shape[0]  # P rows stand in each of S places, `height` high.
  stride, stat_stride = height + SKEW, S + SKEW
  is_wide, width = mxu > LANES, h_b_ref.shape[0]
  columns = [pl.ds(c, width) for c in range(0, D, width)]
  reduce = jnp.sum if activations == 'int4' else jnp.max

  # Rows beyond the array may hold anything, and 0 · NaN would reach the row beside.
  beyond = -num_rows % x_ref.shape[0]
  if beyond:
    last = pl.cdiv(num_rows, x_ref.shape[0]) - 1
    per_core = pl.num_programs(1) - (num_groups - 1)
    @pl.when(pl.program_id(0) * per_core + pl.program_id(1) >= last)
    def _() -> None:
      x_ref[pl.ds(x_ref.shape[0] - beyond, beyond), :] = jnp.zeros((beyond, D), x_ref.dtype)

  def place(g: int, i: int) -> Any:
    return pl.ds(g * S * stride + i, S, stride=stride)

  def stat_rows(g: int, k: int) -> int:
    return (g * SUBLANES + k) * stat_stride

  def enter(g: int) -> Iterator[None]:
    rows = pl.ds(g * G, G)
    if has_gain:
      squares = jnp.zeros((G, width), jnp.float32)
      for n, column in enumerate(columns):
        x32 = x_ref[rows, column].astype(jnp.float32)
        squares += x32 * x32
        if n % tiles == 0:
          yield
      inverse = jax.lax.rsqrt(squares.sum(1, keepdims=True) / D + epsilon)
    for k in range(order, height):  # What H_a's columns of zeros meet must be finite.
      y_ref[place(g, k), :] = jnp.zeros((S, LANES), jnp.float32)
    i = 0
    for n in range(0, len(columns), tiles):
      xs: list[Array] = []
      for column in columns[n:n + tiles]:
        x = x_ref[rows, column]
        if has_gain:
          x = (x.astype(jnp.float32) * inverse * gain_ref[:, column]).astype(x.dtype)
        parts = [x[p * S:(p + 1) * S] for p in range(P)]
        if width == LANES:
          xs += [_exchange(parts, part) for part in range(P)]
        elif P == 1:
          xs.append(x)
        else:
          xs += [jnp.concatenate([part[:, c:c + LANES] for part in parts], 1)
                 for c in range(0, width, LANES)]
      x = jnp.concatenate(xs)
      terms = [x] if x.dtype == jnp.bfloat16 else _split(x, is_wide)
      y = functools.reduce(jnp.add, [_dot(term, h_b_ref[...]) for term in terms])
      for r in range(0, y.shape[0], S):
        for c in range(0, width, LANES):
          y_ref[place(g, i), :] = y[r:r + S, c:c + LANES]
          i += 1
      yield

  def mix(g: int) -> Iterator[None]:
    for s0 in range(0, S, mxu // LANES):
      places = [pl.ds((g * S + s) * stride, height) for s in range(s0, s0 + mxu // LANES)]
      terms = _split(jnp.concatenate([y_ref[p, :] for p in places], 1), is_wide)
      if is_wide:  # Both terms fit into one contraction.
        z = _dot(h_a_ref[...], jnp.concatenate(terms))
      else:
        z = _dot(h_a_ref[...], terms[0]) + _dot(h_a_ref[...], terms[1])
      for k, p in enumerate(places):
        z_s = z[:, k * LANES:(k + 1) * LANES]
        z_ref[p, :] = z_s
        stat_ref[pl.ds(stat_rows(g, 0) + s0 + k, SUBLANES, stride=stat_stride), :] = reduce(
            jnp.abs(z_s).reshape(-1, SUBLANES, LANES), axis=0)
      yield

  def leave(g: int) -> Iterator[None]:
    stat = reduce(jnp.stack([stat_ref[pl.ds(stat_rows(g, k), S), :] for k in range(SUBLANES)]),
                  axis=0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (S, LANES), 1)
    multiplier = jnp.zeros((S, LANES), jnp.float32)
    for p in range(P):
      is_part = (lane >= p * LANES // P) & (lane < (p + 1) * LANES // P)
      value = reduce(jnp.where(is_part, stat, 0.0), axis=1, keepdims=True)
      value = value * (D**-0.5 / (D if activations == 'int4' else 1))
      scale = jnp.maximum(value, reference.EPSILON) / _MAX_CODE[activations]
      scale_ref[pl.ds(g * G + p * S, S), :] = scale
      multiplier = jnp.where(is_part, D**-0.5 / scale, multiplier)
    for t in range(D // LANES):
      codes = []
      for part in range(P):
        code = jnp.round(z_ref[place(g, t * P + part), :] * multiplier)
        if activations == 'int4':  # max|X| / 127 and max|X| / 7 never clip.
          code = jnp.clip(code, -8, 7)
        code = code.astype(jnp.int32)
        codes.append(code.astype(jnp.int8 if S % 32 == 0 else jnp.int16) if P > 1 else code)
      codes_ref[pl.ds(g * G, G), pl.ds(t * LANES, LANES)] = jnp.concatenate(
          [_exchange(codes, p) for p in range(P)]).astype(codes_ref.dtype)
      yield

  num_enters, num_mixes = pl.cdiv(len(columns), tiles) * (1 + has_gain), S * LANES // mxu
  if num_groups == 1:
    for stage in (enter(0), mix(0), leave(0)):
      for _ in stage:
        pass
    return
  for g in range(num_groups):
    _weave((num_mixes, mix(1 - g), 0, 1), (num_enters, enter(g), 0, 0.7),
           (D // LANES, leave(g), 0.3, 1))


@functools.partial(jax.jit,
                   static_argnames=('activations', 'epsilon', 'target', 'blocks', 'interpret'))
def hadamard_quantize(x_MD: Array, gain_D: Array | None, *, activations: reference.Activations,
                      epsilon: float, target: Target, blocks: Blocks, interpret: Any = False
                      ) -> tuple[Array, Array]:
  """The kernel. See `api.hadamard_quantize`.

  Raises:
    NotImplementedError: a width whose factors do not fit the tiles.
  """
  M, D = x_MD.shape
  h_a, h_b = factors(D)
  P, a = LANES // h_b.shape[0], h_a.shape[0]
  height = pl.cdiv(a, SUBLANES) * SUBLANES
  h_a = np.pad(h_a, (0, height - a))
  h_a = np.concatenate([h_a] * (target.mxu // LANES), 1)
  h_b = _lanes_matrix(h_b, target.mxu if D % target.mxu == 0 else LANES)
  num_groups = 1 if M <= blocks.rows else 2
  R = num_groups * blocks.rows
  num_steps = pl.cdiv(M, R)
  cores = min(target.cores, num_steps)
  per_core = pl.cdiv(num_steps, cores)
  lag = num_groups - 1  # of the codes, in grid steps

  def row_block(core: Any, step: Any) -> tuple[Any, int]:
    return jnp.minimum(core * per_core + jnp.minimum(step, per_core - 1), num_steps - 1), 0

  def codes_block(core: Any, step: Any) -> tuple[Any, int]:
    return row_block(core, jnp.maximum(step - lag, 0))

  whole = lambda core, step: (0, 0)
  args = [x_MD]
  in_specs = [pl.BlockSpec((R, D), row_block)]
  if gain_D is not None:
    args.append(gain_D.astype(jnp.float32)[None])
    in_specs.append(pl.BlockSpec((1, D), whole))
  for matrix in (h_a, h_b):
    args.append(jnp.asarray(matrix, jnp.bfloat16))
    in_specs.append(pl.BlockSpec(matrix.shape, whole))
  num_rotated = R // P * (height + SKEW)
  rotated = pltpu.VMEM((num_rotated, LANES), jnp.float32)
  codes_dtype = jnp.int8 if activations == 'int8' else jnp.int4
  vmem_bytes = 2 * R * D * (x_MD.dtype.itemsize + 1) + 2 * num_rotated * LANES * 4 + SPARE_BYTES
  return pl.pallas_call(
      functools.partial(_body, activations=activations, epsilon=epsilon,
                        has_gain=gain_D is not None, num_parts=P, order=a,
                        num_groups=num_groups, tiles=blocks.tiles, mxu=target.mxu, num_rows=M),
      grid=(cores, per_core + lag),
      in_specs=in_specs,
      out_specs=[pl.BlockSpec((R, D), codes_block), pl.BlockSpec((R, 1), codes_block)],
      out_shape=[jax.ShapeDtypeStruct((M, D), codes_dtype),
                 jax.ShapeDtypeStruct((M, 1), jnp.float32)],
      scratch_shapes=[rotated, rotated, pltpu.VMEM(
          (num_groups * SUBLANES * (blocks.rows // P + SKEW), LANES), jnp.float32)],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'),
                                           vmem_limit_bytes=vmem_bytes),
      name='hadamard_quantize', interpret=interpret)(*args)
