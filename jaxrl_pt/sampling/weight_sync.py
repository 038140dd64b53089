"""Weight sync: the policy's parameters from the trainer to the sampler, on the same mesh.

Training splits the parameters over the mesh's `fsdp` axis; a sampler wants them whole along
`embed`, so that a decode step of few rows gathers nothing. One jitted program rounds them to what
the sampler reads (the dtype it computes in, or a code for each BitLinear weight), and one for each
leaf lays it out anew, codes in two bits. They are stamped with their version, and checksums on
both sides of the move must agree. Frozen parameters move once: later syncs move the adapters alone.
On one device nothing moves: a sampler reads the trainer's parameters, or what the first program
makes of them.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.checksum import checksum
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.nn.packed import TABLE_BITS, QuantizedTable, to_bytes, to_table
from jaxrl_pt.nn.quant import TernaryWeight, pack
from jaxrl_pt.parallel import rules
from jaxrl_pt.params import ParamSpec, is_spec
from jaxrl_pt.params import abstract as abstract_params
from jaxrl_pt.types import Array, Params


class Policy(NamedTuple):
  """Parameters as a sampler holds them: a copy, which outlives the trainer's donated arrays."""

  params: Params
  version: int  # optimiser step
  checksum: dict[str, int]  # of the leaves that moved, by their paths
  num_bytes: int  # that moved; a ternary code takes two bits


def make_weight_sync(model: Model, mesh: Mesh, packed: bool, dtype: DTypeLike = jnp.float32,
                     head: cfg.Table = 'model') -> Callable[[Params, int], Policy]:
  """Returns sync(params, version) → Policy, which is compiled once.

  It keeps the sampler's copy of frozen parameters, so that it serves one run alone.

  Args:
    model: the model whose parameters are moved.
    mesh: the devices of trainer and sampler.
    packed: whether a BitLinear weight takes two bits instead of float32.
    dtype: the type that the sampler computes in; it would round the other matrices to it anyway.
    head: how embedding and head are held: in `dtype`, or in 8 or 4 bits.

  Raises:
    ValueError: `packed`, and the model's weights are not ternary.
    RuntimeError: (raised by sync) a leaf's checksum differs after the move.
  """
  move_trained, move_frozen = (_make_part(part, mesh, packed, dtype, head)
                               for part in _parts(model))
  at_rest: list[Params] = []  # the frozen parameters as the sampler has them

  def sync(params: Params, version: int) -> Policy:
    moved = move_trained(P.trained(model.specs, params), version)
    if not at_rest:
      frozen = move_frozen(P.frozen(model.specs, params), version)
      at_rest.append(frozen.params)
      moved = moved._replace(checksum={**frozen.checksum, **moved.checksum},
                             num_bytes=frozen.num_bytes + moved.num_bytes)
    return moved._replace(params=_joined(model, moved.params, at_rest[0]))

  return sync


def _parts(model: Model) -> tuple[Model, Model]:
  """The model with the `specs` of its trained parameters alone, and with those of the frozen."""
  specs = model.specs
  return (model._replace(specs=P.trained(specs, specs)),
          model._replace(specs=P.frozen(specs, specs)))


def _joined(model: Model, trained: Params, frozen: Params) -> Params:
  """A sampler's parameters of the two parts, each of which may be packed."""
  def leaf(spec: Any, new: Any, old: Any) -> Any:
    # Codes in the tree of specs are those of a frozen projection.
    return new if is_spec(spec) and spec.is_trained else old

  return jax.tree.map(leaf, model.specs, trained, frozen,
                      is_leaf=lambda x: is_spec(x) or isinstance(x, TernaryWeight))


