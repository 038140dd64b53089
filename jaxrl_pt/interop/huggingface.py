"""Imports and exports Hugging Face folders: config.json and safetensors of five model families.

Hugging Face's matrices are [out, in], ours [in, out]; both rotate RoPE pairs (i, i + E/2). A packed
BitNet matrix holds four ternary rows in each byte, planar along the output rows, and one scale s:
the class `autobitlinear` stores mean|W| and multiplies by it, `bitlinear` stores 1 / mean|W| and
divides by it (docs/methods/bitnet.md). Codes of which a share f is not 0 become the latent weights
codes · s / f. These have the file's codes as their codes, and s as their absmean up to the rounding
of a float32 sum.

Tensors are read one at a time, and each goes to the devices, into its place in the array of all
layers, before the next is read: the host never holds a second copy of the model.

Nothing in a folder is ignored: each key of config.json is accounted for (`huggingface_config`), and
a tensor that the model has no place for is refused.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import files
from jaxrl_pt.config.model import GROUP
from jaxrl_pt.errors import UserError
from jaxrl_pt.interop import tensor_file
from jaxrl_pt.interop.huggingface_config import (
  TERNARY_128,
  context_length,
  linear_class,
  to_config,
  to_settings,
)
from jaxrl_pt.interop.tensor_file import Entry, Planned
from jaxrl_pt.interop.ternary_rows import latent, pack, unpack
from jaxrl_pt.models import transformer
from jaxrl_pt.nn.quant import EPSILON, as_computed, ternary
from jaxrl_pt.parallel import rules
from jaxrl_pt.params import ParamSpec, is_spec, map_specs
from jaxrl_pt.types import Array, Params

_EMBEDDING, _HEAD = 'model.embed_tokens.weight', 'lm_head.weight'
# Old checkpoints hold RoPE's frequencies, which follow from config.json.
_FREQUENCIES = 'rotary_emb.inv_freq'
_ROUNDING = 2.0**-16  # of the absmean of latent weights, which is summed in float32


def tensor_name(spec: ParamSpec, layer: int = 0) -> str:
  """What a parameter, or one layer of it, is called in a Hugging Face model."""
  kind = 'bias' if spec.role == 'bias' else 'weight'
  return f'{spec.hugging_face.format(layer=layer)}.{kind}'


def is_stacked(spec: ParamSpec) -> bool:
  """Whether a parameter holds all layers, along its first dimension."""
  return '{layer}' in spec.hugging_face


def _layers(spec: ParamSpec) -> range:
  return range(spec.shape[0] if is_stacked(spec) else 1)


def is_transposed(spec: ParamSpec) -> bool:
  """Whether a file has a parameter as [out, in], where ours is [in, out]."""
  return spec.role in ('projection', 'head', 'adapter')


# --- Import ---------------------------------------------------------------------


def read_settings(folder: Path) -> dict[str, Any]:
  """The config.json of a folder.

  Raises:
    UserError: it cannot be read, or is no JSON object.
  """
  return files.read_object(folder / 'config.json', 'give the whole folder of a model, with '
                           'config.json and model.safetensors')


def load_model(folder: str | Path, mesh: Mesh | None = None) -> tuple[cfg.Model, Params]:
  """Reads a model from a Hugging Face folder.

  Parameters are bfloat16 if all of the file's are, and float32 otherwise.

  Args:
    folder: a folder with config.json and model.safetensors, or with its shards and their index.
    mesh: the devices that the parameters are split over; None takes the first device alone.

  Returns:
    The configuration and the tree of parameters in the layout of `models.transformer`.

  Raises:
    UserError: a file is missing or damaged, the variant is not covered, or a tensor is missing, has
      another shape, has no place or holds NaN.
  """
  folder = Path(folder)
  settings = read_settings(folder)
  config = to_config(settings, str(folder / 'config.json'))
  weights = _Weights(folder, linear_class(settings))
  config = dataclasses.replace(config, param_dtype=weights.dtype)
  specs = transformer.build(config).specs
  weights.check(config, specs)

  def leaf(spec: ParamSpec) -> Array:
    if is_stacked(spec):
      return stack(spec, weights.read, mesh)
    return _placed(weights.read(spec, 0), spec, spec.axes, mesh)

  params = map_specs(leaf, specs)
  if config.quant == cfg.Quant() and _is_ternary_128(config, specs, params):
    config = dataclasses.replace(config, quant=TERNARY_128)
  return config, params


def stored_scales(folder: Path) -> dict[str, float]:
  """The scales of a checked folder's packed matrices by the names of their codes.

  Latent weights have these as their absmean up to the rounding of a float32 sum. An export of the
  same model writes them again to the last bit.
  """
  kind, _ = linear_class(read_settings(folder))
  entries = tensor_file.open_folder(folder)
  stored = {name.removesuffix('_scale'): tensor_file.read(entry).astype(np.float32)[0]
            for name, entry in entries.items() if name.endswith('.weight_scale')}
  return {name: float(1 / scale if kind == 'bitlinear' else scale)
          for name, scale in stored.items()}


def _is_ternary_128(config: cfg.Model, specs: Any, params: Params) -> bool:
  """Whether plain weights are a scale for each 128 inputs times −1, 0 and 1, every one of them."""
  widths = config.d_model, config.d_ff, config.num_heads * config.head_dim
  if any(width % GROUP for width in widths):
    return False

  @jax.jit
  def stays(w: Array) -> Array:
    return (as_computed(w, 'ternary_128') == w).all()

  pairs = zip(jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(params), strict=True)
  return all(stays(w[i]) for spec, w in pairs if spec.role == 'projection' for i in _layers(spec))


def _sharding(axes: tuple[str, ...], mesh: Mesh | None) -> Sharding:
  if mesh is None:
    return SingleDeviceSharding(jax.devices()[0])
  return NamedSharding(mesh, rules.partition_spec(axes, rules.TRAIN))


def _on_devices(x: np.ndarray, spec: ParamSpec, axes: tuple[str, ...], mesh: Mesh | None) -> Array:
  """A tensor as it is in the file, of which each device gets its part; `axes` are our order's."""
  sharding = _sharding(axes[::-1] if is_transposed(spec) else axes, mesh)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _placed(x: np.ndarray, spec: ParamSpec, axes: tuple[str, ...], mesh: Mesh | None) -> Array:
  """The array of a parameter that is not stacked over layers."""
  given = _on_devices(x, spec, axes, mesh)
  value, is_finite = _laid_out(given, dtype=spec.dtype, transposed=is_transposed(spec),
                               sharding=_sharding(axes, mesh))
  _check_finite(is_finite, tensor_name(spec))
  given.delete()
  return value


