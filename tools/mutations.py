"""Deliberate mistakes of one line each, with the tests that stand nearest; see `mutate.py`."""

from typing import NamedTuple


class Mutation(NamedTuple):
  """`find` stands in `path` exactly once; with `replace` in its place `tests` must fail."""

  name: str
  path: str
  find: str
  replace: str
  tests: str


def _of(path: str, tests: str, *changes: tuple[str, str, str]) -> list[Mutation]:
  return [Mutation(name, path, find, replace, tests) for name, find, replace in changes]


_ADVANTAGES = _of(
    'jaxrl_pt/rl/advantages.py', 'tests/rl/test_advantages.py',
    ('grpo_std_biased', 'jnp.maximum(valid.sum(-1, keepdims=True) - 1, 1)',
     'jnp.maximum(valid.sum(-1, keepdims=True), 1)'),
    ('grpo_not_normalised', 'return centred / (std + EPSILON)', 'return centred'),
    ('rloo_is_mean_centred', '* num_valid / jnp.maximum(num_valid - 1, 1)',
     '* num_valid / jnp.maximum(num_valid, 1)'),
    ('opo_without_lengths', '(reward, lengths * valid', '(reward, valid'),
    ('leave_one_out_keeps_its_own', 'others = total - weights', 'others = total + 0 * weights'))

_TOKEN_ADVANTAGES = _of(
    'jaxrl_pt/rl/token_advantages.py', 'tests/rl/test_token_advantages.py',
    ('reward_on_first_token', '* mask * (remaining == 1)',
     '* mask * (remaining == remaining.max(-1, keepdims=True))'),
    ('gae_without_lambda', 'gamma * lam * next_advantage', 'gamma * next_advantage'),
    ('gae_without_next_value', 'reward + gamma * next_value - value', 'reward - value'),
    ('score_norm_of_one_probability', '1 - 2 * jnp.exp(logp) + collision',
     '1 - jnp.exp(logp) + collision'))

_OBJECTIVES = _of(
    'jaxrl_pt/rl/objectives.py', 'tests/rl/test_objectives.py',
    ('token_mean_counts_padding', 'return (values * mask).sum() / jnp.maximum(mask.sum(), 1.0)',
     'return (values * mask).sum() / mask.size'),
    ('clip_ranges_swapped', 'jnp.clip(ratio, 1 - low, 1 + high) * advantage',
     'jnp.clip(ratio, 1 - high, 1 + low) * advantage'),
    ('clip_takes_the_larger', 'clipped = bounded < plain', 'clipped = bounded > plain'),
    ('dual_clip_of_positive_advantages', '(advantage < 0) & (once.terms > ceiling)',
     '(advantage > 0) & (once.terms > ceiling)'),
    ('mismatch_without_absolute_value', 'jnp.exp(jnp.abs(', 'jnp.exp(('),
    ('variance_without_square', '(jnp.square(advantage) * score_norms * mask)',
     '(jnp.abs(advantage) * score_norms * mask)'))

_KL = [
    *_of('jaxrl_pt/rl/kl.py', 'tests/rl/test_kl.py',
         ('k3_of_swapped_arguments', 'return jnp.expm1(u) - u',
          'return jnp.expm1(-u) + u'),
         ('k2_without_half', 'jnp.square(k1(logp, reference_logp)) / 2',
          'jnp.square(k1(logp, reference_logp))')),
    *_of('jaxrl_pt/rl/corrections.py', 'tests/rl/test_corrections.py',
         ('correction_has_a_gradient',
          'jax.lax.stop_gradient(jnp.where(mask > 0, logp - sampler_logp, 0.0))',
          'jnp.where(mask > 0, logp - sampler_logp, 0.0)'),
         ('rejection_of_one_side', '(mean >= jnp.log(low) - 1e-6)', '(mean <= 1e6)')),
]