def _make_part(model: Model, mesh: Mesh, packed: bool, dtype: DTypeLike, head: cfg.Table
               ) -> Callable[[Params, int], Policy]:
  """move(params, version) → Policy, for a model whose `specs` are a part of the whole."""
  leave = make_leave(model, mesh, packed, dtype, head)
  move = make_move(model, mesh, packed, dtype, head)

  def move_part(params: Params, version: int) -> Policy:
    leaving = leave(params)
    arrived = move(leaving)
    sums = checksum(arrived)
    check(checksum(_as_values(leaving)), sums)
    num_bits = sum(x.size * jnp.iinfo(x.dtype).bits if x.dtype == jnp.int2 else 8 * x.nbytes
                   for x in jax.tree.leaves(arrived))
    return Policy(arrived, version, sums, num_bits // 8)

  return move_part


@jax.jit
def _as_values(leaving: Params) -> Params:
  """The parameters with ternary codes as int32, whose checksum is that of codes of two bits."""
  return jax.tree.map(
      lambda w: dataclasses.replace(w, codes=w.codes.astype(jnp.int32)) if _is_packed(w) else w,
      leaving, is_leaf=_is_packed)


def _is_packed(x: Any) -> bool:
  """Whether it is a packed weight; in the part of trained parameters a frozen one is empty."""
  return isinstance(x, TernaryWeight) and x.codes is not None


def _as_read(model: Model, packed: bool, dtype: DTypeLike, head: cfg.Table, codes: DTypeLike,
             params: Params) -> Params:
  """The parameters as the sampler reads them, with ternary codes of the type `codes`.

  A chip's part of a weight may be too small for the TPU compiler to lay out in two bits (ten rows
  of 2,560 on 256 chips), so that codes become int2 where they are whole.

  Gains stay as they are. The latent weights of a BitLinear that is not packed stay in float32,
  since its scale is their mean in float32.
  """
  rounded = ('table', 'head', 'adapter') if model.config.quant.is_ternary else (
      'table', 'head', 'adapter', 'projection')
  types = {**dict.fromkeys(rounded, dtype), 'codes': codes}

  def leaf(spec: ParamSpec, x: Array) -> Any:
    if head != 'model' and spec.role in ('table', 'head'):
      return to_table(x if spec.role == 'table' else x.T, TABLE_BITS[head])
    return x.astype(types.get(spec.role, x.dtype))

  params = jax.tree.map(leaf, model.specs, params, is_leaf=is_spec)
  if not packed:
    return params
  return pack(params, _is_bit_linear(model), codes, model.config.quant.weights)


def check_packed(model: Model, device: jax.Device) -> None:
  """Refuses weights that a sampler on one device cannot hold packed.

  Raises:
    UserError: they are not ternary; or the device is a CPU, whose bytes of codes have one scale for
      a matrix, and the weights have more.
  """
  weights, is_on_cpu = model.config.quant.weights, device.platform == 'cpu'
  if weights == 'none' or (is_on_cpu and weights != 'ternary'):
    raise UserError(
        f"Only weights that are 'ternary' are packed{' on a CPU' if is_on_cpu else ''}, and "
        f"Quant.weights is '{weights}': leave Slots.packed or --packed out.")


def for_one_device(model: Model, device: jax.Device, dtype: DTypeLike, head: cfg.Table = 'model',
                   packed: bool = False) -> Callable[[Params], Params]:
  """The function from a policy's parameters to what a sampler on one device reads.

  Packed ternary weights are codes of two bits, on a CPU bytes of four codes (`nn.packed`). The
  function may be called in a jitted program. Where nothing is packed and the head is the model's,
  the sampler reads the parameters themselves.

  Args:
    model: the policy's model.
    device: where the sampler runs.
    packed: whether ternary weights are packed.
    dtype, head: as for `make_weight_sync`.

  Raises:
    UserError: see `check_packed`.
  """
  if packed:
    check_packed(model, device)
  elif head == 'model':
    return lambda params: params

  def held(params: Params) -> Params:
    read = _as_read(model, packed, dtype, head, jnp.int2, params)
    if device.platform != 'cpu' or not packed:
      return read
    return jax.tree.map(lambda w: to_bytes(w.codes, w.scale) if _is_packed(w) else w, read,
                        is_leaf=_is_packed)

  return held


def make_sync_on_one_device(model: Model, device: jax.Device, dtype: DTypeLike,
                            head: cfg.Table = 'model', packed: bool = False
                            ) -> Callable[[Params], Params]:
  """`for_one_device` as compiled programs; that of frozen parameters runs once, for one run."""
  if head == 'model' and not packed:
    return lambda params: params
  read_trained, read_frozen = (jax.jit(for_one_device(part, device, dtype, head, packed))
                               for part in _parts(model))
  at_rest: list[Params] = []

  def sync(params: Params) -> Params:
    if not at_rest:
      at_rest.append(read_frozen(P.frozen(model.specs, params)))
    return _joined(model, read_trained(P.trained(model.specs, params)), at_rest[0])

  return sync


def _is_bit_linear(model: Model) -> Callable[[tuple[Any, ...]], bool]:
  """Whether the leaf at a path of the parameter tree is a BitLinear's weight."""
  leaves = jax.tree_util.tree_leaves_with_path(model.specs, is_leaf=is_spec)
  projections = {path for path, spec in leaves if spec.role == 'projection'}
  return lambda path: path in projections


def make_leave(model: Model, mesh: Mesh, packed: bool, dtype: DTypeLike = jnp.float32,
               head: cfg.Table = 'model') -> Any:
  """The jitted function from parameters to what the sampler reads of them, where they lie.

  It takes the arguments of `make_weight_sync`. Codes are int8. It is a program apart from the move:
  the TPU compiler fails on both together where a chip's part of a weight has few rows.

  Raises:
    ValueError: `packed`, and the model's weights are not ternary.
  """
  if packed and not model.config.quant.is_ternary:
    raise ValueError('only ternary weights can be packed')
  return jax.jit(functools.partial(_as_read, model, packed, dtype, head, jnp.int8),
                 out_shardings=_where_they_lie(model, mesh, packed, head))


def make_move(model: Model, mesh: Mesh, packed: bool, dtype: DTypeLike = jnp.float32,
              head: cfg.Table = 'model') -> Callable[[Params], Params]:
  """The function from what `make_leave` returns to the sampler's copy of the parameters.

  Each leaf moves by a program of its own: the TPU compiler fails on several codes in one.
  """
  arrived = abstract(model, mesh, packed, dtype, head)
  kinds = {(x.sharding, x.dtype) for x in jax.tree.leaves(arrived)}
  movers = {kind: mover(*kind) for kind in kinds}
  return lambda leaving: jax.tree.map(lambda x, there: movers[there.sharding, there.dtype](x),
                                      leaving, arrived)


def mover(sharding: NamedSharding, dtype: DTypeLike) -> Any:
  """The jitted function from a leaf of what `make_leave` returns to the sampler's copy of it."""
  return jax.jit(functools.partial(_moved, sharding, dtype), out_shardings=sharding)


def _moved(sharding: NamedSharding, dtype: DTypeLike, x: Array) -> Array:
  if x.dtype == dtype:
    return jnp.copy(x)
  # Codes move as bytes: between processes, XLA's collectives on CPUs write past the end of 2-bit
  # arrays. The barriers keep XLA from moving the conversion across the move.
  whole = jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(x), sharding)
  return jax.lax.optimization_barrier(whole).astype(dtype)


