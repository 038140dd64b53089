"""The operations of a transformer block on a TPU mesh: Pallas kernels, each under `shard_map`.

A weight is quantised where it is stored, and its codes are gathered over the axis `fsdp`, four to a
byte. A product whose contraction is split over the axis `tensor` sums exact integers across chips
before it applies the scales.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, Literal

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from jaxrl_pt.config import ActivationQuant
from jaxrl_pt.nn import ops
from jaxrl_pt.nn.attention import branch_attention, causal_attention
from jaxrl_pt.nn.sparse_attention import Reading, sparse_attention
from jaxrl_pt.parallel.rules import TRAIN, Rules, partition_spec
from jaxrl_pt.types import Array
from pallas_kernels import branch_decode as branch_kernel
from pallas_kernels import dispatch
from pallas_kernels import sparse_decode as sparse_kernels
from pallas_kernels.dispatch import Generation, Implementation
from pallas_kernels.hadamard_quantize import hadamard_quantize, reference
from pallas_kernels.sparse_decode import Selection, tuning
from pallas_kernels.ternary_matmul import pack_planar, ternary_matmul, unpack_planar

# Queries and keys of one step of splash attention, of which the sequence must be a multiple.
_BLOCKS = (512, 256, 128)


def make_ops(mesh: Mesh, rules: Rules = TRAIN) -> ops.Ops:
  """The operations for the mesh's devices: kernels on TPUs, XLA on everything else."""
  generation = dispatch.generation_of(mesh.devices.flat[0])
  return ops.Ops() if generation is None else kernel_ops(mesh, rules, generation)


def kernel_ops(mesh: Mesh, rules: Rules, generation: Generation,
               interpret: bool = False) -> ops.Ops:
  """The kernels of a TPU generation on a mesh; `interpret` runs them on a CPU, for tests."""
  bind = functools.partial
  product = bind(_product, mesh, rules, generation, interpret)
  rotated = bind(_rotated, mesh, rules, generation, interpret)
  return ops.Ops(
      _or_xla('ternary_matmul', Implementation('tpu', product), ops.product),
      _or_xla('hadamard_quantize', Implementation('tpu', rotated), ops.rotated),
      _or_xla('attention', Implementation('splash', bind(_attention, mesh, rules, interpret)),
              causal_attention),
      _or_xla('branch_decode',
              Implementation('tpu', bind(_branches, mesh, rules, generation, interpret)),
              branch_attention),
      sparse=_or_xla('sparse_decode',
                     Implementation('tpu', bind(_sparse, mesh, rules, generation, interpret)),
                     sparse_attention))


def _or_xla(op: str, kernel: Implementation, definition: Callable[..., Any]
            ) -> Callable[..., Any]:
  """The kernel, or the definition by XLA where the kernel raises NotImplementedError."""
  return functools.partial(dispatch.first_supported, op,
                           [kernel, Implementation('xla', definition)])


# --- The quantised product ------------------------------------------------------


def _product(mesh: Mesh, rules: Rules, generation: Generation, interpret: bool, x_codes: Array,
             x_scale: Array, w_codes: Array, w_scale: Array, kind: ActivationQuant,
             axes: ops.Axes, dtype: DTypeLike) -> Array:
  if kind == 'none':
    raise NotImplementedError('activations are not quantised')
  if generation == 'v4':  # Neither kernels nor XLA have 2-bit integers there.
    raise NotImplementedError('v4 has no 2-bit integers')
  activations: Literal['int8', 'int4'] = 'int8' if kind == 'int8' else 'int4'
  # Weights are stored split along `embed` and are whole when they are used.
  whole = {**rules, 'embed': ()}
  split, stored = whole[axes[0]], rules['embed']
  rows = _leading(x_codes, rules)
  x_spec = PartitionSpec(*rows, split or None)
  _check_divides(mesh, x_codes.shape, x_spec)
  y_spec = PartitionSpec(*rows, whole[axes[1]] or None)

  def local(x_codes: Array, x_scale: Array, w_codes: Array, w_scale: Array) -> Array:
    w_codes = _gather(w_codes, stored, axes.index('embed'))
    multiply = functools.partial(
        ternary_matmul, x_codes.reshape(-1, x_codes.shape[-1]), x_scale.reshape(-1, 1), w_codes,
        w_scale, activations=activations, generation=generation, interpret=interpret)
    if split:  # Each chip has only a part of every sum.
      sums = jax.lax.psum(multiply(out_dtype=jnp.int32), split)
      scale = x_scale * w_scale[0, 0]
      return (sums.reshape(*x_codes.shape[:-1], -1) * scale).astype(dtype)
    return multiply(out_dtype=dtype).reshape(*x_codes.shape[:-1], -1)

  sharded = jax.shard_map(
      local, mesh=mesh, check_vma=False, out_specs=y_spec,
      in_specs=(x_spec, PartitionSpec(*rows, None), partition_spec(axes, rules),
                PartitionSpec(None, None)))
  # XLA takes only 2-bit arrays of many rows, and a chip's part of a weight may have few.
  w_type = jnp.int8 if stored else jnp.int2
  return sharded(x_codes.astype(jnp.int8 if kind == 'int8' else jnp.int4), x_scale,
                 w_codes.astype(w_type), w_scale)