_SHAPING = [
    *_of('jaxrl_pt/rl/shaping.py', 'tests/rl/test_shaping.py',
         ('overlong_without_buffer', '(max_tokens - buffer_tokens - lengths) / buffer_tokens',
          '(max_tokens - lengths) / buffer_tokens'),
         ('gate_slack_sign', 'new - slack_accuracy - 1e-6', 'new + slack_accuracy - 1e-6'),
         ('short_rl_without_slack', 'lengths <= shortest + slack_tokens', 'lengths <= shortest')),
    *_of('jaxrl_pt/rl/selection.py', 'tests/rl/test_selection.py',
         ('dynamic_sampling_keeps_all_wrong', '(num_correct > 0) &', '(num_correct >= 0) &')),
]

_LEARNER_TESTS = 'tests/train/test_update.py'
_COEFFICIENTS = f'{_LEARNER_TESTS}::test_coefficients_by_the_definition_of_their_term'
_REFERENCES = ('tests/rollouts/test_stages.py::'
               'test_the_reference_of_a_step_is_the_start_policy_as_it_was_sampled')
_LEARNER = [
    *_of('jaxrl_pt/train/update.py', _COEFFICIENTS,
         ('kl_coefficient_dropped', 'return coef * kl.ESTIMATORS[estimator](logp, reference_logp)',
          'return kl.ESTIMATORS[estimator](logp, reference_logp)')),
    *_of('jaxrl_pt/train/update.py',
         f'{_LEARNER_TESTS}::test_kl_in_the_reward_is_taken_from_it',
         ('kl_in_reward_coefficient_dropped', 'token_rewards -= coef * kl.ESTIMATORS',
          'token_rewards -= kl.ESTIMATORS')),
    *_of('jaxrl_pt/train/update.py', _COEFFICIENTS,
         ('entropy_coefficient_dropped', 'terms -= algorithm.entropy_coef * scores.entropy',
          'terms -= scores.entropy'),
         ('entropy_bonus_sign', 'terms -= algorithm.entropy_coef * scores.entropy',
          'terms += algorithm.entropy_coef * scores.entropy')),
    *_of('jaxrl_pt/train/update.py',
         f'{_LEARNER_TESTS}::test_the_value_head_teaches_itself_and_not_the_policy',
         ('value_head_trains_the_trunk', '_values(head, jax.lax.stop_gradient(hidden))',
          '_values(head, hidden)')),
    *_of('jaxrl_pt/train/update.py', _COEFFICIENTS,
         ('unverified_rows_train', 'mask = rollouts.sampled * verdict.valid[..., None]',
          'mask = rollouts.sampled')),
    *_of('jaxrl_pt/train/update.py',
         f'{_LEARNER_TESTS}::test_a_forced_token_is_of_the_response_and_not_learned_from',
         ('forced_tokens_train', 'mask = rollouts.sampled * verdict.valid[..., None]',
          'mask = rollouts.in_response * verdict.valid[..., None]')),
    *_of('jaxrl_pt/train/update.py',
         f'{_LEARNER_TESTS}::test_what_the_surrogates_do_after_the_first_update_differs',
         ('old_policy_is_the_current_one', 'if single_update else on_mask(batch.old_logp)',
          'if single_update else jax.lax.stop_gradient(logp)')),
    *_of('jaxrl_pt/train/update.py',
         f'{_LEARNER_TESTS}::test_a_step_that_is_not_finite_leaves_gate_and_head_alone',
         ('nonfinite_updates_are_kept', 'jnp.where(finite, a, b), new, state)', 'a, new, state)')),
    *_of('jaxrl_pt/train/update.py',
         f'{_LEARNER_TESTS}::test_a_cap_of_one_lowers_and_a_stale_sampler_weighs',
         ('correction_dropped', 'terms = surrogate.terms * correction',
          'terms = surrogate.terms * mask')),
    *_of('jaxrl_pt/train/update.py',
         f'{_LEARNER_TESTS}::test_the_metrics_of_all_updates_are_added_up',
         ('only_the_first_update_counts', 'return state, jax.tree.map(lambda x: x.sum(0), every)',
          'return state, jax.tree.map(lambda x: x[0], every)')),
    *_of('jaxrl_pt/rollouts/stages.py', _REFERENCES,
         ('k3_metric_swapped', 'kl.k3(rollouts.logp, on_sampled)',
          'kl.k3(on_sampled, rollouts.logp)'),
         ('reference_only_on_logged_steps', 'if measure or reads:\n      reference_logp =',
          'if measure:\n      reference_logp =')),
    *_of('jaxrl_pt/rollouts/stages.py', 'tests/rollouts/test_stages.py',
         ('first_good_group_is_enough', 'if len(informative) >= num_prompts:',
          'if informative:')),
    *_of('jaxrl_pt/sampling/groups.py',
         f'{_LEARNER_TESTS}::test_a_prompt_that_stands_in_a_batch_again_draws_further_samples',
         ('repeated_prompts_draw_the_same',
          'first = occurrences(prompts.ids) * rollouts.group_size',
          'first = 0 * occurrences(prompts.ids)')),
    *_of('jaxrl_pt/jobs/reinforce.py', 'tests/jobs/test_reinforce.py',
         ('another_order_is_taken', 'if position.get(name, value) != value:', 'if False:'),
         ('old_rollouts_drawn_ahead_are_taken',
          "if self._draws_ahead and position.get('pending') != _PENDING:", 'if False:')),
    *_of('jaxrl_pt/rl/ratios.py', 'tests/rl/test_objectives.py',
         ('log_ratios_are_not_bounded', 'return jnp.clip(log_ratio, -LOG_BOUND, LOG_BOUND)',
          'return log_ratio')),
    *_of('jaxrl_pt/train/fused.py', _REFERENCES,
         ('reference_is_the_current_policy',
          'reference_logp = response_logp(model, reference_params,',
          'reference_logp = response_logp(model, state.params,'),
         ('reference_without_temperature', 'prompts, rollouts.tokens, sampler, loss_chunk,',
          'prompts, rollouts.tokens, cfg.Sampler(), loss_chunk,')),
    *_of('jaxrl_pt/params.py', 'tests/models/test_transformer.py::test_what_decays_are_products',
         ('norms_decay', "return self.role in ('projection', 'head')", 'return True')),
    *_of('jaxrl_pt/train/optim.py', 'tests/train/test_optim.py',
         ('warm_up_runs_into_the_decay', '  if warmup > begins:', '  if False:'),
         ('warm_up_starts_at_zero', 'peak * (step + 1) / schedule.warmup_steps',
          'peak * step / schedule.warmup_steps')),
    *_of('jaxrl_pt/environments/problems.py',
         'tests/environments/test_problems.py::test_padding_does_not_count_in_what_is_held_out',
         ('padding_counts_in_held_out_reward', 'verdict.valid[:, 0] * counted',
          'verdict.valid[:, 0]')),
    *_of('jaxrl_pt/environments/next_token.py', 'tests/environments/test_next_token.py',
         ('rpt_thresholds_swapped', 'method.difficulty[0] if held_out else method.min_entropy',
          'method.min_entropy if held_out else method.difficulty[0]'),
         ('rpt_measured_on_training_positions', "entropy, proxy_params, 'validation')",
          "entropy, proxy_params, 'train')"),
         ('rpt_measured_on_training_prompts', '_prompts(session.data.validation, held_out,',
          '_prompts(session.data.train, held_out,'),
         ('rpt_keeps_unpredictable_tokens', 'predictable=predictable)', 'predictable=None)')),
]

