"""The keys of a config.json of Hugging Face, by what they do to the logits.

A key is either read (`READ`), or does not change the logits (`HARMLESS`), or does nothing at one
value (`NEUTRAL`).
"""

from typing import Any

READ = frozenset("""
    architectures head_dim hidden_act hidden_size intermediate_size model_type
    num_attention_heads num_hidden_layers num_key_value_heads quantization_config rms_norm_eps
    rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size""".split())

# Keys about the file and its loader, training, generation, other tasks and the tokenizer.
HARMLESS = frozenset("""
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
NEUTRAL: dict[str, Any] = {
    'add_cross_attention': False, 'attention_bias': False, 'bias': False, 'clip_qkv': None,
    'embedding_multiplier': 1, 'is_causal': True, 'is_encoder_decoder': False,
    'logit_scale': 1, 'logits_scaling': 1, 'mlp_bias': False, 'partial_rotary_factor': 1,
    'pruned_heads': {}, 'qk_layernorm': False, 'qk_norm': False, 'qkv_bias': False,
    'residual_multiplier': 1, 'rope_interleaved': False, 'sliding_window': None,
    'tie_encoder_decoder': False, 'use_bias': False, 'use_qk_norm': False,
    'use_sliding_window': False,
    **dict.fromkeys(('first_k_dense_replace', 'moe_intermediate_size', 'n_routed_experts',
                     'num_experts', 'num_experts_per_tok', 'num_local_experts'), 0)}
EMPTY: tuple[Any, ...] = (None, False, 0, '', [], {})  # what an unknown key may be

# The same kinds of keys for the dictionaries inside config.json.
NEUTRAL_ROPE: dict[str, Any] = {'attention_factor': 1, 'partial_rotary_factor': 1}
READ_ROPE = frozenset({'rope_theta', 'rope_type', 'type', 'original_max_position_embeddings'})
# What llama3's scaling of RoPE reads.
LLAMA3 = 'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'
READ_QUANTIZATION = frozenset({'linear_class', 'modules_to_not_convert', 'quant_method',
                                'quantization_mode'})
HARMLESS_QUANTIZATION = frozenset({'rms_norm_eps'})  # It is read only with use_rms_norm.
NEUTRAL_QUANTIZATION: dict[str, Any] = {'use_rms_norm': False}