def _gather(w_codes: Array, mesh_axes: tuple[str, ...], axis: int) -> Array:
  """Gathers this chip's part of a weight into int2 codes that are whole along `axis`.

  Bytes of four codes travel.
  """
  if not mesh_axes:
    return w_codes.astype(jnp.int2)
  packed = pack_planar(w_codes, axis=1 - axis)
  packed = jax.lax.all_gather(packed, mesh_axes, axis=axis, tiled=True)
  return unpack_planar(packed, w_codes.shape[1 - axis], axis=1 - axis)


def _leading(x: Array, rules: Rules) -> tuple[tuple[str, ...] | None, ...]:
  """Mesh axes of the first two dimensions of x, [B, T, …]; a single token is not split."""
  names = ('batch', 'sequence' if x.shape[1] > 1 else None)
  return tuple((rules[name] or None) if name else None for name in names)


def _check_divides(mesh: Mesh, shape: tuple[int, ...], spec: PartitionSpec) -> None:
  for size, axes in zip(shape, spec, strict=True):
    names = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[axis] for axis in names)
    if size % parts:
      raise NotImplementedError(f'{size} does not divide into {parts} parts')


# --- The rotated input ----------------------------------------------------------


def _rotated(mesh: Mesh, rules: Rules, generation: Generation, interpret: bool, x: Array,
             gain: Array | None, epsilon: float,
             kind: ActivationQuant) -> tuple[Array, Array, Array]:
  if kind == 'none':
    raise NotImplementedError('activations are not quantised')
  spec = PartitionSpec(*_leading(x, rules), None)  # Every row is whole on its chip.
  _check_divides(mesh, x.shape, spec)

  def local(x: Array, gain: Array | None) -> tuple[Array, Array]:
    codes, scale = hadamard_quantize(x.reshape(-1, x.shape[-1]), gain, activations=kind,
                                     epsilon=epsilon, generation=generation,
                                     interpret=interpret)
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)

  sharded = jax.shard_map(local, mesh=mesh, check_vma=False, in_specs=(spec, PartitionSpec(None)),
                          out_specs=(spec, spec))
  codes, scale = sharded(jax.lax.stop_gradient(x), jax.lax.stop_gradient(gain))
  # Only the derivative of x_r is used; the compiler drops its rotation from the forward pass.
  x_r = reference.rotated(x, gain, epsilon).astype(x.dtype)
  return x_r, codes, scale


# --- Attention ------------------------------------------------------------------


def _attention(mesh: Mesh, rules: Rules, interpret: bool, q: Array, k: Array, v: Array,
               segments_BT: Array) -> Array:
  """JAX's splash attention, causal inside segments, with a kernel for its gradient, too."""
  _, length, _, head_dim = q.shape
  blocks = [b for b in _BLOCKS if length % b == 0]
  if not blocks:
    raise NotImplementedError(f'a length of {length} is no multiple of {_BLOCKS[-1]}')
  if head_dim % 128:
    raise NotImplementedError(f'a head of {head_dim} channels is no multiple of 128')
  if any(mesh.shape[axis] > 1 for axis in rules['sequence']):
    raise NotImplementedError('the sequence is split over chips')
  spec = PartitionSpec(rules['batch'] or None, None, rules['heads'] or None, None)
  _check_divides(mesh, q.shape, spec)
  _check_divides(mesh, k.shape, spec)
  block = blocks[0]
  sizes = splash_attention_kernel.BlockSizes(
      block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
      block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block)

  def local(q: Array, k: Array, v: Array, segments_BT: Array) -> Array:
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((length, length))] * q.shape[2])
    kernel = splash_attention_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    segments = splash_attention_kernel.SegmentIds(segments_BT, segments_BT)
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    q = (q * head_dim**-0.5).astype(q.dtype)
    out_BHTE = jax.vmap(kernel)(heads_first(q), heads_first(k), heads_first(v), segments)
    return heads_first(out_BHTE)

  sharded = jax.shard_map(local, mesh=mesh, check_vma=False, out_specs=spec,
                          in_specs=(spec, spec, spec, PartitionSpec(rules['batch'] or None, None)))
  return sharded(q, k, v, segments_BT)