_NUMERICS = [
    *_of('jaxrl_pt/models/logprobs.py',
         'tests/models/test_bfloat16.py::test_samplers_and_learner_take_float32_logits',
         ('logits_in_bfloat16', 'logits = logits.astype(jnp.float32)',
          'logits = logits.astype(jnp.bfloat16)')),
    *_of('jaxrl_pt/models/logprobs.py', 'tests/models/test_logprobs.py',
         ('entropy_sign', 'entropy = -(probabilities * log_probabilities).sum(-1)',
          'entropy = (probabilities * log_probabilities).sum(-1)')),
    *_of('jaxrl_pt/nn/norm.py',
         'tests/models/test_bfloat16.py::test_a_norm_is_rounded_once_and_its_gains_gradient_never',
         ('rms_norm_in_bfloat16', 'x32 = x.astype(jnp.float32)', 'x32 = x')),
    *_of('jaxrl_pt/nn/norm.py', 'tests/nn/test_norm.py',
         ('rms_norm_without_gain', '(x32 * inverse * gain)', '(x32 * inverse)')),
    *_of('jaxrl_pt/nn/quant.py', 'tests/nn/test_quant.py',
         ('ternary_scale_of_all_layers', '.mean((-2, -1), keepdims=True)', '.mean(keepdims=True)'),
         ('ternary_rounds_down', 'jnp.round(w.astype(jnp.float32) / scale)',
          'jnp.floor(w.astype(jnp.float32) / scale)')),
]

