"""Turns the config.json of a Hugging Face model into a cfg.Model and back, with no unknown key.

The keys are listed in `huggingface_keys`. Every other key with a value that is not empty is refused
by its name, since it may change the arithmetic, and a model that loads with wrong logits gives no
error. A key that is left out means what the class of transformers takes for it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
import re
from typing import Any, TypeVar

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError, shortened, shown
from jaxrl_pt.interop import huggingface_keys as keys
from jaxrl_pt.models import transformer

Settings = dict[str, Any]
_Made = TypeVar('_Made')

W1A8 = cfg.Quant('ternary', 'int8')
# One scale for 128 weights, as in Ternary-Bonsai: the file holds them as plain weights.
TERNARY_128 = cfg.Quant('ternary_128')
_HEAD = 'lm_head'


@dataclass(frozen=True)
class _Family:
  """What a model_type of transformers computes, and what it takes for keys that are left out.

  num_kv_heads: None takes the number of query heads.
  head_dim: None takes hidden_size / num_attention_heads.
  may_be_ternary: whether quantised checkpoints of it are read and written.
  """

  architecture: str
  num_kv_heads: int | None = None
  head_dim: int | None = None
  hidden_act: str = 'silu'
  sub_norm: bool = False
  rope_theta: float = 10_000.0
  norm_epsilon: float = 1e-6
  qkv_bias: bool = False
  qk_norm: bool = False
  may_be_ternary: bool = False


_FAMILIES = {
    'llama': _Family('LlamaForCausalLM', may_be_ternary=True),
    'mistral': _Family('MistralForCausalLM', num_kv_heads=8),
    'qwen2': _Family('Qwen2ForCausalLM', num_kv_heads=32, qkv_bias=True, may_be_ternary=True),
    'qwen3': _Family('Qwen3ForCausalLM', num_kv_heads=32, head_dim=128, qk_norm=True,
                     may_be_ternary=True),
    'bitnet': _Family('BitNetForCausalLM', hidden_act='relu2', sub_norm=True,
                      rope_theta=500_000.0, norm_epsilon=1e-5, may_be_ternary=True),
}
_OUR_ACTIVATION: dict[str, cfg.Activation] = {'silu': 'swiglu', 'relu2': 'relu2'}


# --- Import ---------------------------------------------------------------------


def to_config(settings: Any, where: str) -> cfg.Model:
  """The model that a config.json describes, with parameters in float32.

  Args:
    settings: the parsed file.
    where: the file's path, for messages.

  Raises:
    UserError: a key is unknown or missing, or its value is not covered or of a wrong type.
  """
  if not isinstance(settings, dict):
    raise UserError(f'{where} holds no JSON object: give the config.json of a model.')
  family = _family(settings, where)
  theta, rope = _rope(settings, where)
  quantised = _quantization(settings, where) != {}
  if quantised and not family.may_be_ternary:
    raise _not_covered(where, f'quantization_config with model_type {settings["model_type"]!r}')
  if family.qkv_bias and linear_class(settings) == ('autobitlinear', 'offline'):
    raise UserError(f'{where}: the class autobitlinear multiplies biases, too, by the scale of '
                    'packed weights, and such models are not covered: export it unpacked '
                    "(quantization_mode 'online').")
  heads, width = (_size(settings, name, where) for name in ('num_attention_heads', 'hidden_size'))
  tied = settings.get('tie_word_embeddings', False)
  if not isinstance(tied, bool):
    raise UserError(f'{where}: tie_word_embeddings is {shown(tied)}, but it must be true or false.')
  # null is not the same as a key that is left out.
  kv_heads = heads if 'num_key_value_heads' in settings else family.num_kv_heads or heads
  return _made(
      cfg.Model, where, num_layers=_size(settings, 'num_hidden_layers', where), d_model=width,
      d_ff=_size(settings, 'intermediate_size', where), num_heads=heads,
      num_kv_heads=_size(settings, 'num_key_value_heads', where, kv_heads),
      head_dim=_size(settings, 'head_dim', where, family.head_dim or width // heads),
      vocab_size=_size(settings, 'vocab_size', where),
      rope_theta=family.rope_theta if theta is None else theta, rope=rope,
      activation=_OUR_ACTIVATION[family.hidden_act], sub_norm=family.sub_norm, tied_head=tied,
      quant=W1A8 if quantised else cfg.Quant(), qkv_bias=family.qkv_bias, qk_norm=family.qk_norm,
      norm_epsilon=settings.get('rms_norm_eps', family.norm_epsilon))


def _made(make: Callable[..., _Made], where: str, *values: Any, **named: Any) -> _Made:
  """What `make` gives for values of a file, which an error names."""
  try:
    return make(*values, **named)
  except UserError as e:
    raise UserError(f'{where} says what cannot be: {e}') from e


def _family(settings: Settings, where: str) -> _Family:
  """The family of a config.json whose keys have been checked, up to RoPE and quantisation."""
  kind = settings.get('model_type')
  if not isinstance(kind, str) or kind not in _FAMILIES:
    raise _not_covered(where, f'model_type {shown(kind)}')
  family = _FAMILIES[kind]
  architectures = _list(settings, 'architectures', where) or [family.architecture]
  if family.architecture not in architectures:
    raise _not_covered(where, f'architectures {shown(architectures)}')
  if settings.get('hidden_act', family.hidden_act) != family.hidden_act:
    raise _not_covered(where, f'hidden_act {shown(settings["hidden_act"])}')
  layer_types = _list(settings, 'layer_types', where)
  if any(t != 'full_attention' for t in layer_types):
    raise _not_covered(where, f'layer_types {shown(sorted(set(map(str, layer_types))))}')
  if kind == 'mistral' and 'sliding_window' not in settings:
    raise UserError(f'{where} does not say sliding_window, for which transformers takes 4096, and '
                    'a sliding window is not covered: if the model has none, write null.')
  harmless = keys.HARMLESS | {'layer_types'}
  if kind in ('qwen2', 'qwen3'):  # These have a switch for it, which is checked.
    harmless |= {'sliding_window'}
  _check_known(settings, keys.READ | harmless, keys.NEUTRAL, where, '')
  return family


def linear_class(settings: Settings) -> tuple[str, str]:
  """(linear_class, quantization_mode) of a checked config.json; ('', '') if not quantised."""
  quantization = settings.get('quantization_config')
  if not quantization:
    return '', ''
  return (quantization.get('linear_class', 'bitlinear'),
          quantization.get('quantization_mode', 'offline'))


def _rope(settings: Settings, where: str) -> tuple[float | None, cfg.Rope]:
  """The base of RoPE's frequencies, None where no key says it, and how they are scaled.

  Both may be said in several places, which must agree.
  """
  thetas: list[Any] = []
  scalings: list[cfg.Rope] = []
  for name in ('rope_parameters', 'rope_scaling'):
    section = _section(settings, name, where)
    if section:
      scalings.append(_scaling(section, name, where))
    thetas.append(section.get('rope_theta'))
  thetas = [t for t in (*thetas, settings.get('rope_theta')) if t is not None]
  for theta in thetas:
    _check_number(theta, 'rope_theta', where)
  if len(set(thetas)) > 1:
    raise UserError(f'{where} gives rope_theta as {" and as ".join(map(str, thetas))}: leave the '
                    'one that the model was trained with.')
  if len(set(scalings)) > 1:
    raise UserError(f'{where} scales RoPE in one way in rope_parameters and in another in '
                    'rope_scaling: leave the one that the model was trained with.')
  return float(thetas[0]) if thetas else None, scalings[0] if scalings else cfg.PlainRope()


def _scaling(section: Settings, name: str, where: str) -> cfg.Rope:
  """How `rope_parameters` or `rope_scaling` scales the frequencies."""
  kinds = [section[key] for key in ('rope_type', 'type') if section.get(key) is not None]
  known = [kind for kind in kinds if kind in ('default', 'llama3')]
  if kinds != known or len(set(known)) > 1:
    raise _not_covered(where, f'{name} of type {" and ".join(map(shown, kinds))}')
  if 'llama3' not in kinds:
    _check_known(section, keys.READ_ROPE, {**keys.NEUTRAL_ROPE, 'factor': 1}, where, f'{name}.')
    return cfg.PlainRope()
  _check_known(section, keys.READ_ROPE | set(keys.LLAMA3), keys.NEUTRAL_ROPE, where, f'{name}.')
  for key in keys.LLAMA3:
    _check_number(section.get(key), f'{name}.{key}', where)
  return _made(cfg.Llama3Rope, where, *(float(section[key]) for key in keys.LLAMA3[:3]),
               _size(section, keys.LLAMA3[3], where))


def _quantization(settings: Settings, where: str) -> Settings:
  """The checked quantization_config, {} where there is none."""
  section = _section(settings, 'quantization_config', where)
  if not section:
    return section
  if section.get('quant_method') != 'bitnet':
    raise _not_covered(where, f'quantisation {shown(section.get("quant_method"))}')
  for name, known in (('linear_class', ('bitlinear', 'autobitlinear')),
                      ('quantization_mode', ('offline', 'online'))):
    if section.get(name, known[0]) not in known:
      raise _not_covered(where, f'{name} {shown(section[name])}')
  _check_known(section, keys.READ_QUANTIZATION | keys.HARMLESS_QUANTIZATION,
               keys.NEUTRAL_QUANTIZATION, where, 'quantization_config.')
  skipped = section.get('modules_to_not_convert')
  if skipped is not None:  # Where the key is missing, the head is not converted.
    _check_skipped(skipped, settings.get('num_hidden_layers'), where)
  return section


def _matrices() -> list[str]:
  """Templates of the names of a block's matrices, which are the same in every model."""
  smallest = cfg.Model(num_layers=1, d_model=2, d_ff=2, num_heads=1, num_kv_heads=1, head_dim=2,
                       vocab_size=1)
  block = transformer.build(smallest).specs['layers']
  return [spec.hugging_face for spec in block.values() if spec.role == 'projection']


