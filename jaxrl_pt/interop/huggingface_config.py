"""Turns the config.json of a Hugging Face model into a cfg.Model and back, with no unknown key.

A key is either read (`_READ`), or does not change the logits (`_HARMLESS`), or does nothing at one
value (`_NEUTRAL`). Every other key with a value that is not empty is refused by its name, since it
may change the arithmetic, and a model that loads with wrong logits gives no error. A key that is
left out means what the class of transformers takes for it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
import re
from typing import Any, TypeVar

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
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

_READ = frozenset("""
    architectures head_dim hidden_act hidden_size intermediate_size model_type
    num_attention_heads num_hidden_layers num_key_value_heads quantization_config rms_norm_eps
    rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size""".split())

# Keys about the file and its loader, training, generation, other tasks and the tokenizer.
_HARMLESS = frozenset("""
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled
    _name_or_path attn_implementation auto_map dtype low_cpu_mem_usage return_dict torch_dtype
    torchscript transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
    use_return_dict output_attentions output_hidden_states tf_legacy_loss
    attention_dropout attn_pdrop embd_pdrop gradient_checkpointing hidden_dropout
    hidden_dropout_prob initializer_range resid_pdrop
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    temperature top_k top_p typical_p
    finetuning_task id2label label2id num_labels problem_type task_specific_params
    bos_token_id decoder_start_token_id eos_token_id pad_token_id prefix sep_token_id
    tokenizer_class unk_token_id
    chunk_size_feed_forward is_decoder max_position_embeddings max_sequence_length
    max_window_layers model_max_length pretraining_tp""".split())

# Keys of models like Llama, each with the value at which it does nothing.
_NEUTRAL: dict[str, Any] = {
    'add_cross_attention': False, 'attention_bias': False, 'bias': False, 'clip_qkv': None,
    'embedding_multiplier': 1, 'is_causal': True, 'is_encoder_decoder': False,
    'logit_scale': 1, 'logits_scaling': 1, 'mlp_bias': False, 'partial_rotary_factor': 1,
    'pruned_heads': {}, 'qk_layernorm': False, 'qk_norm': False, 'qkv_bias': False,
    'residual_multiplier': 1, 'rope_interleaved': False, 'sliding_window': None,
    'tie_encoder_decoder': False, 'use_bias': False, 'use_qk_norm': False,
    'use_sliding_window': False,
    **dict.fromkeys(('first_k_dense_replace', 'moe_intermediate_size', 'n_routed_experts',
                     'num_experts', 'num_experts_per_tok', 'num_local_experts'), 0)}
_EMPTY: tuple[Any, ...] = (None, False, 0, '', [], {})  # what an unknown key may be

# The same kinds of keys for the dictionaries inside config.json.
_NEUTRAL_ROPE: dict[str, Any] = {'attention_factor': 1, 'partial_rotary_factor': 1}
_READ_ROPE = frozenset({'rope_theta', 'rope_type', 'type', 'original_max_position_embeddings'})
_LLAMA3 = 'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'
_READ_QUANTIZATION = frozenset({'linear_class', 'modules_to_not_convert', 'quant_method',
                                'quantization_mode'})
_HARMLESS_QUANTIZATION = frozenset({'rms_norm_eps'})  # It is read only with use_rms_norm.
_NEUTRAL_QUANTIZATION: dict[str, Any] = {'use_rms_norm': False}


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
    raise UserError(f'{where}: tie_word_embeddings is {tied!r}, but it must be true or false.')
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
    raise _not_covered(where, f'model_type {kind!r}')
  family = _FAMILIES[kind]
  architectures = _list(settings, 'architectures', where) or [family.architecture]
  if family.architecture not in architectures:
    raise _not_covered(where, f'architectures {architectures!r}')
  if settings.get('hidden_act', family.hidden_act) != family.hidden_act:
    raise _not_covered(where, f'hidden_act {settings["hidden_act"]!r}')
  layer_types = _list(settings, 'layer_types', where)
  if any(t != 'full_attention' for t in layer_types):
    raise _not_covered(where, f'layer_types {sorted(set(map(str, layer_types)))}')
  if kind == 'mistral' and 'sliding_window' not in settings:
    raise UserError(f'{where} does not say sliding_window, for which transformers takes 4096, and '
                    'a sliding window is not covered: if the model has none, write null.')
  harmless = _HARMLESS | {'layer_types'}
  if kind in ('qwen2', 'qwen3'):  # These have a switch for it, which is checked.
    harmless |= {'sliding_window'}
  _check_known(settings, _READ | harmless, _NEUTRAL, where, '')
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
    raise _not_covered(where, f'{name} of type {" and ".join(map(repr, kinds))}')
  if 'llama3' not in kinds:
    _check_known(section, _READ_ROPE, {**_NEUTRAL_ROPE, 'factor': 1}, where, f'{name}.')
    return cfg.PlainRope()
  _check_known(section, _READ_ROPE | set(_LLAMA3), _NEUTRAL_ROPE, where, f'{name}.')
  for key in _LLAMA3:
    _check_number(section.get(key), f'{name}.{key}', where)
  return _made(cfg.Llama3Rope, where, *(float(section[key]) for key in _LLAMA3[:3]),
               _size(section, _LLAMA3[3], where))


def _quantization(settings: Settings, where: str) -> Settings:
  """The checked quantization_config, {} where there is none."""
  section = _section(settings, 'quantization_config', where)
  if not section:
    return section
  if section.get('quant_method') != 'bitnet':
    raise _not_covered(where, f'quantisation {section.get("quant_method")!r}')
  for name, known in (('linear_class', ('bitlinear', 'autobitlinear')),
                      ('quantization_mode', ('offline', 'online'))):
    if section.get(name, known[0]) not in known:
      raise _not_covered(where, f'{name} {section[name]!r}')
  _check_known(section, _READ_QUANTIZATION | _HARMLESS_QUANTIZATION, _NEUTRAL_QUANTIZATION, where,
               'quantization_config.')
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
    raise UserError(f'{where}: modules_to_not_convert is {skipped!r}, but it must be a list of '
                    'names of modules.')
  depth = min(num_layers, 9999) if isinstance(num_layers, int) else 0
  matrices = _matrices()
  names = [matrix.format(layer=i) for i in range(depth) for matrix in matrices]
  for entry in skipped:
    module = next((name for name in names if entry in name), None)
    if module or not re.fullmatch(r'[\w.]+', entry):
      what = f'leaves {module} unquantised' if module else 'is a pattern'
      raise UserError(f'{where}: {entry!r} in modules_to_not_convert {what}. Models whose blocks '
                      "are quantised throughout are covered: give the list as ['lm_head'].")
  # The path of the head is its name alone.
  if not any(_HEAD.endswith(entry) for entry in skipped):
    raise UserError(f"{where}: modules_to_not_convert = {skipped} does not name 'lm_head', so "
                    'that the head is quantised. Models with a plain head are covered.')


def _check_known(settings: Settings, known: Iterable[str], neutral: Settings, where: str,
                 prefix: str) -> None:
  for name, value in settings.items():
    idle = (neutral[name],) if name in neutral else _EMPTY
    if name in known or value is None or value in idle:
      continue
    if name in neutral:
      raise _not_covered(where, f'{prefix}{name} = {value!r}')
    raise UserError(f'{where} sets {prefix}{name} = {value!r}, which is not known here and may '
                    'change what the model computes. If it does not, take it out of the file.')


def _section(settings: Settings, name: str, where: str) -> Settings:
  section = settings.get(name)
  if section is not None and not isinstance(section, dict):
    raise UserError(f'{where}: {name} is {section!r}, but it must be an object.')
  return section or {}


def _check_number(value: Any, name: str, where: str) -> None:
  # The bound also refuses the infinities and NaN that Python reads in JSON.
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not is_number or not abs(value) <= 1e30:
    raise UserError(f'{where}: {name} is {value!r}, but it must be a number.')


def _list(settings: Settings, name: str, where: str) -> list[Any]:
  items = settings.get(name) or []
  if not isinstance(items, list):
    raise UserError(f'{where}: {name} is {items!r}, but it must be a list.')
  return items


def _size(settings: Settings, name: str, where: str, default: int | None = None) -> int:
  value = settings.get(name)
  value = default if value is None else value
  if value is None:
    raise UserError(f'{where} does not say {name!r}: give the config.json of the model.')
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise UserError(f'{where}: {name} is {value!r}, but it must be a whole number above 0.')
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