_SAMPLER = [
    *_of('jaxrl_pt/sampling/policies.py', 'tests/sampling/test_policies.py',
         ('top_k_of_k_less_one', 'keep &= scaled >= jax.lax.top_k(',
          'keep &= scaled > jax.lax.top_k('),
         ('top_p_without_the_last_token', 'jnp.cumsum(probabilities, -1) - probabilities',
          'jnp.cumsum(probabilities, -1)'),
         ('temperature_multiplies', 'scaled = scaled / settings.temperature',
          'scaled = scaled * settings.temperature'),
         ('learner_drops_drawn_tokens', '_support(scaled, settings) | drawn',
          '_support(scaled, settings) & (drawn | True)'),
         ('draw_reports_another_logp', 'drawn_B - top_B - jnp.log(mass_BN.sum(-1))',
          'drawn_B - jnp.log(mass_BN.sum(-1))')),
    *_of('jaxrl_pt/sampling/groups.py', 'tests/sampling/test_groups.py',
         ('garbage_after_the_stop', 'jnp.where(there, state.responses.logp, 0.0)',
          'state.responses.logp'),
         ('prefix_holds_the_last_token', 'prefix=each(prompts.lengths - 1), tail',
          'prefix=each(prompts.lengths), tail')),
    *_of('jaxrl_pt/sampling/step.py', 'tests/sampling/test_groups.py',
         ('noise_without_position', 'jax.vmap(jax.random.fold_in)(keys, decoding.length)',
          'jax.vmap(jax.random.fold_in)(keys, 0 * decoding.length)'),
         ('waiting_slots_feed_garbage', 'newest=jnp.where(active, newest, decoding.newest)',
          'newest=newest'),
         ('tail_is_drawn', 'in_tail = decoding.fed + 1 < asked.num_tail',
          'in_tail = decoding.fed + 1 < 0 * asked.num_tail')),
    *_of('jaxrl_pt/sampling/step.py', 'tests/sampling/test_engine.py',
         ('engine_one_token_too_many', 'full = count + 1 >= asked.max_tokens',
          'full = count >= asked.max_tokens'),
         ('engine_noise_without_sample', '(keys, asked.samples)', '(keys, 0 * asked.samples)'),
         ('engine_needs_every_stop', '(token[:, None] == asked.stop).any(-1)',
          '(token[:, None] == asked.stop).all(-1)'),
         ('engine_length_stands_still', 'length = decoding.length + active',
          'length = decoding.length + 0 * active')),
    *_of('jaxrl_pt/sampling/step.py', 'tests/sampling/test_engine_extras.py',
         ('kept_pages_are_given_up', 'kept = ended & (asked.keep >= 0) & ~asked.cancelled',
          'kept = ended & (asked.keep >= 0) & asked.cancelled'),
         ('constraints_of_other_rows', 'words = queue.masks[jnp.maximum(asked.mask, 0)]',
          'words = queue.masks[0 * asked.mask]')),
    *_of('jaxrl_pt/sampling/admission.py', 'tests/sampling/test_engine_extras.py',
         ('pages_are_given_up_twice', 'holders.at[tables].add(-held.astype(jnp.int32))',
          'holders.at[tables].add(-2 * held.astype(jnp.int32))'),
         ('a_partly_shared_page_is_not_copied', 'is_copied = is_ready & (prefix % size > 0)',
          'is_copied = is_ready & (prefix % size < 0)'),
         ('old_documents_make_no_room', 'waiting & has_place & ~has_pages & can_go.any()',
          'waiting & has_place & ~has_pages & ~can_go.any()'),
         ('documents_are_not_forgotten', 'is_old = (places.content != queue.documents.content)',
          'is_old = (places.content > 2**30)')),
    *_of('jaxrl_pt/nn/paged_attention.py', 'tests/models/test_caches.py',
         ('a_query_sees_the_next_token', 'seen = key_positions <= positions_BQ[..., None]',
          'seen = key_positions <= positions_BQ[..., None] + 1'),
         ('earlier_blocks_do_not_fade', 'fading = jnp.exp(highest - now)',
          'fading = jnp.ones_like(highest)')),
    *_of('jaxrl_pt/sampling/weight_sync.py', 'tests/sampling/test_weight_sync.py',
         ('weight_sync_checks_nothing', 'check(checksum(leave(params)), sums)',
          'check(sums, sums)'),
         ('weight_sync_packs_nothing',
          'return pack(params, _is_bit_linear(model)) if packed else params',
          'return params')),
]

