"""Imports and exports Hugging Face folders (config.json, safetensors) of Llama and BitNet models.

Hugging Face's matrices are [out, in], ours [in, out]; both rotate RoPE pairs (i, i + E/2). A packed
BitNet matrix holds four ternary rows in each byte, planar along the output rows, and one scale s:
the class `autobitlinear` stores mean|W| and multiplies by it, `bitlinear` stores 1 / mean|W| and
divides by it (docs/methods/bitnet.md). Codes of which a share f is not 0 become the latent weights
codes · s / f. These have the file's codes as their codes, and s as their absmean up to the rounding
of a float32 sum.

Nothing in a folder is ignored: each key of config.json is accounted for (`huggingface_config`), and
a tensor that the model has no place for is refused.
"""

from collections.abc import Callable
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.interop.huggingface_config import linear_class, to_config, to_settings
from jaxrl_pt.models import transformer
from jaxrl_pt.nn.quant import EPSILON, ternary
from jaxrl_pt.params import ParamSpec, is_spec, map_specs
from jaxrl_pt.types import Params

Arrays = dict[str, np.ndarray]

_EMBEDDING, _HEAD = 'model.embed_tokens.weight', 'lm_head'


# --- Packed ternary rows --------------------------------------------------------


def pack(codes: np.ndarray) -> np.ndarray:
  """Packs i8[out, in] of {−1, 0, 1} into u8[⌈out / 4⌉, in].

  Byte [r, c] holds rows r, r + R, r + 2R, r + 3R of column c, plus 1, in bits 0–1 … 6–7;
  R = ⌈out / 4⌉, and rows beyond the matrix are 0 bits.
  """
  num_rows = -(-codes.shape[0] // 4)
  planes = np.zeros((4 * num_rows, *codes.shape[1:]), np.uint8)
  planes[:codes.shape[0]] = (codes + 1).astype(np.uint8)
  planes = planes.reshape(4, num_rows, *codes.shape[1:])
  return planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6


def unpack(packed: np.ndarray, num_out: int) -> np.ndarray:
  """The inverse of `pack`: u8[⌈out / 4⌉, in] → i8[out, in] in {−1, 0, 1}."""
  planes = [(packed >> 2 * i & 3).astype(np.int8) - 1 for i in range(4)]
  return np.concatenate(planes)[:num_out]


def latent(codes: np.ndarray, scale: float) -> np.ndarray:
  """f32 weights whose absmean quantisation is (codes, scale): codes · scale / f.

  Quantising them gives the codes exactly, and the scale to within 2⁻¹⁶ of itself: it is a float32
  mean, whose rounding depends on the number of weights and the order in which they are added.
  """
  share = np.count_nonzero(codes) / codes.size
  return codes.astype(np.float32) * np.float32(scale / share if share else 0.0)


# --- Import ---------------------------------------------------------------------


def load_model(folder: str | Path) -> tuple[cfg.Model, Params]:
  """Reads a Llama or BitNet model from a Hugging Face folder.

  Args:
    folder: a folder with config.json and model.safetensors, or with its shards and their index.

  Returns:
    The configuration and a tree of f32 parameters in the layout of `models.transformer`.

  Raises:
    UserError: a package or file is missing, the variant is not covered, or a tensor is missing, has
      another shape or has no place.
  """
  folder = Path(folder)
  path = folder / 'config.json'
  settings = _read_json(path)
  config = to_config(settings, str(path))
  arrays = _read_arrays(folder)
  kind, mode = linear_class(settings)
  unread = set(arrays)

  def take(name: str, *shape: int) -> np.ndarray:
    if name not in arrays:
      raise UserError(f'{folder} has no tensor {name}: the checkpoint is incomplete or not of '
                      f'model_type {settings["model_type"]!r}.')
    if arrays[name].shape != shape:
      raise UserError(f'Tensor {name} in {folder} has shape {arrays[name].shape} but config.json '
                      f'asks for {shape}: the two files are not of one model.')
    unread.discard(name)
    return arrays[name]

  def matrix(name: str, num_in: int, num_out: int) -> np.ndarray:
    if kind == '' or mode == 'online' and kind == 'autobitlinear':
      return _floats(take(f'{name}.weight', num_out, num_in), name, folder).T
    is_packed = arrays.get(f'{name}.weight', np.zeros(0)).dtype == np.uint8
    stored = take(f'{name}.weight', -(-num_out // 4) if is_packed else num_out, num_in)
    codes = unpack(stored, num_out) if is_packed else stored.astype(np.float32)
    if not np.isin(codes, (-1, 0, 1)).all():
      raise UserError(f'Tensor {name}.weight in {folder} holds more than −1, 0 and 1, so it is '
                      f'not quantised as quantization_mode {mode!r} says: export it again.')
    scale = float(take(f'{name}.weight_scale', 1)[0])
    if kind == 'bitlinear':
      scale = 1 / scale if scale else math.inf
    if not (abs(scale) >= EPSILON or scale == 0) or math.isinf(scale):
      raise UserError(f'{name}.weight_scale in {folder} stands for a scale of {scale:g}, which no '
                      f'weights have (they are at least {EPSILON:g}): export the model again.')
    return latent(codes, scale).T

  params = _collect(config, take, matrix)
  if config.tied_head and f'{_HEAD}.weight' in unread:
    stored_head = take(f'{_HEAD}.weight', config.vocab_size, config.d_model)
    if not np.array_equal(stored_head, arrays[_EMBEDDING]):
      raise UserError(f'{path} says tie_word_embeddings = true, but {_HEAD}.weight differs from '
                      f'{_EMBEDDING}: say false to use both, or delete {_HEAD}.weight.')
  # Old checkpoints hold RoPE's frequencies, which follow from config.json.
  left = sorted(name for name in unread if not name.endswith('rotary_emb.inv_freq'))
  if left:
    raise UserError(f'{folder} holds {len(left)} tensors that a model of its config.json does not '
                    f'have ({", ".join(left[:3])}): the two files are not of one model.')
  return config, params


def _floats(x: np.ndarray, name: str, folder: Path) -> np.ndarray:
  if not np.issubdtype(x.dtype, np.floating) and x.dtype.name != 'bfloat16':
    raise UserError(f'Tensor {name}.weight in {folder} is {x.dtype}, but config.json says '
                    'nothing of packed weights: the two files are not of one model.')
  return x.astype(np.float32)


def _collect(config: cfg.Model, take: Callable[..., np.ndarray],
             matrix: Callable[..., np.ndarray]) -> Params:
  """The tree of parameters, each of which is read by the name in its ParamSpec."""
  def read(spec: ParamSpec, name: str, shape: tuple[int, ...]) -> np.ndarray:
    match spec.role:
      case 'projection':
        return matrix(name, *shape)
      case 'head':
        return take(f'{name}.weight', *shape[::-1]).astype(np.float32).T
      case 'table' | 'gain':
        return take(f'{name}.weight', *shape).astype(np.float32)

  def leaf(spec: ParamSpec) -> Any:
    if '{layer}' not in spec.hugging_face:
      return jnp.asarray(read(spec, spec.hugging_face, spec.shape))
    return jnp.asarray(np.stack([read(spec, spec.hugging_face.format(layer=i), spec.shape[1:])
                                 for i in range(spec.shape[0])]))

  return map_specs(leaf, transformer.build(config).specs)


def _read_json(path: Path) -> Any:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except OSError as e:
    raise UserError(f'{path} cannot be read ({e.strerror}): give a folder with config.json and '
                    'model.safetensors.') from e
  except ValueError as e:
    raise UserError(f'{path} is not JSON ({e}): download it again.') from e


def _safetensors() -> Any:
  try:
    import safetensors.numpy
  except ImportError as e:
    raise UserError("Hugging Face files need the `hf` extra: pip install 'jaxrl_pt[hf]'.") from e
  return safetensors.numpy


def _read_arrays(folder: Path) -> Arrays:
  library = _safetensors()
  index = folder / 'model.safetensors.index.json'
  names = ['model.safetensors']
  if index.exists():
    shards = _read_json(index)
    if not isinstance(shards, dict) or not isinstance(shards.get('weight_map'), dict):
      raise UserError(f'{index} has no weight_map: download it again.')
    names = sorted(set(map(str, shards['weight_map'].values())))
  arrays: Arrays = {}
  for name in names:
    try:
      arrays |= library.load_file(str(folder / name))
    except Exception as e:
      raise UserError(f'{folder / name} is missing, truncated or no safetensors file ({e}): '
                      'download it again.') from e
  return arrays


# --- Export ---------------------------------------------------------------------


def save_model(folder: str | Path, config: cfg.Model, params: Params, *,
               packed: bool = False, bos_id: int | None = None,
               eos_id: int | None = None) -> None:
  """Writes config.json and model.safetensors for the library transformers.

  Args:
    folder: the folder to write to.
    config: the model's configuration.
    params: the tree of f32 parameters.
    packed: whether a ternary weight takes 2 bits and a matrix one scale (`autobitlinear`, offline);
      otherwise the latent weights are stored in float32 (online, where they are ternary).
    bos_id: the token that begins a text; None where the model has none.
    eos_id: the token that ends a text and at which drawing stops; None where the model has none.

  Raises:
    UserError: no Hugging Face class computes this model, or the folder is not writable.
  """
  folder = Path(folder)
  settings = to_settings(config, packed, bos_id, eos_id)
  library = _safetensors()
  arrays: Arrays = {}
  leaves = jax.tree_util.tree_leaves_with_path(transformer.build(config).specs, is_leaf=is_spec)
  values = jax.tree.leaves(params)
  for (path, spec), value in zip(leaves, values, strict=True):
    _check_has_name(path, spec)
    stacked = '{layer}' in spec.hugging_face
    for i in range(spec.shape[0]) if stacked else (0,):
      name, x = spec.hugging_face.format(layer=i), value[i] if stacked else value
      if packed and spec.role == 'projection':
        codes, scale = ternary(x)
        arrays[f'{name}.weight'] = pack(np.asarray(codes, np.int8).T)
        arrays[f'{name}.weight_scale'] = np.asarray(scale, np.float32).reshape(1)
      else:
        is_product = spec.role in ('projection', 'head')
        arrays[f'{name}.weight'] = np.asarray(x).T if is_product else np.asarray(x)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    library.save_file({n: np.ascontiguousarray(x) for n, x in arrays.items()},
                      str(folder / 'model.safetensors'), metadata={'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
  except OSError as e:
    raise UserError(f'{folder} cannot be written ({e}): choose another folder.') from e


def _check_has_name(path: tuple[Any, ...], spec: ParamSpec) -> None:
  """Refuses a parameter that the exported model would lack.

  Raises:
    UserError: no Hugging Face model has such a parameter.
  """
  if not spec.hugging_face:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    raise UserError(f'The parameter {name} has no place in a Hugging Face model: without it the '
                    'exported model would compute something else.')
