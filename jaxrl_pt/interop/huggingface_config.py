"""Turns the config.json of a Hugging Face model into a cfg.Model and back, with no unknown key.

A key is either read (`_READ`), or does not change the logits (`_HARMLESS`), or does nothing at one
value (`_NEUTRAL`). Every other key is refused by its name, since it may change the arithmetic, and
a model that loads with wrong logits gives no error.
"""

from collections.abc import Iterable
import re
from typing import Any

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import transformer

Settings = dict[str, Any]

W1A8 = cfg.Quant('ternary', 'int8')
_HEAD = 'lm_head'
_CLASSES = {'llama': 'LlamaForCausalLM', 'bitnet': 'BitNetForCausalLM'}
_ACTIVATIONS = {'llama': 'silu', 'bitnet': 'relu2'}

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
    'residual_multiplier': 1, 'rope_interleaved': False, 'tie_encoder_decoder': False,
    'use_bias': False, 'use_qk_norm': False, 'use_sliding_window': False}

# The same kinds of keys for the dictionaries inside config.json.
_NEUTRAL_ROPE: dict[str, Any] = {
    'rope_type': 'default', 'type': 'default', 'factor': 1, 'attention_factor': 1,
    'partial_rotary_factor': 1}
_READ_ROPE = frozenset({'rope_theta'})
_HARMLESS_ROPE = frozenset({'original_max_position_embeddings'})
_READ_QUANTIZATION = frozenset({'linear_class', 'modules_to_not_convert', 'quant_method',
                                'quantization_mode'})
_HARMLESS_QUANTIZATION = frozenset({'rms_norm_eps'})  # It is read only with use_rms_norm.
_NEUTRAL_QUANTIZATION: dict[str, Any] = {'use_rms_norm': False}


# --- Import ---------------------------------------------------------------------


