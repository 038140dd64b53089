"""Weight sync: the policy's parameters from the trainer to the sampler, on the same mesh.

Training splits the parameters over the mesh's `fsdp` axis; a sampler wants them whole along
`embed`, so that a decode step of few rows gathers nothing. One jitted program rounds them to what
the sampler reads (the dtype it computes in, or a code for each BitLinear weight), and one for each
leaf lays it out anew, codes in two bits. They are stamped with their version, and checksums on
both sides of the move must agree. Frozen parameters move once: later syncs move the adapters alone.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxrl_pt import params as P
from jaxrl_pt.checksum import checksum
from jaxrl_pt.models.base import Model
from jaxrl_pt.nn.quant import TernaryWeight, pack
from jaxrl_pt.parallel import rules
from jaxrl_pt.params import abstract as abstract_params
from jaxrl_pt.params import is_spec
from jaxrl_pt.types import Array, Params


class Policy(NamedTuple):
  """Parameters as a sampler holds them: a copy, which outlives the trainer's donated arrays."""

  params: Params
  version: int  # optimiser step
  checksum: dict[str, int]  # of the leaves that moved, by their paths
  num_bytes: int  # that moved; a ternary code takes two bits


def make_weight_sync(model: Model, mesh: Mesh, packed: bool, dtype: DTypeLike = jnp.float32
                   ) -> Callable[[Params, int], Policy]:
  """Returns sync(params, version) → Policy, which is compiled once.

  It keeps the sampler's copy of frozen parameters, so that it serves one run alone.

  Args:
    model: the model whose parameters are moved.
    mesh: the devices of trainer and sampler.
    packed: whether a BitLinear weight takes two bits instead of float32.
    dtype: the type that the sampler computes in; it would round the other matrices to it anyway.

  Raises:
    ValueError: `packed`, and the model's weights are not ternary.
    RuntimeError: (raised by sync) a leaf's checksum differs after the move.
  """
  specs = model.specs
  move_trained, move_frozen = (
      _make_part(model._replace(specs=part(specs, specs)), mesh, packed, dtype)
      for part in (P.trained, P.frozen))
  at_rest: list[Params] = []  # the frozen parameters as the sampler has them

  def sync(params: Params, version: int) -> Policy:
    moved = move_trained(P.trained(specs, params), version)
    if not at_rest:
      frozen = move_frozen(P.frozen(specs, params), version)
      at_rest.append(frozen.params)
      moved = moved._replace(checksum={**frozen.checksum, **moved.checksum},
                             num_bytes=frozen.num_bytes + moved.num_bytes)
    return moved._replace(params=P.joined(moved.params, at_rest[0]))

  return sync


def _make_part(model: Model, mesh: Mesh, packed: bool, dtype: DTypeLike
               ) -> Callable[[Params, int], Policy]:
  """move(params, version) → Policy, for a model whose `specs` are a part of the whole."""
  leave, move = make_leave(model, mesh, packed, dtype), make_move(model, mesh, packed)

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
  """The parameters with codes as int32, whose checksum is that of codes of two bits."""
  return jax.tree.map(lambda x: x.astype(jnp.int32) if x.dtype == jnp.int8 else x, leaving)


def _as_read(model: Model, packed: bool, dtype: DTypeLike, codes: DTypeLike, params: Params
             ) -> Params:
  """The parameters as the sampler reads them, with ternary codes of the type `codes`.

  A chip's part of a weight may be too small for the TPU compiler to lay out in two bits (ten rows
  of 2,560 on 256 chips), so that codes become int2 where they are whole.

  Gains stay as they are. The latent weights of a BitLinear that is not packed stay in float32,
  since its scale is their mean in float32.
  """
  rounded = ('table', 'head', 'adapter') if model.config.quant.is_ternary else (
      'table', 'head', 'adapter', 'projection')
  types = {**dict.fromkeys(rounded, dtype), 'codes': codes}
  params = jax.tree.map(lambda spec, x: x.astype(types.get(spec.role, x.dtype)),
                        model.specs, params, is_leaf=is_spec)
  if not packed:
    return params
  return pack(params, _is_bit_linear(model), codes, model.config.quant.weights)