_DATA = [
    *_of('jaxrl_pt/data/pack.py', 'tests/data/test_pack.py',
         ('positions_of_the_row', 'np.where(real_BT, t_T - first_BT, 0)',
          'np.where(real_BT, t_T + 0 * first_BT, 0)'),
         ('one_segment_a_row', 'row_3T[2, low:high] = segment', 'row_3T[2, low:high] = 1'),
         ('end_of_text_is_not_learned', '[begin, tokens_n, [ends.eos]]', '[begin, tokens_n]')),
    *_of('jaxrl_pt/data/next_token.py', 'tests/data/test_next_token.py',
         ('a_step_repeats_rows', 'if np.isin(order[:own], had).any():', 'if False:'),
         ('order_without_seed', 'np.random.default_rng([seed, e', 'np.random.default_rng([0, e'),
         ('context_ends_early', 'place = t + 1 - lengths[:, None]', 'place = t - lengths[:, None]'),
         ('certain_positions', 'keep = counts & (entropy >= min_entropy)',
          'keep = counts & (entropy <= min_entropy)')),
    *_of('jaxrl_pt/data/problems.py', 'tests/data/test_problems.py',
         ('json_numbers_by_str', "return f'{exact:f}' if is_short else str(number)",
          'return str(float(exact))'),
         ('empty_references', ".strip().lower() in ('', 'nan')", ".strip().lower() in ('nan',)")),
    *_of('jaxrl_pt/data/loader.py', 'tests/data/test_loader.py',
         ('resume_skips_a_batch', "self._step = int(state['step'])",
          "self._step = int(state['step']) + 1"),
         ('resume_with_another_seed', 'if state.get(name) != value:',
          "if state.get(name) != value and name != 'seed':")),
]

_CHECKPOINT = _of(
    'jaxrl_pt/checkpoint.py', 'tests/test_checkpoint.py',
    ('damaged_arrays_load', "if value != content['leaves'][path]['checksum']:", 'if False:'),
    ('damaged_records_load', 'if _crc(content) != crc:', 'if False:'),
    ('oldest_first', 'return finished[::-1]', 'return finished'),
    ('other_shapes_load', 'if in_checkpoint != in_run:', 'if False:'))