def stack(spec: ParamSpec, read: Callable[[ParamSpec, int], np.ndarray],
          mesh: Mesh | None) -> Array:
  """The array of all layers of a parameter, into which one layer after the other is written."""
  sharding = _sharding(spec.axes, mesh)
  stack = jax.jit(lambda: jnp.zeros(spec.shape, spec.dtype), out_shardings=sharding)()
  for i in range(spec.shape[0]):
    x = _on_devices(read(spec, i), spec, spec.axes[1:], mesh)
    stack, is_finite = _inserted(stack, x, i, transposed=is_transposed(spec), sharding=sharding)
    _check_finite(is_finite, tensor_name(spec, i))  # This waits for the device, too.
    x.delete()  # Otherwise it would live until the next one has been read.
  return stack


@functools.partial(jax.jit, static_argnames=('dtype', 'transposed', 'sharding'))
def _laid_out(x: Array, *, dtype: Any, transposed: bool, sharding: Sharding) -> tuple[Array, Array]:
  ours = (x.T if transposed else x).astype(dtype)
  return jax.lax.with_sharding_constraint(ours, sharding), jnp.isfinite(x).all()


@functools.partial(jax.jit, static_argnames=('transposed', 'sharding'), donate_argnums=0)
def _inserted(stack: Array, x: Array, layer: int, *, transposed: bool,
              sharding: Sharding) -> tuple[Array, Array]:
  ours = (x.T if transposed else x).astype(stack.dtype)
  stack = stack.at[layer].set(ours)
  return jax.lax.with_sharding_constraint(stack, sharding), jnp.isfinite(x).all()


def _check_finite(is_finite: Array, name: str) -> None:
  if not is_finite:
    raise UserError(f'Tensor {name} holds NaN or infinite numbers, with which no model computes: '
                    'download the checkpoint again.')