def to_config(settings: Any, where: str) -> cfg.Model:
  """The model that a config.json describes.

  Args:
    settings: the parsed file.
    where: the file's path, for messages.

  Raises:
    UserError: a key is unknown or missing, or its value is not covered or of a wrong type.
  """
  if not isinstance(settings, dict):
    raise UserError(f'{where} holds no JSON object: give the config.json of a model.')
  kind = settings.get('model_type')
  if not isinstance(kind, str) or kind not in _CLASSES:
    raise _not_covered(where, f'model_type {kind!r}')
  architectures = _list(settings, 'architectures', where) or [_CLASSES[kind]]
  if _CLASSES[kind] not in architectures:
    raise _not_covered(where, f'architectures {architectures!r}')
  if settings.get('hidden_act', _ACTIVATIONS[kind]) != _ACTIVATIONS[kind]:
    raise _not_covered(where, f'hidden_act {settings["hidden_act"]!r}')
  if settings.get('attention_bias') or settings.get('mlp_bias'):
    raise _not_covered(where, 'a model with biases')
  layer_types = _list(settings, 'layer_types', where)
  if any(t != 'full_attention' for t in layer_types):
    raise _not_covered(where, f'layer_types {sorted(set(map(str, layer_types)))}')
  theta = _rope_theta(settings, where)
  quantised = _quantization(settings, where) != {}
  _check_known(settings, _READ | _HARMLESS | {'layer_types'}, _NEUTRAL, where, '')
  heads, width = (_size(settings, name, where) for name in ('num_attention_heads', 'hidden_size'))
  tied = settings.get('tie_word_embeddings', False)
  if not isinstance(tied, bool):
    raise UserError(f'{where}: tie_word_embeddings is {tied!r}, but it must be true or false.')
  return cfg.Model(
      num_layers=_size(settings, 'num_hidden_layers', where), d_model=width,
      d_ff=_size(settings, 'intermediate_size', where), num_heads=heads,
      num_kv_heads=_size(settings, 'num_key_value_heads', where, heads),
      head_dim=_size(settings, 'head_dim', where, width // heads),
      vocab_size=_size(settings, 'vocab_size', where),
      rope_theta=theta or (500_000.0 if kind == 'bitnet' else 10_000.0),
      activation='relu2' if kind == 'bitnet' else 'swiglu', sub_norm=kind == 'bitnet',
      tied_head=tied, quant=W1A8 if quantised else cfg.Quant(),
      norm_epsilon=settings.get('rms_norm_eps', 1e-5 if kind == 'bitnet' else 1e-6))


def linear_class(settings: Settings) -> tuple[str, str]:
  """(linear_class, quantization_mode) of a checked config.json, ('', '') if it has no quantisation.
  """
  quantization = settings.get('quantization_config')
  if not quantization:
    return '', ''
  return (quantization.get('linear_class', 'bitlinear'),
          quantization.get('quantization_mode', 'offline'))


def _rope_theta(settings: Settings, where: str) -> float | None:
  """The base of RoPE's frequencies, which may be in three places; None where it is in none."""
  given: list[Any] = []
  for name in ('rope_parameters', 'rope_scaling'):
    rope = _section(settings, name, where)
    types = [rope[key] for key in ('rope_type', 'type') if rope.get(key) is not None]
    if any(t != 'default' for t in types):
      raise _not_covered(where, f'{name} {types[0]!r}, which is scaled RoPE,')
    _check_known(rope, _READ_ROPE | _HARMLESS_ROPE, _NEUTRAL_ROPE, where, f'{name}.')
    given.append(rope.get('rope_theta'))
  thetas = [t for t in (*given, settings.get('rope_theta')) if t is not None]
  for theta in thetas:
    if isinstance(theta, bool) or not isinstance(theta, (int, float)):
      raise UserError(f'{where}: rope_theta is {theta!r}, but it must be a number.')
  if len(set(thetas)) > 1:
    raise UserError(f'{where} gives rope_theta as {" and as ".join(map(str, thetas))}: leave the '
                    'one that the model was trained with.')
  return float(thetas[0]) if thetas else None


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
    if name in known or value is None or (name in neutral and value == neutral[name]):
      continue
    if name in neutral:
      raise _not_covered(where, f'{prefix}{name} = {value!r}')
    raise UserError(f'{where} sets {prefix}{name} = {value!r}, which is not known here and may '
                    'change what the model computes. If it does not, take it out of the file.')


def _section(settings: Settings, name: str, where: str) -> Settings:
  section = settings.get(name)
  if section is None:
    return {}
  if not isinstance(section, dict):
    raise UserError(f'{where}: {name} is {section!r}, but it must be an object.')
  return section


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
  return UserError(f'{where}: {what} is not covered; Llama and BitNet models without biases, '
                   'with plain RoPE, are.')


# --- Export ---------------------------------------------------------------------


def to_settings(config: cfg.Model, packed: bool, bos_id: int | None,
                eos_id: int | None) -> Settings:
  """The config.json of a model.

  Tokens that the model does not have are written as null, since for a missing key the library takes
  a token of its own.

  Raises:
    UserError: no Hugging Face class computes this model.
  """
  kinds = {('swiglu', False): 'llama', ('relu2', True): 'bitnet'}
  kind = kinds.get((config.activation, config.sub_norm))
  if kind is None or config.quant not in (cfg.Quant(), W1A8):
    raise UserError(
        'Only SwiGLU models without sub_norm (Llama) and ReLU² models with it (BitNet), plain or '
        'W1.58A8 without Hadamard, have a Hugging Face class: this model cannot be exported.')
  if kind == 'bitnet' and config.num_heads * config.head_dim != config.d_model:
    raise UserError('The BitNet class of Hugging Face has num_heads × head_dim = d_model: this '
                    'model cannot be exported.')
  if packed and config.quant != W1A8:
    raise UserError("packed = True stores ternary weights, but Quant.weights = 'none': export "
                    'with packed = False.')
  settings: Settings = {
      'architectures': [_CLASSES[kind]],
      'model_type': kind, 'hidden_act': _ACTIVATIONS[kind],
      'hidden_size': config.d_model, 'intermediate_size': config.d_ff,
      'num_hidden_layers': config.num_layers, 'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads, 'head_dim': config.head_dim,
      'vocab_size': config.vocab_size, 'rope_theta': config.rope_theta,
      'rms_norm_eps': config.norm_epsilon, 'tie_word_embeddings': config.tied_head,
      'attention_bias': False, 'max_position_embeddings': 4096, 'torch_dtype': 'float32',
      'bos_token_id': bos_id, 'eos_token_id': eos_id, 'pad_token_id': None,
  }
  if config.quant == W1A8:
    settings['quantization_config'] = {
        'quant_method': 'bitnet', 'linear_class': 'autobitlinear',
        'quantization_mode': 'offline' if packed else 'online',
        'modules_to_not_convert': [_HEAD]}
  return settings