def _check_skipped(skipped: Any, num_layers: Any, where: str) -> None:
  """Checks that the head, and no matrix of a block, stays unquantised, as in our model.

  An entry names a module by its name, its path or the end of its path. Older versions of the
  library search for it anywhere in a path, and newer ones take it as a pattern. An entry that any
  version could take for a block's matrix is refused.

  Raises:
    UserError: an entry is refused, or none names the head.
  """
  if not isinstance(skipped, list) or not all(isinstance(s, str) for s in skipped):
    raise UserError(f'{where}: modules_to_not_convert is {shown(skipped)}, but it must be a list '
                    'of names of modules.')
  depth = min(num_layers, 9999) if isinstance(num_layers, int) else 0
  matrices = _matrices()
  names = [matrix.format(layer=i) for i in range(depth) for matrix in matrices]
  for entry in skipped:
    module = next((name for name in names if entry in name), None)
    if module or not re.fullmatch(r'[\w.]+', entry):
      what = f'leaves {module} unquantised' if module else 'is a pattern'
      raise UserError(f'{where}: {shown(entry)} in modules_to_not_convert {what}. Models whose '
                      "blocks are quantised throughout are covered: give the list as ['lm_head'].")
  # The path of the head is its name alone.
  if not any(_HEAD.endswith(entry) for entry in skipped):
    raise UserError(f"{where}: modules_to_not_convert = {shown(skipped)} does not name 'lm_head', "
                    'so that the head is quantised. Models with a plain head are covered.')