class _Weights:
  """The tensors of a folder by the parameters that they become. Final."""

  def __init__(self, folder: Path, linear: tuple[str, str]) -> None:
    """Reads the headers.

    Args:
      folder: the checkpoint's folder.
      linear: what `linear_class` returns.
    """
    self._folder, (self._kind, self._mode) = folder, linear
    self._entries = tensor_file.open_folder(folder)
    # Quantised matrices have codes and a scale instead of weights.
    self._has_codes = self._kind != '' and (self._mode, self._kind) != ('online', 'autobitlinear')

  @property
  def dtype(self) -> cfg.Dtype:
    """The type that holds every parameter without rounding."""
    types = {entry.dtype.name for name, entry in self._entries.items()
             if not name.endswith(_FREQUENCIES)}
    return 'bfloat16' if types == {'bfloat16'} and not self._has_codes else 'float32'

  def check(self, config: cfg.Model, specs: Any) -> None:
    """Checks that the folder has the tensors of the model, in their shapes, and no others.

    Raises:
      UserError: it has not.
    """
    unread = {name for name in self._entries if not name.endswith(_FREQUENCIES)}
    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
      for i in _layers(spec):
        unread -= self._names(spec, i)
    if config.tied_head and _HEAD in unread:
      head = self._find(_HEAD, config.vocab_size, config.d_model)
      unread.discard(_HEAD)
      if not tensor_file.are_equal(head, self._entries[_EMBEDDING]):
        raise UserError(f'{self._folder / "config.json"} says tie_word_embeddings = true, but '
                        f'{_HEAD} differs from {_EMBEDDING}: say false to use both, or delete '
                        f'{_HEAD}.')
    if unread:
      raise UserError(f'{self._folder} holds {len(unread)} tensors that a model of its config.json '
                      f'does not have ({", ".join(sorted(unread)[:3])}): the two files are not of '
                      'one model.')

  def read(self, spec: ParamSpec, layer: int) -> np.ndarray:
    """A parameter, or one layer of it, in the file's layout: matrices are [out, in]."""
    name = tensor_name(spec, layer)
    entry = self._entries[name]
    if not (self._has_codes and spec.role == 'projection'):
      return tensor_file.read(entry)
    stored = tensor_file.read(entry)
    num_out = spec.shape[-1]
    codes = unpack(stored, num_out) if entry.dtype == np.uint8 else stored.astype(np.float32)
    if not np.isin(codes, (-1, 0, 1)).all():
      raise UserError(f'Tensor {name} in {self._folder} holds more than −1, 0 and 1, so it is not '
                      f'quantised as quantization_mode {self._mode!r} says: export it again.')
    return latent(codes, self._scale(name))

  def _scale(self, name: str) -> float:
    scale = float(tensor_file.read(self._entries[f'{name}_scale'])[0])
    if self._kind == 'bitlinear':
      scale = 1 / scale if scale else math.inf
    if not (abs(scale) >= EPSILON or scale == 0) or math.isinf(scale):
      raise UserError(f'{name}_scale in {self._folder} stands for a scale of {scale:g}, which no '
                      f'weights have (they are at least {EPSILON:g}): export the model again.')
    return scale

  def _names(self, spec: ParamSpec, layer: int) -> set[str]:
    """The tensors of a parameter, or of one layer of it, whose shapes are checked."""
    name = tensor_name(spec, layer)
    shape = spec.shape[1:] if is_stacked(spec) else spec.shape
    shape = shape[::-1] if is_transposed(spec) else shape
    if not (self._has_codes and spec.role == 'projection'):
      self._find_floats(name, *shape)
      return {name}
    found = self._entries.get(name)
    is_packed = found is not None and found.dtype == np.uint8
    self._find(name, -(-shape[0] // 4) if is_packed else shape[0], shape[1])
    self._find_floats(f'{name}_scale', 1)
    return {name, f'{name}_scale'}

  def _find_floats(self, name: str, *shape: int) -> None:
    entry = self._find(name, *shape)
    if entry.dtype.name not in ('float32', 'float16', 'bfloat16'):
      raise UserError(f'Tensor {name} in {self._folder} is {entry.dtype}, but by config.json it is '
                      'no packed weight, and others are float32, float16 or bfloat16: the two '
                      'files are not of one model.')

  def _find(self, name: str, *shape: int) -> Entry:
    if name not in self._entries:
      raise UserError(f'{self._folder} has no tensor {name}: the checkpoint is incomplete or not '
                      'of the model_type that its config.json says.')
    entry = self._entries[name]
    if entry.shape != shape:
      raise UserError(f'Tensor {name} in {entry.path} has shape {entry.shape} but config.json asks '
                      f'for {shape}: the two files are not of one model.')
    return entry


# --- Export ---------------------------------------------------------------------


def save_model(folder: str | Path, config: cfg.Model, params: Params, *,
               packed: bool = False, bos_id: int | None = None, eos_id: int | None = None,
               scales: Mapping[str, float] | None = None, longest: int | None = None) -> None:
  """Writes config.json and model.safetensors for the library transformers.

  Args:
    folder: the folder to write to.
    config: the model's configuration.
    params: the tree of parameters, which are written in their own type.
    packed: whether a ternary weight takes 2 bits and a matrix one scale (`autobitlinear`, offline);
      otherwise the latent weights are stored (online, where they are ternary).
    bos_id: the token that begins a text; None where the model has none.
    eos_id: the token that ends a text and at which drawing stops; None where the model has none.
    scales: what `stored_scales` read of the folder that the model was imported from. A packed
      matrix whose absmean is one of these up to the rounding of a float32 sum gets that one.
    longest: tokens of the longest text that the model is for; None leaves it to the model's RoPE.

  Raises:
    UserError: no Hugging Face class computes this model.
    OSError: the folder cannot be written.
  """
  folder = Path(folder)
  settings = to_settings(config, packed, bos_id, eos_id, longest or context_length(config))
  leaves = jax.tree_util.tree_leaves_with_path(transformer.build(config).specs, is_leaf=is_spec)
  for path, spec in leaves:
    _check_has_name(path, spec)
  pairs = list(zip([spec for _, spec in leaves], jax.tree.leaves(params), strict=True))
  planned = [plan for spec, value in pairs for i in _layers(spec)
             for plan in _planned(spec, value.dtype, i, packed)]
  arrays = (array for spec, value in pairs for i in _layers(spec)
            for array in _written(spec, value[i] if is_stacked(spec) else value, config.quant,
                                  packed, (scales or {}).get(tensor_name(spec, i))))
  folder.mkdir(parents=True, exist_ok=True)
  tensor_file.write(folder / tensor_file.SINGLE, planned, arrays)
  (folder / 'config.json').write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')


def _planned(spec: ParamSpec, dtype: Any, layer: int, packed: bool) -> list[Planned]:
  """What `_written` will yield."""
  name = tensor_name(spec, layer)
  shape = spec.shape[1:] if is_stacked(spec) else spec.shape
  shape = shape[::-1] if is_transposed(spec) else shape
  if packed and spec.role == 'projection':
    return [Planned(name, np.dtype(np.uint8), (-(-shape[0] // 4), shape[1])),
            Planned(f'{name}_scale', np.dtype(np.float32), (1,))]
  return [Planned(name, np.dtype(dtype), shape)]


def _written(spec: ParamSpec, x: Array, quant: cfg.Quant, packed: bool,
             imported: float | None) -> Iterator[np.ndarray]:
  if packed and spec.role == 'projection':
    codes, scale = ternary(x)
    absmean = float(scale.reshape(()))
    is_same = imported is not None and abs(imported - absmean) <= _ROUNDING * absmean
    yield pack(np.asarray(codes, np.int8).T)
    yield np.array([imported if is_same else absmean], np.float32)
    return
  if spec.role == 'projection':
    x = as_computed(x, quant.weights)
  yield np.asarray(x).T if is_transposed(spec) else np.asarray(x)


def _check_has_name(path: tuple[Any, ...], spec: ParamSpec) -> None:
  """Refuses a parameter that the exported model would lack.

  Raises:
    UserError: no Hugging Face model has such a parameter.
  """
  if not spec.hugging_face:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    raise UserError(f'The parameter {name} has no place in a Hugging Face model: without it the '
                    'exported model would compute something else.')