_GYM = 'tests/verifiers/test_gym.py::test_a_long_answer_with_a_character_too_many_is_not_right'
_VERIFIERS = [
    *_of('jaxrl_pt/verifiers/answer_equal.py', 'tests/verifiers/test_math_answers.py',
         ('units_are_one', 'return unit == other and _equal_values',
          'return _equal_values'),
         ('letters_that_vanish', 'if not _letters(stated) <= _letters(truth):', 'if False:'),
         ('false_chains_pay', 'return False  # 5 = 6, and x = 5 = 6', 'pass'),
         ('proof_is_not_asked', 'return is_opaque and prove(left, right)', 'return is_opaque')),
    *_of('jaxrl_pt/verifiers/answer_number.py', 'tests/verifiers/test_math_answers.py',
         ('denied_numbers_pay', '_DENIED_BEFORE.search(before) or _is_part(before, after)',
          '_is_part(before, after)'),
         ('parts_of_formulas_pay', '_DENIED_BEFORE.search(before) or _is_part(before, after)',
          '_DENIED_BEFORE.search(before)')),
    *_of('jaxrl_pt/verifiers/answer_formula.py', 'tests/verifiers/test_math_answers.py',
         ('towers_from_the_left', "elif self.accept('^'):\n      value =",
          "while self.accept('^'):\n      value ="),
         ('improper_mixed_numbers', 'if not 0 < top < bottom or', 'if not 0 < top or')),
    *_of('jaxrl_pt/verifiers/answer_value.py', 'tests/verifiers/test_math_answers.py',
         ('roots_lose_their_whole_part', 'coefficient *= _power(Fraction(name[1]), whole)',
          'coefficient *= 1')),
    *_of('jaxrl_pt/verifiers/math.py', 'tests/verifiers/test_math.py',
         ('long_answers_are_read', 'if len(stated) > MAX_ANSWER:', 'if False:')),
    *_of('jaxrl_pt/verifiers/math.py', 'tests/verifiers/test_math_answers.py',
         ('unparsed_is_wrong', 'return Outcome.UNPARSED\n    is_right',
          'return Outcome.WRONG\n    is_right')),
    *_of('jaxrl_pt/verifiers/gym.py', _GYM,
         ('nearly_right_is_right', 'RIGHT = 1.0 - 1e-6', 'RIGHT = 0.99')),
    *_of('jaxrl_pt/verifiers/logic.py', 'tests/verifiers/test_logic.py',
         ('roles_outside_claims', '== len(claims) == len(_ROLE.findall(text))', '== len(claims)')),
    *_of('jaxrl_pt/verifiers/text.py', 'tests/verifiers/test_text.py',
         ('parts_of_words_are_said', "after = '' if not last.isalnum()",
          "after = '' if last.isalnum()"),
         ('tags_twice', 'if text.count(opening) != 1 or text.count(closing) != 1:',
          'if text.count(closing) != 1:')),
    *_of('jaxrl_pt/verifiers/exact.py', 'tests/verifiers/test_exact.py',
         ('answers_without_a_stop', 'ended = (length > 0) & (last == stop_id)',
          'ended = length > 0')),
    *_of('jaxrl_pt/verifiers/build.py', 'tests/verifiers/test_pool.py',
         ('composite_without_weights', "': weight * value", "': value")),
    *_of('jaxrl_pt/verifiers/base.py', 'tests/verifiers/test_pool.py',
         ('unverified_counts', 'v.outcome not in ', 'True or v.outcome not in ')),
    *_of('jaxrl_pt/verifiers/child.py',
         'tests/verifiers/test_hostile.py::'
         'test_nothing_that_an_answer_writes_or_does_is_a_verdict',
         ('verdicts_of_anybody', "if answer.get('nonce') != nonce or not", 'if not')),
]

