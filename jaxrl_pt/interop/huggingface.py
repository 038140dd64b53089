"""Hugging Face folders (config.json + safetensors) of Llama and BitNet models, in and out.

Their matrices are [out, in], ours [in, out]; both rotate RoPE pairs (i, i + E/2). A packed
BitNet matrix holds four ternary rows a byte, planar along the output rows, and one scale
s: class `autobitlinear` stores mean|W| and multiplies by it, `bitlinear` stores 1 / mean|W|
and divides (specs: BitNet 2B4T 2.3). Codes of which a share f is not 0 become the latent
weights codes · s / f, whose own codes and absmean scale are those of the file again.
"""

from collections.abc import Callable
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.nn.quant import ternary
from jaxrl_pt.types import Params

Arrays = dict[str, np.ndarray]

_MATRICES = {
    'wq': 'self_attn.q_proj', 'wk': 'self_attn.k_proj', 'wv': 'self_attn.v_proj',
    'wo': 'self_attn.o_proj', 'w_gate': 'mlp.gate_proj', 'w_up': 'mlp.up_proj',
    'w_down': 'mlp.down_proj',
}
_NORMS = {'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm'}
_SUB_NORMS = {'attn_sub_norm': 'self_attn.attn_sub_norm', 'ffn_sub_norm': 'mlp.ffn_sub_norm'}
_W1A8 = cfg.Quant('ternary', 'int8')


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
  """Weights f32 whose absmean quantisation is exactly (codes, scale): codes · scale / f."""
  share = np.count_nonzero(codes) / codes.size
  return codes.astype(np.float32) * np.float32(scale / share if share else 0.0)


# --- Import ---------------------------------------------------------------------