def _is_bit_linear(model: Model) -> Callable[[tuple[Any, ...]], bool]:
  """Whether the leaf at a path of the parameter tree is a BitLinear's weight."""
  leaves = jax.tree_util.tree_leaves_with_path(model.specs, is_leaf=is_spec)
  projections = {path for path, spec in leaves if spec.role == 'projection'}
  return lambda path: path in projections


def make_leave(model: Model, mesh: Mesh, packed: bool, dtype: DTypeLike = jnp.float32) -> Any:
  """The jitted function from parameters to what the sampler reads of them, where they lie.

  It takes the arguments of `make_weight_sync`. Codes are int8. It is a program apart from the move:
  the TPU compiler fails on both together where a chip's part of a weight has few rows.

  Raises:
    ValueError: `packed`, and the model's weights are not ternary.
  """
  if packed and not model.config.quant.is_ternary:
    raise ValueError('only ternary weights can be packed')
  return jax.jit(functools.partial(_as_read, model, packed, dtype, jnp.int8),
                 out_shardings=_where_they_lie(model, mesh, packed))


def make_move(model: Model, mesh: Mesh, packed: bool) -> Callable[[Params], Params]:
  """The function from what `make_leave` returns to the sampler's copy of the parameters.

  Each leaf moves by a program of its own: the TPU compiler fails on several codes in one.
  """
  laid_out = shardings(model, mesh, packed)
  movers = {sharding: mover(sharding) for sharding in jax.tree.leaves(laid_out)}
  return lambda leaving: jax.tree.map(lambda x, there: movers[there](x), leaving, laid_out)


def mover(sharding: NamedSharding) -> Any:
  """The jitted function from a leaf of what `make_leave` returns to the sampler's copy of it."""
  return jax.jit(functools.partial(_moved, sharding), out_shardings=sharding)


def _moved(sharding: NamedSharding, x: Array) -> Array:
  if x.dtype != jnp.int8:
    return jnp.copy(x)
  # Codes move as bytes: between processes, XLA's collectives on CPUs write past the end of 2-bit
  # arrays. The barriers keep XLA from moving the conversion across the move.
  whole = jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(x), sharding)
  return jax.lax.optimization_barrier(whole).astype(jnp.int2)


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


def shardings(model: Model, mesh: Mesh, packed: bool) -> Any:
  """The NamedSharding of every leaf in the sampler's layout."""
  return _packed(model, rules.param_shardings(model.specs, mesh, rules.SAMPLE), packed)


def _where_they_lie(model: Model, mesh: Mesh, packed: bool) -> Any:
  return _packed(model, rules.param_shardings(model.specs, mesh, rules.TRAIN), packed)


def _packed(model: Model, of_weights: Any, packed: bool) -> Any:
  """Shardings of the parameters, with those of codes and scale for each weight that is packed."""
  is_bit_linear = _is_bit_linear(model)

  def leaf(path: tuple[Any, ...], sharding: NamedSharding) -> Any:
    if not packed or not is_bit_linear(path):
      return sharding
    scale = NamedSharding(sharding.mesh, PartitionSpec())
    return TernaryWeight(sharding, scale)  # type: ignore[arg-type]

  return jax.tree_util.tree_map_with_path(leaf, of_weights)


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


def abstract(model: Model, mesh: Mesh, packed: bool, dtype: DTypeLike = jnp.float32) -> Params:
  """The sampler's parameters as ShapeDtypeStructs with shardings, for compiling ahead of time."""
  return _abstract(model, packed, dtype, jnp.int2, shardings(model, mesh, packed))


def abstract_leaving(model: Model, mesh: Mesh, packed: bool, dtype: DTypeLike = jnp.float32
                     ) -> Params:
  """What `make_leave` returns, as ShapeDtypeStructs with shardings."""
  return _abstract(model, packed, dtype, jnp.int8, _where_they_lie(model, mesh, packed))


def _abstract(model: Model, packed: bool, dtype: DTypeLike, codes: DTypeLike, laid_out: Any
              ) -> Params:
  shapes = jax.eval_shape(functools.partial(_as_read, model, packed, dtype, codes),
                          abstract_params(model.specs))
  return jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes,
      laid_out)