def _check_known(settings: Settings, known: Iterable[str], neutral: Settings, where: str,
                 prefix: str) -> None:
  for name, value in settings.items():
    idle = (neutral[name],) if name in neutral else keys.EMPTY
    if name in known or value is None or value in idle:
      continue
    if name in neutral:
      raise _not_covered(where, f'{prefix}{name} = {shown(value)}')
    raise UserError(f'{where} sets {prefix}{shortened(name)} = {shown(value)}, which is not known '
                    'here and may change what the model computes. If it does not, take it out of '
                    'the file.')


def _section(settings: Settings, name: str, where: str) -> Settings:
  section = settings.get(name)
  if section is not None and not isinstance(section, dict):
    raise UserError(f'{where}: {name} is {shown(section)}, but it must be an object.')
  return section or {}


def _check_number(value: Any, name: str, where: str) -> None:
  # The bound also refuses the infinities and NaN that Python reads in JSON.
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not is_number or not abs(value) <= 1e30:
    raise UserError(f'{where}: {name} is {shown(value)}, but it must be a number.')


def _list(settings: Settings, name: str, where: str) -> list[Any]:
  items = settings.get(name) or []
  if not isinstance(items, list):
    raise UserError(f'{where}: {name} is {shown(items)}, but it must be a list.')
  return items