def load_model(folder: str | Path) -> tuple[cfg.Model, Params]:
  """Reads a Llama or BitNet model from a Hugging Face folder.

  Args:
    folder: holds config.json and model.safetensors (or its shards with their index).

  Returns:
    The configuration and a tree of f32 parameters in the layout of `models.transformer`.

  Raises:
    UserError: missing package or file, a variant not covered, a tensor missing or misshapen.
  """
  folder = Path(folder)
  settings = _read_json(folder / 'config.json')
  config = _to_config(settings, folder / 'config.json')
  arrays = _read_arrays(folder)
  quantization = settings.get('quantization_config') or {}
  divides = quantization.get('linear_class', 'bitlinear') == 'bitlinear'

  def take(name: str, *shape: int) -> np.ndarray:
    if name not in arrays:
      raise UserError(f'{folder} has no tensor {name}: the checkpoint is incomplete or not of '
                      f'model_type {settings["model_type"]!r}.')
    if arrays[name].shape != shape:
      raise UserError(f'Tensor {name} in {folder} has shape {arrays[name].shape} but config.json '
                      f'asks for {shape}: the two files are not of one model.')
    return arrays[name]

  def matrix(name: str, num_in: int, num_out: int) -> np.ndarray:
    if f'{name}.weight_scale' not in arrays:
      return take(f'{name}.weight', num_out, num_in).astype(np.float32).T
    is_packed = arrays.get(f'{name}.weight', np.zeros(0)).dtype == np.uint8
    stored = take(f'{name}.weight', -(-num_out // 4) if is_packed else num_out, num_in)
    codes = unpack(stored, num_out) if is_packed else stored.astype(np.float32)
    scale = float(take(f'{name}.weight_scale', 1)[0])
    return latent(codes, 1 / scale if divides else scale).T

  return config, _collect(config, take, matrix)


def _collect(config: cfg.Model, take: Callable[..., np.ndarray],
             matrix: Callable[..., np.ndarray]) -> Params:
  sizes = _sizes(config)
  norms = _NORMS | (_SUB_NORMS if config.sub_norm else {})

  def stack(read: Callable[[str], np.ndarray], name: str) -> Any:
    return jnp.asarray(np.stack([read(f'model.layers.{i}.{name}')
                                 for i in range(config.num_layers)]))

  def matrix_of(ours: str) -> Callable[[str], np.ndarray]:
    return lambda name: matrix(name, *sizes[ours])

  def gains_of(ours: str) -> Callable[[str], np.ndarray]:
    return lambda name: take(f'{name}.weight', *sizes[ours]).astype(np.float32)

  layers = {ours: stack(matrix_of(ours), theirs) for ours, theirs in _MATRICES.items()}
  layers |= {ours: stack(gains_of(ours), theirs) for ours, theirs in norms.items()}
  embed = take('model.embed_tokens.weight', config.vocab_size, config.d_model)
  params = {'embed': jnp.asarray(embed.astype(np.float32)), 'layers': layers,
            'final_norm': jnp.asarray(
                take('model.norm.weight', config.d_model).astype(np.float32))}
  if not config.tied_head:
    head = take('lm_head.weight', config.vocab_size, config.d_model)
    params['head'] = jnp.asarray(head.astype(np.float32).T)
  return params


def _sizes(config: cfg.Model) -> dict[str, tuple[int, ...]]:
  width, ff = config.d_model, config.d_ff
  queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
  return {'wq': (width, queries), 'wk': (width, keys), 'wv': (width, keys), 'wo': (queries, width),
          'w_gate': (width, ff), 'w_up': (width, ff), 'w_down': (ff, width),
          'attn_norm': (width,), 'ffn_norm': (width,), 'attn_sub_norm': (queries,),
          'ffn_sub_norm': (ff,)}


def _to_config(settings: dict[str, Any], path: Path) -> cfg.Model:
  kind = settings.get('model_type')
  activation = {'llama': 'silu', 'bitnet': 'relu2'}.get(str(kind))
  rope = settings.get('rope_parameters') or settings.get('rope_scaling') or {}
  quantization = settings.get('quantization_config') or {}
  for is_bad, what in (
      (activation is None, f'model_type {kind!r}'),
      (settings.get('hidden_act', activation) != activation,
       f'hidden_act {settings.get("hidden_act")!r}'),
      (settings.get('attention_bias') or settings.get('mlp_bias'), 'biases'),
      (rope.get('rope_type', rope.get('type', 'default')) != 'default', 'scaled RoPE'),
      (quantization and quantization.get('quant_method') != 'bitnet',
       f'quantisation {quantization.get("quant_method")!r}'),
      (quantization.get('use_rms_norm'), 'use_rms_norm inside the linear layers'),
  ):
    if is_bad:
      raise UserError(f'{path}: {what} is not covered; Llama and BitNet models without biases, '
                      'with plain RoPE, are.')
  try:
    heads, width = settings['num_attention_heads'], settings['hidden_size']
    return cfg.Model(
        num_layers=settings['num_hidden_layers'], d_model=width,
        d_ff=settings['intermediate_size'], num_heads=heads,
        num_kv_heads=settings.get('num_key_value_heads') or heads,
        head_dim=settings.get('head_dim') or width // heads, vocab_size=settings['vocab_size'],
        rope_theta=float(rope.get('rope_theta') or settings.get('rope_theta') or
                         (500_000.0 if kind == 'bitnet' else 10_000.0)),
        activation='relu2' if kind == 'bitnet' else 'swiglu', sub_norm=kind == 'bitnet',
        tied_head=bool(settings.get('tie_word_embeddings', False)),
        quant=_W1A8 if quantization else cfg.Quant(),
        norm_epsilon=settings.get('rms_norm_eps', 1e-5 if kind == 'bitnet' else 1e-6))
  except KeyError as e:
    raise UserError(f'{path} does not say {e}: give the config.json of the model.') from e


def _read_json(path: Path) -> dict[str, Any]:
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
    names = sorted(set(_read_json(index)['weight_map'].values()))
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
               packed: bool = False) -> None:
  """Writes config.json and model.safetensors as transformers reads them.

  Args:
    params: tree of f32 parameters.
    packed: 2 bits a ternary weight and one scale a matrix (`autobitlinear`, offline),
      else the latent weights in float32 (online, where they are ternary).

  Raises:
    UserError: no Hugging Face class computes this model, or the folder is not writable.
  """
  folder = Path(folder)
  settings = _to_settings(config, packed)
  library = _safetensors()
  arrays = {'model.embed_tokens.weight': np.asarray(params['embed']),
            'model.norm.weight': np.asarray(params['final_norm'])}
  if not config.tied_head:
    arrays['lm_head.weight'] = np.asarray(params['head']).T
  norms = _NORMS | (_SUB_NORMS if config.sub_norm else {})
  for i in range(config.num_layers):
    for ours, theirs in norms.items():
      arrays[f'model.layers.{i}.{theirs}.weight'] = np.asarray(params['layers'][ours][i])
    for ours, theirs in _MATRICES.items():
      name = f'model.layers.{i}.{theirs}'
      w = params['layers'][ours][i]
      if packed:
        codes, scale = ternary(w)
        arrays[f'{name}.weight'] = pack(np.asarray(codes, np.int8).T)
        arrays[f'{name}.weight_scale'] = np.asarray(scale, np.float32).reshape(1)
      else:
        arrays[f'{name}.weight'] = np.asarray(w).T
  try:
    folder.mkdir(parents=True, exist_ok=True)
    library.save_file({n: np.ascontiguousarray(x) for n, x in arrays.items()},
                      str(folder / 'model.safetensors'), metadata={'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
  except OSError as e:
    raise UserError(f'{folder} cannot be written ({e}): choose another folder.') from e


def _to_settings(config: cfg.Model, packed: bool) -> dict[str, Any]:
  kinds = {('swiglu', False): 'llama', ('relu2', True): 'bitnet'}
  kind = kinds.get((config.activation, config.sub_norm))
  if kind is None or config.quant not in (cfg.Quant(), _W1A8):
    raise UserError(
        'Only SwiGLU models without sub_norm (Llama) and ReLU² models with it (BitNet), plain or '
        'W1.58A8 without Hadamard, have a Hugging Face class: this model cannot be exported.')
  if kind == 'bitnet' and config.num_heads * config.head_dim != config.d_model:
    raise UserError('The BitNet class of Hugging Face has num_heads × head_dim = d_model: this '
                    'model cannot be exported.')
  if packed and config.quant != _W1A8:
    raise UserError("packed = True stores ternary weights, but Quant.weights = 'none': export "
                    'with packed = False.')
  settings: dict[str, Any] = {
      'architectures': ['BitNetForCausalLM' if kind == 'bitnet' else 'LlamaForCausalLM'],
      'model_type': kind, 'hidden_act': 'relu2' if kind == 'bitnet' else 'silu',
      'hidden_size': config.d_model, 'intermediate_size': config.d_ff,
      'num_hidden_layers': config.num_layers, 'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads, 'head_dim': config.head_dim,
      'vocab_size': config.vocab_size, 'rope_theta': config.rope_theta,
      'rms_norm_eps': config.norm_epsilon, 'tie_word_embeddings': config.tied_head,
      'attention_bias': False, 'max_position_embeddings': 4096, 'torch_dtype': 'float32',
  }
  if config.quant == _W1A8:
    settings['quantization_config'] = {
        'quant_method': 'bitnet', 'linear_class': 'autobitlinear',
        'quantization_mode': 'offline' if packed else 'online',
        'modules_to_not_convert': ['lm_head']}
  return settings
