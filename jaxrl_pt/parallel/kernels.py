"""The operations of a transformer block on a TPU mesh: Pallas kernels, each under `shard_map`.

A compiler cannot split a kernel, so every axis of the mesh is taken apart where it is called. The
caller may be inside a `shard_map` over some axes itself, as a sampler's shards are: these axes
are then one part each, whatever the rules say of them.

A weight is quantised where it is stored, and its codes are gathered over the axis `fsdp`, four to a
byte. A product whose contraction is split over the axis `tensor` sums exact integers across chips
before it applies the scales.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike

from jaxrl_pt.config import ActivationQuant
from jaxrl_pt.nn import ops
from jaxrl_pt.nn.attention import causal_attention
from jaxrl_pt.nn.kv_quant import PackedPages
from jaxrl_pt.nn.page_writes import write_pages
from jaxrl_pt.nn.paged_attention import paged_attention, paged_attention_beside
from jaxrl_pt.nn.sparse_attention import Reading, sparse_attention
from jaxrl_pt.parallel.rules import TRAIN, Rules, partition_spec
from jaxrl_pt.types import Array
from pallas_kernels import dispatch
from pallas_kernels import paged_attention as paged_kernel
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
  made = ops.Ops() if generation is None else kernel_ops(mesh, rules, generation)
  if mesh.size == 1:
    return made
  return made._replace(
      write_pages=lambda *args: _write_pages(_here(mesh, rules), made.write_pages, *args))


def kernel_ops(mesh: Mesh, rules: Rules, generation: Generation,
               interpret: bool = False) -> ops.Ops:
  """The kernels of a TPU generation on a mesh; `interpret` runs them on a CPU, for tests."""
  def on_tpu(op: Callable[..., Any], name: str = 'tpu') -> Implementation:
    return Implementation(name, lambda *args: op(_here(mesh, rules), generation, interpret, *args))

  return ops.Ops(
      _or_xla('ternary_matmul', on_tpu(_product), ops.product),
      _or_xla('hadamard_quantize', on_tpu(_rotated), ops.rotated),
      _or_xla('attention', on_tpu(_attention, 'splash'), causal_attention),
      _or_xla('paged_attention', on_tpu(_paged), paged_attention),
      _or_xla('paged_attention', on_tpu(_paged_beside), paged_attention_beside), write_pages,
      _or_xla('sparse_decode', on_tpu(_sparse), sparse_attention))


class _Place(NamedTuple):
  """Where an operation is called: the mesh, and what the rules split over its free axes."""

  mesh: Mesh | AbstractMesh
  rules: Rules
  axes: frozenset[str]  # Those that no `shard_map` round the operation has taken apart.

  def shard_map(self, local: Callable[..., Any], in_specs: Any, out_specs: Any
                ) -> Callable[..., Any]:
    """`local` on each part; every free axis is taken apart."""
    return jax.shard_map(local, mesh=self.mesh, axis_names=set(self.axes), in_specs=in_specs,
                         out_specs=out_specs, check_vma=False)


def _here(mesh: Mesh, rules: Rules) -> _Place:
  """Inside a `shard_map`, JAX asks for the mesh of the context, which knows the axes taken apart;
  outside there is none, and the mesh of the operations is meant."""
  taken = set(jax.sharding.get_abstract_mesh().manual_axes)
  free = {name: tuple(axis for axis in axes if axis not in taken)
          for name, axes in rules.items()}
  return _Place(jax.sharding.get_abstract_mesh() if taken else mesh, free,
                frozenset(mesh.axis_names) - taken)


def _or_xla(op: str, kernel: Implementation, definition: Callable[..., Any]
            ) -> Callable[..., Any]:
  """The kernel, or the definition by XLA where the kernel raises NotImplementedError."""
  return functools.partial(dispatch.first_supported, op,
                           [kernel, Implementation('xla', definition)])


# --- The quantised product ------------------------------------------------------


def _product(place: _Place, generation: Generation, interpret: bool, x_codes: Array,
             x_scale: Array, w_codes: Array, w_scale: Array, kind: ActivationQuant,
             axes: ops.Axes, dtype: DTypeLike) -> Array:
  if kind == 'none':
    raise NotImplementedError('activations are not quantised')
  if generation == 'v4':  # Neither kernels nor XLA have 2-bit integers there.
    raise NotImplementedError('v4 has no 2-bit integers')
  activations: Literal['int8', 'int4'] = 'int8' if kind == 'int8' else 'int4'
  # Weights are stored split along `embed` and are whole when they are used.
  whole = {**place.rules, 'embed': ()}
  split, stored = whole[axes[0]], place.rules['embed']
  rows = _leading(x_codes, place.rules)
  x_spec = PartitionSpec(*rows, split or None)
  _check_divides(place.mesh, x_codes.shape, x_spec)
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

  sharded = place.shard_map(
      local, (x_spec, PartitionSpec(*rows, None), partition_spec(axes, place.rules),
              PartitionSpec(None, None)), y_spec)
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


def _check_divides(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], spec: PartitionSpec) -> None:
  for size, axes in zip(shape, spec, strict=True):
    names = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[axis] for axis in names)
    if size % parts:
      raise NotImplementedError(f'{size} does not divide into {parts} parts')


# --- The rotated input ----------------------------------------------------------


def _rotated(place: _Place, generation: Generation, interpret: bool, x: Array,
             gain: Array | None, epsilon: float,
             kind: ActivationQuant) -> tuple[Array, Array, Array]:
  if kind == 'none':
    raise NotImplementedError('activations are not quantised')
  spec = PartitionSpec(*_leading(x, place.rules), None)  # Every row is whole on its chip.
  _check_divides(place.mesh, x.shape, spec)

  def local(x: Array, gain: Array | None) -> tuple[Array, Array]:
    codes, scale = hadamard_quantize(x.reshape(-1, x.shape[-1]), gain, activations=kind,
                                     epsilon=epsilon, generation=generation,
                                     interpret=interpret)
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)

  sharded = place.shard_map(local, (spec, PartitionSpec(None)), (spec, spec))
  codes, scale = sharded(jax.lax.stop_gradient(x), jax.lax.stop_gradient(gain))
  # Only the derivative of x_r is used; the compiler drops its rotation from the forward pass.
  x_r = reference.rotated(x, gain, epsilon).astype(x.dtype)
  return x_r, codes, scale


# --- Attention ------------------------------------------------------------------


def _attention(place: _Place, generation: Generation, interpret: bool, q: Array, k: Array,
               v: Array, segments_BT: Array) -> Array:
  """JAX's splash attention, causal inside segments, with a kernel for its gradient, too."""
  del generation  # It is the same on all.
  _, length, _, head_dim = q.shape
  blocks = [b for b in _BLOCKS if length % b == 0]
  if not blocks:
    raise NotImplementedError(f'a length of {length} is no multiple of {_BLOCKS[-1]}')
  if head_dim % 128:
    raise NotImplementedError(f'a head of {head_dim} channels is no multiple of 128')
  mesh, rules = place.mesh, place.rules
  if any(mesh.shape[axis] > 1 for axis in rules['sequence']):
    raise NotImplementedError('the sequence is split over chips')
  spec = PartitionSpec(rules['batch'] or None, None, rules['heads'] or None, None)
  _check_divides(place.mesh, q.shape, spec)
  _check_divides(place.mesh, k.shape, spec)
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

  sharded = place.shard_map(
      local, (spec, spec, spec, PartitionSpec(rules['batch'] or None, None)), spec)
  return sharded(q, k, v, segments_BT)


