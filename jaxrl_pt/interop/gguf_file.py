"""Writes models as GGUF, the one-file format of llama.cpp, and reads such files back.

Metadata and names are llama.cpp's, by the tables of the package `gguf`. Its matrices are [out, in],
ours [in, out]. Of the architecture `llama` it rotates adjacent RoPE pairs (2i, 2i + 1), so that the
rows of W_q and W_k are reordered there; all others rotate the pairs (i, i + E/2), as we do.

A ternary matrix becomes blocks of 256 weights of a row with one float16 scale, TQ2_0 (2.0625 bits a
weight) or TQ1_0 (1.6875): a file holds codes · float16(scale), exactly. Where rows are no multiple
of 256 wide, the same numbers are stored as F16. Gains and biases are F32, as llama.cpp wants them,
and all other tensors keep their own type.

llama.cpp quantises the activations that TQ2_0 and TQ1_0 meet to 8 bits in blocks of 256, with one
scale each, where BitNet has one scale a token; those that F16 meets it does not quantise.
"""

import functools
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.interop.huggingface import is_stacked, is_transposed, tensor_name
from jaxrl_pt.models import transformer
from jaxrl_pt.nn.embed import frequencies
from jaxrl_pt.nn.quant import TernaryWeight, as_computed, ternary
from jaxrl_pt.params import ParamSpec, is_spec
from jaxrl_pt.types import Array, Params

TernaryType = Literal['TQ2_0', 'TQ1_0']
Metadata = dict[str, Any]

_BLOCK = 256  # weights of a row that share a scale in TQ2_0 and TQ1_0
_FREQUENCIES = 'rope_freqs.weight'
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-14, 65504.0  # what float16 holds with all its 11 bits
# What a model of Hugging Face's calls a norm → what the tables of `gguf` know it as.
_ALIASES = {'self_attn.attn_sub_norm': 'self_attn.inner_attn_ln',
            'mlp.ffn_sub_norm': 'mlp.ffn_layernorm'}


def library() -> ModuleType:
  """The package gguf.

  Raises:
    UserError: it is not installed.
  """
  try:
    import gguf  # an extra: only this format needs it
  except ImportError as error:
    raise UserError("GGUF needs the package of that name: pip install 'jaxrl_pt[gguf]'."
                    ) from error
  return gguf


# --- What a model is called ------------------------------------------------------------


def architecture(config: cfg.Model) -> str:
  """llama.cpp's name of what a model computes.

  Raises:
    UserError: llama.cpp computes no such model, or would compute it otherwise.
  """
  match (config.activation, config.sub_norm, config.qkv_bias, config.qk_norm):
    case 'swiglu', False, False, False:
      name = 'llama'
    case 'swiglu', False, True, False:
      name = 'qwen2'
    case 'swiglu', False, False, True:
      name = 'qwen3'
    case 'swiglu', True, False, False:
      name = 'bitnet'
    case 'relu2', True, False, False:
      # What Microsoft's files of 2B4T say. llama.cpp's own `bitnet` would compute SwiGLU.
      name = 'bitnet-b1.58'
    case _:
      raise UserError(
          'llama.cpp has SwiGLU models (llama; with qkv_bias qwen2, with qk_norm qwen3, with '
          'sub_norm bitnet) and ReLU² models with sub_norm (bitnet-b1.58): this model cannot be '
          'exported as GGUF.')
  _check_computed(name, config)
  return name


def _check_computed(name: str, config: cfg.Model) -> None:
  """Refuses what llama.cpp would leave out or compute otherwise in an architecture."""
  reason = ''
  if config.quant.hadamard:
    reason = 'rotates no activations (Quant.hadamard)'
  elif config.quant.activations not in ('none', 'int8'):
    reason = f'has no {config.quant.activations} activations (Quant.activations)'
  elif name != 'llama' and config.rope != cfg.PlainRope():
    reason = f'scales RoPE as Llama 3.1 does only in llama models, and this one is {name}'
  elif name.startswith('bitnet') and not config.tied_head:
    reason = f'has no head of its own in {name} models (Model.tied_head)'
  elif name.startswith('bitnet') and config.num_heads * config.head_dim != config.d_model:
    reason = f'has num_heads × head_dim = d_model in {name} models'
  if reason:
    raise UserError(f'llama.cpp {reason}: this model cannot be exported as GGUF.')