def _branches(mesh: Mesh, rules: Rules, generation: Generation, interpret: bool, q_NRSHE: Array,
              k_prefix: Array, v_prefix: Array, lengths_NR: Array, k_own: Array, v_own: Array,
              step: Array | int) -> Array:
  """Attention of one new token of each branch by a kernel; documents and heads are split."""
  if q_NRSHE.shape[2] != 1:
    raise NotImplementedError('the kernel takes one new token a branch')
  rows, heads, kv_heads = (rules[name] or None for name in ('batch', 'heads', 'kv_heads'))
  q_spec = PartitionSpec(rows, None, None, heads, None)
  keys, own = PartitionSpec(rows, kv_heads), PartitionSpec(rows, kv_heads)
  for x, spec in ((q_NRSHE, q_spec), (k_prefix, PartitionSpec(rows, kv_heads, None, None))):
    _check_divides(mesh, x.shape, spec)

  def local(q: Array, k_prefix: Array, v_prefix: Array, lengths_NR: Array, k_own: Array,
            v_own: Array, step: Array) -> Array:
    out_NHRE, _ = branch_kernel.branch_decode(
        q[:, :, 0].transpose(0, 2, 1, 3), k_prefix.astype(q.dtype), v_prefix.astype(q.dtype),
        lengths_NR, k_own.astype(q.dtype), v_own.astype(q.dtype),
        jnp.broadcast_to(step + 1, lengths_NR.shape), generation=generation, interpret=interpret)
    return out_NHRE.transpose(0, 2, 1, 3)[:, :, None]

  sharded = jax.shard_map(
      local, mesh=mesh, check_vma=False, out_specs=q_spec,
      in_specs=(q_spec, keys, keys, PartitionSpec(rows), own, own, PartitionSpec()))
  return sharded(q_NRSHE, k_prefix, v_prefix, lengths_NR, k_own, v_own,
                 jnp.asarray(step, jnp.int32))


# --- Sparse attention over pages --------------------------------------------------


def _sparse(mesh: Mesh, rules: Rules, generation: Generation, interpret: bool, q_BHE: Array,
            pages: Array, bounds_LBKPD: Array, layer: Array, table_BP: Array, lengths_B: Array, *,
            selection: Selection) -> Reading:
  rows, heads, kv_heads = (rules[name] or None for name in ('batch', 'heads', 'kv_heads'))
  if interpret:
    raise NotImplementedError('it is called by functions that do not interpret kernels')
  if rows:
    raise NotImplementedError('rows that are split share one pool')
  q_spec, lists = PartitionSpec(None, heads), PartitionSpec(None, kv_heads)
  _check_divides(mesh, q_BHE.shape[:2], q_spec)
  _check_divides(mesh, pages.shape[:1], PartitionSpec(kv_heads))
  page_size = pages.shape[3]
  tuned = tuning.blocks(generation, page_size)

  def local(q: Array, pages: Array, bounds: Array, layer: Array, table: Array,
            lengths: Array) -> Reading:
    values = sparse_kernels.block_scores(q, bounds, layer, generation=generation, blocks=tuned)
    blocks, counts = sparse_kernels.select_blocks(
        values, lengths, page_size=page_size, selection=selection, generation=generation)
    out, _ = sparse_kernels.sparse_attention(q, pages, blocks, counts, table, lengths,
                                             generation=generation, blocks=tuned)
    return Reading(out, blocks, counts)

  whole = PartitionSpec()
  specs: Any = Reading(q_spec, lists, whole)  # type: ignore[arg-type]  # The same tree.
  sharded = jax.shard_map(
      local, mesh=mesh, check_vma=False, out_specs=specs,
      in_specs=(q_spec, PartitionSpec(kv_heads), PartitionSpec(None, None, kv_heads), whole, whole,
                whole))
  return sharded(q_BHE, pages, bounds_LBKPD, jnp.asarray(layer), table_BP, lengths_B)