def _paged(place: _Place, generation: Generation, interpret: bool, q_BSHE: Array,
           pages: Array | PackedPages, scales: Array | None, table_BP: Array, starts_B: Array,
           counts_B: Array) -> Array:
  """Attention over pages by a kernel; heads are split, rows and the pool are each chip's own."""
  if isinstance(pages, PackedPages):
    raise NotImplementedError(f'pages of {pages.bits} bits are read by XLA')
  paged_kernel.check(q_BSHE, pages)
  heads, kv_heads = (place.rules[name] or None for name in ('heads', 'kv_heads'))
  q_spec = PartitionSpec(None, None, heads, None)
  pool = PartitionSpec(kv_heads)
  _check_divides(place.mesh, q_BSHE.shape, q_spec)
  _check_divides(place.mesh, pages.shape[:1], pool)
  local = functools.partial(paged_kernel.paged_attention, generation=generation,
                            interpret=interpret)
  sharded = place.shard_map(local, (q_spec, pool, pool, *[PartitionSpec()] * 3), q_spec)
  return sharded(q_BSHE, pages, scales, table_BP, starts_B, counts_B)


def _paged_beside(place: _Place, generation: Generation, interpret: bool, *args: Any) -> Array:
  """`paged_attention_beside` by the kernel, which reads for each row also what neighbours share."""
  *of_rows, _, _ = args
  return _paged(place, generation, interpret, *of_rows)


def _write_pages(place: _Place, write: ops.WritePages, pool: Array, table_BP: Array,
                 starts_B: Array, counts_B: Array, new_BSK: Array, nobody: Array | int) -> Array:
  """Each chip writes the heads that it holds, for which XLA alone would join all chips."""
  heads, whole = place.rules['kv_heads'] or None, PartitionSpec()
  sharded = place.shard_map(
      write, (PartitionSpec(heads), whole, whole, whole, PartitionSpec(None, None, heads), whole),
      PartitionSpec(heads))
  written: Array = sharded(pool, table_BP, starts_B, counts_B, new_BSK,
                           jnp.asarray(nobody, jnp.int32))
  return written


# --- Sparse attention over pages --------------------------------------------------


def _sparse(place: _Place, generation: Generation, interpret: bool, q_BHE: Array,
            pages: Array | PackedPages, bounds_LBKPD: Array, layer: Array, table_BP: Array,
            lengths_B: Array, selection: Selection, scales: Array | None = None) -> Reading:
  """Sparse attention by kernels; heads are split, rows and the pool are each chip's own."""
  if interpret:
    raise NotImplementedError('it is called by functions that do not interpret kernels')
  if scales is not None or isinstance(pages, PackedPages):
    raise NotImplementedError('quantised pages are read by XLA')
  heads, kv_heads = (place.rules[name] or None for name in ('heads', 'kv_heads'))
  q_spec, lists = PartitionSpec(None, heads), PartitionSpec(None, kv_heads)
  _check_divides(place.mesh, q_BHE.shape[:2], q_spec)
  _check_divides(place.mesh, pages.shape[:1], PartitionSpec(kv_heads))
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
  sharded = place.shard_map(
      local, (q_spec, PartitionSpec(kv_heads), PartitionSpec(None, None, kv_heads), whole, whole,
              whole), specs)
  read: Reading = sharded(q_BHE, pages, bounds_LBKPD, jnp.asarray(layer), table_BP, lengths_B)
  return read