def _size(settings: Settings, name: str, where: str, default: int | None = None) -> int:
  value = settings.get(name)
  value = default if value is None else value
  if value is None:
    raise UserError(f'{where} does not say {name!r}: give the config.json of the model.')
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise UserError(f'{where}: {name} is {shown(value)}, but it must be a whole number above '
                    '0.')
  return value


def _not_covered(where: str, what: str) -> UserError:
  return UserError(f'{where}: {what} is not covered; models of type {", ".join(_FAMILIES)} with '
                   'plain or llama3 RoPE, full attention and one feed-forward a block are.')


# --- Export ---------------------------------------------------------------------


def to_settings(config: cfg.Model, packed: bool, bos_id: int | None, eos_id: int | None,
                longest: int) -> Settings:
  """The config.json of a model.

  Tokens that the model does not have are written as null, since for a missing key the library takes
  a token of its own.

  Raises:
    UserError: no Hugging Face class computes this model.
  """
  kind = next((name for name, family in _FAMILIES.items() if _computes(family, config)), None)
  if kind is None:
    raise UserError(
        'Only SwiGLU models without sub_norm (Llama; with qkv_bias Qwen2, with qk_norm Qwen3) and '
        'ReLU² models with it (BitNet), plain or W1.58A8 without Hadamard, have a '
        'Hugging Face class: this model cannot be exported.')
  if kind == 'bitnet' and config.num_heads * config.head_dim != config.d_model:
    raise UserError('The BitNet class of Hugging Face has num_heads × head_dim = d_model: this '
                    'model cannot be exported.')
  if packed and config.quant != W1A8:
    raise UserError('A packed export stores ternary weights with one scale a matrix, but this '
                    f'model has Quant.weights = {config.quant.weights!r}: export it without '
                    'packing.')
  if packed and config.qkv_bias:
    raise UserError('transformers multiplies the biases of packed weights by their scale, so that '
                    'it would compute another model: export it without packing.')
  scaling = None
  if isinstance(config.rope, cfg.Llama3Rope):
    scaling = {'rope_type': 'llama3', 'factor': config.rope.factor,
               'low_freq_factor': config.rope.low_freq_factor,
               'high_freq_factor': config.rope.high_freq_factor,
               'original_max_position_embeddings': config.rope.original_length}
  settings: Settings = {
      'architectures': [_FAMILIES[kind].architecture],
      'model_type': kind, 'hidden_act': _FAMILIES[kind].hidden_act,
      'hidden_size': config.d_model, 'intermediate_size': config.d_ff,
      'num_hidden_layers': config.num_layers, 'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads, 'head_dim': config.head_dim,
      'vocab_size': config.vocab_size, 'rope_theta': config.rope_theta, 'rope_scaling': scaling,
      'rms_norm_eps': config.norm_epsilon, 'tie_word_embeddings': config.tied_head,
      'attention_bias': False, 'max_position_embeddings': longest,
      'torch_dtype': config.param_dtype,
      'bos_token_id': bos_id, 'eos_token_id': eos_id, 'pad_token_id': None,
  }
  if config.quant == W1A8:
    settings['quantization_config'] = {
        'quant_method': 'bitnet', 'linear_class': 'autobitlinear',
        'quantization_mode': 'offline' if packed else 'online',
        'modules_to_not_convert': [_HEAD]}
  return settings


def context_length(config: cfg.Model) -> int:
  """The longest text that an exported file says its model is for, which no computation reads."""
  if isinstance(config.rope, cfg.Llama3Rope):
    return round(config.rope.factor * config.rope.original_length)
  return 4096


def _computes(family: _Family, config: cfg.Model) -> bool:
  """Whether a family computes what the model does; of two that do, the first named is exported."""
  ours = (config.activation, config.sub_norm, config.qkv_bias, config.qk_norm)
  theirs = (_OUR_ACTIVATION[family.hidden_act], family.sub_norm, family.qkv_bias, family.qk_norm)
  known = (cfg.Quant(), TERNARY_128, W1A8) if family.may_be_ternary else (cfg.Quant(), TERNARY_128)
  return ours == theirs and config.quant in known