_HOSTILE_PROGRAMS = 'tests/verifiers/test_code.py::'
_REACHES = _HOSTILE_PROGRAMS + 'test_a_program_reaches_nothing'
_EPISODES = 'tests/environments/test_episodes.py::'
_PROGRAMS = [
    *_of('jaxrl_pt/verifiers/seccomp.py', _REACHES,
         ('programs_open_sockets', "'socketpair': (53, 199),", "'socketpair': (41, 198),"),
         ('programs_start_processes', "_step(_JUMP_SET, _CLONE_THREAD, 1),",
          "_step(_JUMP_SET, 0xffffffff, 1),")),
    *_of('jaxrl_pt/verifiers/isolated.py', _REACHES,
         ('programs_see_the_host', "'/etc/ld.so.cache'):", "'/etc/ld.so.cache', '/etc/passwd'):")),
    *_of('jaxrl_pt/verifiers/isolated.py',
         _HOSTILE_PROGRAMS + 'test_a_plain_user_isolates_programs_too',
         ('programs_write_to_the_root', "  _restrict('/', _NO_DEVICES, 0)\n", '')),
    *_of('jaxrl_pt/verifiers/isolated.py', _HOSTILE_PROGRAMS
         + 'test_a_program_is_a_user_of_its_own_and_finds_nothing_of_the_caller',
         ('programs_inherit_descriptors', "  os.closerange(_STATUS + 1, os.sysconf('SC_OPEN_MAX'))",
          '  pass')),
    *_of('jaxrl_pt/verifiers/interpreter.py', _HOSTILE_PROGRAMS
         + 'test_a_value_of_no_plain_type_equals_nothing',
         ('unknown_values_are_equal', '    return False\n\n  __hash__',
          '    return True\n\n  __hash__')),
    *_of('jaxrl_pt/verifiers/code.py', _HOSTILE_PROGRAMS
         + 'test_no_other_program_passes_and_none_disturbs_the_next',
         ('half_the_asserts_are_enough', 'is_right = len(found.values) == len(expected) and all(',
          'expected = expected[:len(found.values)]\n    is_right = all(')),
    *_of('jaxrl_pt/environments/interactive.py', _EPISODES
         + 'test_one_that_answers_otherwise_when_played_again_is_refused',
         ('replays_are_believed', 'if _checksum(_stepped(environment, earlier)) != checksum:',
          'if _stepped(environment, earlier) is None:')),
    *_of('jaxrl_pt/environments/episodes.py', _EPISODES
         + 'test_one_that_never_ends_is_ended_at_the_turn_limit',
         ('episodes_never_end', "num_turns >= max_turns", 'num_turns > max_turns')),
    *_of('jaxrl_pt/environments/playing.py', _EPISODES
         + 'test_every_misdeed_has_its_outcome_and_disturbs_no_other_row',
         ('observations_of_any_size', '  if num_bytes > most:', '  if False:')),
    *_of('jaxrl_pt/environments/tools.py',
         'tests/environments/test_tools.py::test_calls_of_one_text_are_answered_in_order_up_to_a_bound',
         ('calls_without_bound', 'if number >= settings.max_calls:\n      found',
          'if False:\n      found')),
]

_KERNELS = _of(
    'jaxrl_pt/parallel/kernels.py', 'tests/parallel/test_kernels.py',
    ('splash_without_scale', 'q = (q * head_dim**-0.5).astype(q.dtype)', 'q = q.astype(q.dtype)'),
    ('product_without_its_other_parts', 'sums = jax.lax.psum(multiply(out_dtype=jnp.int32), split)',
     'sums = multiply(out_dtype=jnp.int32)'),
    ('splash_across_documents', 'SegmentIds(segments_BT, segments_BT)',
     'SegmentIds(0 * segments_BT, 0 * segments_BT)'),
    ('int4_for_int8', "'int8' if kind == 'int8' else 'int4'",
     "'int4' if kind == 'int8' else 'int8'"))

MUTATIONS: tuple[Mutation, ...] = (
    *_ADVANTAGES, *_TOKEN_ADVANTAGES, *_OBJECTIVES, *_KL, *_SHAPING, *_LEARNER, *_NUMERICS,
    *_SAMPLER, *_DATA, *_CHECKPOINT, *_VERIFIERS, *_PROGRAMS, *_KERNELS)