def check(left: dict[str, int], arrived: dict[str, int]) -> None:
  """Compares the checksums of two trees.

  Raises:
    RuntimeError: some differ; the message names the first of them.
  """
  wrong = sorted(path for path in left.keys() | arrived.keys()
                 if left.get(path) != arrived.get(path))
  if wrong:
    raise RuntimeError(f'{len(wrong)} of {len(left)} parameters changed on their way to the '
                       f'sampler: {", ".join(wrong[:3])}')


def shardings(model: Model, mesh: Mesh, packed: bool, head: cfg.Table = 'model') -> Any:
  """The NamedSharding of every leaf in the sampler's layout."""
  return _packed(model, mesh, rules.SAMPLE, packed, head)


def _where_they_lie(model: Model, mesh: Mesh, packed: bool, head: cfg.Table) -> Any:
  return _packed(model, mesh, rules.TRAIN, packed, head)


def _packed(model: Model, mesh: Mesh, layout: rules.Rules, packed: bool, head: cfg.Table) -> Any:
  """Shardings of the parameters, with those of codes and scales of what is packed."""
  is_bit_linear = _is_bit_linear(model)
  entries = layout['vocab'] or None
  # Channels of a table lie together in bytes, and none is split.
  rows: Any = NamedSharding(mesh, PartitionSpec(entries, None))
  table = QuantizedTable(
      rows, NamedSharding(mesh, PartitionSpec(entries)),  # type: ignore[arg-type]  # The same tree.
      0 if head == 'model' else TABLE_BITS[head])

  def leaf(path: tuple[Any, ...], spec: ParamSpec, sharding: NamedSharding) -> Any:
    if head != 'model' and spec.role in ('table', 'head'):
      return table
    if not packed or not is_bit_linear(path):
      return sharding
    scale = NamedSharding(sharding.mesh, PartitionSpec())
    return TernaryWeight(sharding, scale)  # type: ignore[arg-type]

  return jax.tree_util.tree_map_with_path(
      leaf, model.specs, rules.param_shardings(model.specs, mesh, layout), is_leaf=is_spec)


def on_shard(params: Params, mesh: Mesh) -> Params:
  """A sampler's parameters as arrays of one shard's mesh.

  They are whole along the axes data and fsdp, so that the shard's devices hold all of them: nothing
  is moved, and no second copy is made.

  Args:
    params: from `sync`.
    mesh: one of `mesh.shard_meshes` of the mesh that they lie on.
  """
  devices = set(mesh.devices.flat)

  def leaf(x: Any) -> Array:
    held = [shard.data for shard in x.addressable_shards if shard.device in devices]
    sharding = NamedSharding(mesh, x.sharding.spec)
    return jax.make_array_from_single_device_arrays(x.shape, sharding, held)

  return jax.tree.map(leaf, params)


def abstract(model: Model, mesh: Mesh, packed: bool, dtype: DTypeLike = jnp.float32,
             head: cfg.Table = 'model') -> Params:
  """The sampler's parameters as ShapeDtypeStructs with shardings, for compiling ahead of time."""
  return _abstract(model, packed, dtype, head, jnp.int2, shardings(model, mesh, packed, head))


def abstract_leaving(model: Model, mesh: Mesh, packed: bool, dtype: DTypeLike = jnp.float32,
                     head: cfg.Table = 'model') -> Params:
  """What `make_leave` returns, as ShapeDtypeStructs with shardings."""
  return _abstract(model, packed, dtype, head, jnp.int8,
                   _where_they_lie(model, mesh, packed, head))


def _abstract(model: Model, packed: bool, dtype: DTypeLike, head: cfg.Table, codes: DTypeLike,
              laid_out: Any) -> Params:
  shapes = jax.eval_shape(functools.partial(_as_read, model, packed, dtype, head, codes),
                          abstract_params(model.specs))
  return jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes,
      laid_out)