def metadata(config: cfg.Model, ternary_type: TernaryType, name: str,
             context_length: int) -> Metadata:
  """The keys that describe a model, as llama.cpp reads them.

  Args:
    config: the model's configuration.
    ternary_type: how ternary weights are stored.
    name: of the model, for people.
    context_length: tokens of the longest text that the model is for.
  """
  kind = architecture(config)
  if config.quant.weights == 'ternary':
    file_type = f'MOSTLY_{ternary_type}'
  else:
    file_type = 'ALL_F32' if config.param_dtype == 'float32' else 'MOSTLY_BF16'
  keys: Metadata = {
      'general.architecture': kind, 'general.name': name,
      'general.file_type': int(library().LlamaFileType[file_type]),
      'general.quantization_version': 2,  # of the layouts of ggml's blocks
      f'{kind}.vocab_size': config.vocab_size, f'{kind}.context_length': context_length,
      f'{kind}.embedding_length': config.d_model, f'{kind}.block_count': config.num_layers,
      f'{kind}.feed_forward_length': config.d_ff,
      f'{kind}.attention.head_count': config.num_heads,
      f'{kind}.attention.head_count_kv': config.num_kv_heads,
      f'{kind}.attention.key_length': config.head_dim,
      f'{kind}.attention.value_length': config.head_dim,
      f'{kind}.attention.layer_norm_rms_epsilon': float(config.norm_epsilon),
      f'{kind}.rope.dimension_count': config.head_dim,
      f'{kind}.rope.freq_base': float(config.rope_theta)}
  if config.activation == 'relu2':
    keys[f'{kind}.hidden_activation'] = 'relu2'
  return keys


@functools.cache
def _names(kind: str, num_layers: int) -> Any:
  arch = library().MODEL_ARCH.BITNET if kind.startswith('bitnet') else (
      library().MODEL_ARCH[kind.upper()])
  return library().get_tensor_name_map(arch, num_layers)


class _Tensor(NamedTuple):
  """One tensor of a file: a parameter, or one layer of it."""

  name: str
  leaf: int  # the parameter's number in the tree
  spec: ParamSpec
  layer: int
  stored: str  # a name in gguf.GGMLQuantizationType
  shape: tuple[int, ...]  # [out, in] of matrices


def _tensor(leaf: int, spec: ParamSpec, layer: int, config: cfg.Model,
            ternary_type: TernaryType) -> _Tensor:
  theirs = tensor_name(spec, layer)
  for ours, alias in _ALIASES.items():
    theirs = theirs.replace(ours, alias)
  name = spec.hugging_face and _names(architecture(config), config.num_layers).get_name(
      theirs, ('.weight', '.bias'))
  if not name:
    raise UserError(f'llama.cpp has no place for the parameter {spec.hugging_face or spec.role} '
                    f'of shape {spec.shape}: this model cannot be exported as GGUF.')
  shape = spec.shape[1:] if is_stacked(spec) else spec.shape
  shape = shape[::-1] if is_transposed(spec) else shape
  if spec.role in ('gain', 'bias'):
    stored = 'F32'
  elif _is_ternary(spec, config):
    stored = 'F16' if shape[-1] % _BLOCK else ternary_type
  else:
    stored = {'float32': 'F32', 'bfloat16': 'BF16'}[config.param_dtype]
  return _Tensor(name, leaf, spec, layer, stored, shape)


def _is_ternary(spec: ParamSpec, config: cfg.Model) -> bool:
  return spec.role == 'projection' and config.quant.weights == 'ternary'


def _tensors(config: cfg.Model, ternary_type: TernaryType) -> list[_Tensor]:
  specs = jax.tree.leaves(transformer.build(config).specs, is_leaf=is_spec)
  return [_tensor(i, spec, layer, config, ternary_type) for i, spec in enumerate(specs)
          for layer in range(spec.shape[0] if is_stacked(spec) else 1)]


def _interleaved(w: np.ndarray, spec: ParamSpec, config: cfg.Model, *, back: bool) -> np.ndarray:
  """Rows of W_q or W_k with each head's pairs (i, i + E/2) adjacent, as `llama` has them."""
  is_rotated = spec.hugging_face.endswith(('q_proj', 'k_proj'))
  if architecture(config) != 'llama' or not is_rotated:
    return w
  pairs = (config.head_dim // 2, 2) if back else (2, config.head_dim // 2)
  return w.reshape(-1, *pairs, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def _frequency_factors(config: cfg.Model) -> np.ndarray:
  """f32[E/2]: what llama.cpp divides RoPE's plain frequencies by."""
  plain, scaled = (np.asarray(frequencies(config.head_dim, config.rope_theta, rope))
                   for rope in (cfg.PlainRope(), config.rope))
  return plain / scaled


# --- Writing ----------------------------------------------------------------------------


def save_model(path: Path, config: cfg.Model, params: Params, keys: Metadata,
               ternary_type: TernaryType) -> int:
  """Writes a file, of whose tensors one at a time is in memory.

  Args:
    path: the file.
    config: the model's configuration.
    params: the tree of parameters.
    keys: the metadata: those of `metadata`, and the tokenizer's.
    ternary_type: how ternary weights are stored.

  Returns:
    The number of ternary matrices that are stored as F16, since their rows are no multiple of 256
    wide.

  Raises:
    UserError: llama.cpp does not compute this model, or a scale is too small or large for float16.
    OSError: the file cannot be written.
  """
  tensors = _tensors(config, ternary_type)
  writer = library().GGUFWriter(path, architecture(config))
  try:
    for key, value in keys.items():
      if key != 'general.architecture':  # The writer has it.
        _add(writer, key, value)
    for tensor in tensors:
      _plan(writer, tensor.name, tensor.shape, tensor.stored)
    if config.rope != cfg.PlainRope():
      _plan(writer, _FREQUENCIES, (config.head_dim // 2,), 'F32')
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    leaves = jax.tree.leaves(params)
    for tensor in tensors:
      writer.write_tensor_data(_stored(tensor, config, leaves[tensor.leaf]))
    if config.rope != cfg.PlainRope():
      writer.write_tensor_data(_frequency_factors(config))
    writer.flush()
    for file in writer.fout:
      os.fsync(file.fileno())
  finally:
    writer.close()
  return sum(tensor.stored == 'F16' for tensor in tensors)


def _add(writer: Any, key: str, value: Any) -> None:
  """Adds a key in the type that llama.cpp reads it in."""
  match value:
    case bool():
      writer.add_bool(key, value)
    case int():
      writer.add_uint32(key, value)
    case float():
      writer.add_float32(key, value)
    case str():
      writer.add_string(key, value)
    case _:
      writer.add_array(key, value)


def _plan(writer: Any, name: str, shape: tuple[int, ...], stored: str) -> None:
  gguf = library()
  kind = gguf.GGMLQuantizationType[stored]
  block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
  num_elements = math.prod(shape)
  writer.add_tensor_info(name, shape, np.dtype(np.float32), num_elements // block * num_bytes, kind)


def _stored(tensor: _Tensor, config: cfg.Model, value: Array) -> np.ndarray:
  """What the file holds of a parameter, or of one layer of it."""
  gguf = library()
  x = value[tensor.layer] if is_stacked(tensor.spec) else value
  if _is_ternary(tensor.spec, config):
    codes, scale = ternary(x)
    # Every type that a ternary matrix is stored in rounds the scale to float16.
    w = np.asarray(codes, np.float32).T * _checked(scale, tensor.name)
  else:
    x = as_computed(x, config.quant.weights) if tensor.spec.role == 'projection' else x
    w = np.asarray(x).T if is_transposed(tensor.spec) else np.asarray(x)
  if is_transposed(tensor.spec):
    w = _interleaved(w, tensor.spec, config, back=False)
  if tensor.stored == 'BF16':
    return np.ascontiguousarray(w).view(np.uint8)  # as it is: `quantize` would go by float32
  return np.ascontiguousarray(
      gguf.quants.quantize(w.astype(np.float32), gguf.GGMLQuantizationType[tensor.stored]))


def _checked(scale: Array, name: str) -> np.float32:
  """A matrix's scale, if float16 holds it."""
  value = float(scale.reshape(()))
  if not _SMALLEST_SCALE <= value <= _LARGEST_SCALE:
    raise UserError(f'{name} has the scale {value:g}, and the blocks of a GGUF file hold scales '
                    f'from {_SMALLEST_SCALE:g} to {_LARGEST_SCALE:g}: this model cannot be '
                    'exported as GGUF.')
  return np.float32(value)


# --- Reading ----------------------------------------------------------------------------


def load_model(path: Path, config: cfg.Model, keys: Metadata, ternary_type: TernaryType) -> Params:
  """Reads a file that `save_model` has written, by the package's own reader and dequantisers.

  Args:
    path: the file.
    config: the model that is in it.
    keys: the metadata that it has to have.
    ternary_type: how ternary weights are stored.

  Returns:
    The parameters, in which ternary matrices are `TernaryWeight`.

  Raises:
    UserError: the file has other metadata or tensors.
  """
  try:
    reader = library().GGUFReader(path)
  except (ValueError, KeyError, IndexError, OSError) as error:
    raise UserError(f'{path} is not a readable GGUF file ({error}).') from error
  for key, value in keys.items():
    field = reader.get_field(key)
    found = None if field is None else field.contents()
    if found != value and not (isinstance(value, float) and found == np.float32(value)):
      raise UserError(f'{path} says {key} = {found!r}, where {value!r} belongs.')
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  if config.rope != cfg.PlainRope():
    factors = _dequantised(tensors.pop(_FREQUENCIES))
    if not np.array_equal(factors, _frequency_factors(config)):
      raise UserError(f'{path} holds other factors of RoPE in {_FREQUENCIES}.')
  specs, structure = jax.tree.flatten(transformer.build(config).specs, is_leaf=is_spec)
  layers: list[list[Any]] = [[] for _ in specs]
  for planned in _tensors(config, ternary_type):
    if planned.name not in tensors:
      raise UserError(f'{path} has no tensor {planned.name}.')
    layers[planned.leaf].append(_ours(tensors.pop(planned.name), planned, config))
  if tensors:
    raise UserError(f'{path} holds tensors of no parameter: {", ".join(sorted(tensors)[:3])}.')
  leaves = [jax.tree.map(lambda *x: jnp.stack(x), *parts) if is_stacked(spec) else parts[0]
            for spec, parts in zip(specs, layers, strict=True)]
  return jax.tree.unflatten(structure, leaves)


def _ours(found: Any, planned: _Tensor, config: cfg.Model) -> Any:
  """A parameter, or one layer of it, from a tensor of a file."""
  w = _dequantised(found)
  if w.shape != planned.shape or found.tensor_type.name != planned.stored:
    raise UserError(f'{planned.name} is {found.tensor_type.name} of shape {w.shape}, where '
                    f'{planned.stored} of shape {planned.shape} belongs.')
  if not is_transposed(planned.spec):
    return jnp.asarray(w, planned.spec.dtype)
  w = _interleaved(w, planned.spec, config, back=True).T
  if not _is_ternary(planned.spec, config):
    return jnp.asarray(w, planned.spec.dtype)
  scale = np.abs(w).max(keepdims=True)
  codes = np.rint(w / (scale if scale else 1.0))
  if not np.array_equal(codes * scale, w):
    raise UserError(f'{planned.name} holds more than one scale times −1, 0 and 1.')
  return TernaryWeight(jnp.asarray(codes, jnp.int2), jnp.asarray(scale))


def _dequantised(found: Any) -> np.ndarray:
  """f32 [out, in] of matrices."""
  return library().quants.dequantize(found.data, found.tensor_type)
