"""The update: methods against each other, slices against the whole, state that moves."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.rl import advantages
from jaxrl_pt.sampling import groups
from jaxrl_pt.sampling.groups import make_sampler
from jaxrl_pt.train import fused, optim, policy_update, scores, update
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Array, Prompts, RolloutBatch, TrainBatch, TrainState, Verdict

CONFIG = cfg.Model(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
                   vocab_size=11)
MODEL = transformer.build(CONFIG)
PARAMS = P.init(MODEL.specs, jax.random.key(0))
PARAMS = {**PARAMS, 'embed': PARAMS['embed'] * 20}
N, G, S = 4, 4, 3

PROMPTS = Prompts(jnp.asarray([[3, 1, 4], [9, 2, 0], [6, 5, 3], [7, 0, 0]], jnp.int32),
                  jnp.asarray([3, 2, 3, 1], jnp.int32), jnp.arange(N, dtype=jnp.int32),
                  extras={'answer': jnp.zeros((N, 2), jnp.int32),
                          'answer_lengths': jnp.arange(N, dtype=jnp.int32)})


class Verified(NamedTuple):
  """A verified batch: what `learn` takes beside the state, in its order."""

  prompts: Prompts
  rollouts: RolloutBatch
  verdict: Verdict
  reference_logp: Array  # f32[N, G, S]

  @property
  def mask(self) -> Array:
    """f32[N, G, S]: 1 on tokens that are learned from."""
    return self.rollouts.sampled * self.verdict.valid[..., None]


def make_run(method: cfg.Algorithm, accumulation=1, group_parts=1, **rollouts) -> cfg.Run:
  objective = cfg.RL(
      'unused', cfg.Problems(cfg.Arithmetic(9)), cfg.AnswerMatch(), algorithm=method,
      rollouts=cfg.Rollouts(num_prompts=N, group_size=G, prompt_len=3, response_tokens=S,
                            **rollouts))
  return cfg.Run(
      seed=1, model=CONFIG, objective=objective,
      data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
      optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.01), weight_decay=0.0, clip_norm=0.0),
      train=cfg.Train(num_steps=9, accumulation=accumulation, group_parts=group_parts))


def make_state(run: cfg.Run) -> tuple[TrainState, object]:
  optimizer = optim.make_optimizer(run.optimizer, run.train.num_steps, MODEL.specs)
  kept = states.new_method(run.objective.rollouts, run.objective.algorithm, CONFIG.d_model)
  return TrainState(jnp.zeros((), jnp.int32), PARAMS, optimizer.init(PARAMS), kept), optimizer


@functools.cache
def drawn() -> RolloutBatch:
  run = make_run(cfg.Algorithm())
  sample = make_sampler(MODEL, 1, run.objective.rollouts, stop_ids=(0,))
  return jax.jit(sample)(PARAMS, PROMPTS, jnp.int32(0), jnp.int32(0))


def verified(reference_logp=None, correct=None) -> Verified:
  rng = np.random.default_rng(0)
  correct = jnp.asarray(rng.integers(0, 2, (N, G)) if correct is None else correct, jnp.float32)
  valid = jnp.ones((N, G)).at[1, 2].set(0)
  reference = jnp.zeros((N, G, S)) if reference_logp is None else reference_logp
  return Verified(PROMPTS, drawn(), Verdict(correct, valid, correct, {'a': correct}), reference)


@functools.cache  # Tests of one method share its program.
def make_step(method: cfg.Algorithm, accumulation=1, group_parts=1, **rollouts):
  """The compiled learner and the state that it begins with."""
  run = make_run(method, accumulation, group_parts, **rollouts)
  state, optimizer = make_state(run)
  learn_from = update.make_learner(MODEL, optimizer, run, run.objective.rollouts, method)
  return jax.jit(lambda state, batch: learn_from(state, *batch)), state


def learn(method: cfg.Algorithm, batch=None, accumulation=1, group_parts=1, steps=1, **rollouts):
  step, state = make_step(method, accumulation, group_parts, **rollouts)
  for _ in range(steps):
    state, metrics = step(state, verified() if batch is None else batch)
  return state, {name: float(value.mean()) for name, value in metrics.items()}


def assert_same(one, other, rtol=1e-4):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max())


# --- The sampler's forward pass -------------------------------------------------


@pytest.mark.parametrize('method', [
    cfg.Algorithm(), cfg.Algorithm(surrogate=cfg.GSPO(), kl=cfg.KLInLoss(0.1),
                                   entropy_coef=0.1, shaping=cfg.ShortRL())],
                         ids=['plain', 'with all that reads scores'])
def test_going_on_from_the_samplers_forward_pass_is_the_same_step(method):
  run = make_run(method)
  state, optimizer = make_state(run)
  learn = update.make_learner(MODEL, optimizer, run, run.objective.rollouts, method)

  def through(state, batch):
    return learn(state, *batch, fused._share(MODEL, state.params, PROMPTS, cfg.Train(1), method))

  batch = verified(drawn().logp - 0.1)
  (got, got_metrics), (want, want_metrics) = (
      jax.jit(f)(state, batch) for f in (through, lambda state, batch: learn(state, *batch)))
  assert_same(got.opt_state[1].mu, want.opt_state[1].mu)
  assert all(np.abs(mu).max() > 0 for mu in jax.tree.leaves(want.opt_state[1].mu))
  assert got_metrics.keys() == want_metrics.keys()
  for name, value in want_metrics.items():
    np.testing.assert_allclose(got_metrics[name].mean(), value.mean(), rtol=1e-4, atol=1e-6)


def test_the_forward_pass_is_not_shared_where_the_learner_needs_another():
  several = cfg.Algorithm(surrogate=cfg.PPOClip(), epochs=2)
  with_head = cfg.Algorithm(advantage=cfg.GAE())
  for train, method in (
      (cfg.Train(1, accumulation=2), cfg.Algorithm()),
      (cfg.Train(1, group_parts=2), cfg.Algorithm()), (cfg.Train(1), several),
      (cfg.Train(1), with_head)):
    assert fused._share(MODEL, PARAMS, PROMPTS, train, method) is None


# --- What is drawn ---------------------------------------------------------------


def test_a_prompt_that_stands_in_a_batch_again_draws_further_samples():
  """Not the same ones: two groups of equal responses would count one draw twice."""
  run = make_run(cfg.Algorithm())
  sample = jax.jit(make_sampler(MODEL, 1, run.objective.rollouts, stop_ids=(0,)))
  again = lambda x: jnp.concatenate([x[:1], x[:2], x[:1]])
  repeated = dataclasses.replace(PROMPTS, tokens=again(PROMPTS.tokens),
                                 lengths=again(PROMPTS.lengths), ids=again(PROMPTS.ids))
  got = np.asarray(sample(PARAMS, repeated, jnp.int32(0), jnp.int32(0)).tokens)
  np.testing.assert_array_equal(got[[0, 2]], drawn().tokens[:2])  # As if nothing were repeated.
  key = jax.random.fold_in(jax.random.key(1), 0)
  more = jax.jit(functools.partial(
      groups.generate, MODEL, sampler=cfg.Sampler(), num_samples=3 * G, num_tokens=S,
      stop_ids=(0,)))(
          PARAMS, PROMPTS, key=key).tokens[0]
  np.testing.assert_array_equal(got[[0, 1, 3]].reshape(3 * G, S), more)
  assert (got[0] != got[1]).any() and (got[1] != got[3]).any() and (got[0] != got[3]).any()


# --- Methods --------------------------------------------------------------------

PARTS = {'aggregation': cfg.SequenceMeanTokenMean(), 'advantage': cfg.RLOO()}


@functools.cache
def plain_policy_gradient() -> TrainState:
  return learn(cfg.Algorithm(**PARTS))[0]


@pytest.mark.parametrize('surrogate', [cfg.PPOClip(), cfg.CISPO(), cfg.GSPO()],
                         ids=lambda s: type(s).__name__)
def test_with_one_update_a_batch_every_surrogate_is_the_policy_gradient(surrogate):
  """GSPO's gradient agrees only with a mean in each response, because its ratio is that of the
  whole sequence (docs/methods/grpo_and_relatives.md)."""
  other, metrics = learn(cfg.Algorithm(surrogate=surrogate, **PARTS))
  plain = plain_policy_gradient()
  assert metrics['clip_fraction'] == 0
  # Moments are linear in the gradient, and do not divide by it as the update does.
  assert_same(other.opt_state[1].mu, plain.opt_state[1].mu)


def test_what_the_surrogates_do_after_the_first_update_differs():
  results = [learn(cfg.Algorithm(surrogate=s, epochs=4, aggregation=cfg.TokenMean()))
             for s in (cfg.PPOClip(0.01, 0.01), cfg.CISPO(0.01, 0.01))]
  assert all(metrics['clip_fraction'] > 0 for _, metrics in results)
  assert (results[0][0].params['embed'] != results[1][0].params['embed']).any()


def train_batch(method: cfg.Algorithm, batch: Verified, reward=None) -> TrainBatch:
  """What is fixed before the first update of a new state."""
  run = make_run(method)
  reward = batch.verdict.reward if reward is None else reward
  return update._train_batch(MODEL, make_state(run)[0], *batch[:3], reward, batch.reference_logp,
                             run, cfg.Sampler(), method)


ADVANTAGES = (cfg.GRPO(), cfg.DrGRPO(), cfg.RLOO(), cfg.OPO(), cfg.OPOLeaveOneOut(),
              cfg.OPOBatch(), cfg.ReinforcePlusPlus(), cfg.ReinforcePlusPlusBaseline(),
              cfg.GAE(), cfg.OptimalTokenBaseline())


@pytest.mark.parametrize('advantage', ADVANTAGES, ids=lambda a: type(a).__name__)
def test_every_advantage_prefers_what_was_rewarded(advantage):
  """Rows not verified take no part, and what is left sums to about nothing."""
  batch = verified()
  found = train_batch(cfg.Algorithm(advantage=advantage), batch)
  assert found.advantage.shape == (N, G, S)
  counted = np.asarray(found.advantage * batch.mask)
  right, wrong = (counted[np.asarray(batch.verdict.correct * batch.verdict.valid == c)
                          & np.asarray(batch.verdict.valid > 0)] for c in (1, 0))
  assert right.sum() > 0 > wrong.sum()
  assert (found.returns != 0).any() == isinstance(advantage, cfg.GAE)


@pytest.mark.parametrize('advantage', ADVANTAGES, ids=lambda a: type(a).__name__)
def test_equal_rewards_of_any_value_are_exactly_no_advantage(advantage):
  """Not nearly; what is not verified may have earned anything. A new value head says 0."""
  if isinstance(advantage, cfg.GAE):
    advantage = cfg.GAE(lam=1.0)
  method, batch = cfg.Algorithm(advantage=advantage), verified()
  found = jax.jit(lambda value: train_batch(
      method, batch, jnp.where(batch.verdict.valid > 0, value, 9.0)).advantage * batch.mask)
  for value in (0.1, 0.7, -4.21, 1 / 3, 1e4 + 0.3):
    np.testing.assert_array_equal(found(jnp.float32(value)), 0)


def test_equal_rewards_leave_the_policy_alone():
  batch = verified()
  reward = jnp.where(batch.verdict.valid > 0, -4.21, 9.0)
  state, metrics = learn(cfg.Algorithm(advantage=cfg.GRPO()), batch._replace(
      verdict=dataclasses.replace(batch.verdict, reward=reward)))
  assert metrics['zero_advantage_groups'] == 1 and metrics['grad_norm'] == 0
  jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)


@pytest.mark.parametrize('method', [
    cfg.Algorithm(surrogate=cfg.DualClip(), epochs=2),
    cfg.Algorithm(surrogate=cfg.GSPO(), epochs=2),
    cfg.Algorithm(correction=cfg.SequenceTIS(1e30)), cfg.Algorithm(kl=cfg.KLInLoss(0.1, 'k3')),
    cfg.Algorithm(kl=cfg.KLInReward(0.1, 'k3'))],
                         ids=['dual_clip', 'gspo', 'sequence_tis', 'kl_in_loss', 'kl_in_reward'])
def test_an_impossible_token_costs_its_own_gradient_and_is_counted(method):
  """log ratios of ±100 on a token of two responses; infinite ratios made the batch NaN."""
  far = drawn().logp.at[0, 0, 0].add(100.0).at[1, 0, 0].add(-100.0)
  batch = verified(reference_logp=far)
  if method.kl == cfg.NoKL():
    batch = batch._replace(rollouts=dataclasses.replace(batch.rollouts, logp=far))
  state, metrics = learn(method, batch)
  assert metrics['nonfinite'] == 0 and np.isfinite(list(metrics.values())).all()
  assert metrics['bounded_ratios'] > 0
  assert (state.params['embed'] != PARAMS['embed']).any()


def test_kl_in_the_reward_is_taken_from_it():
  batch = verified()
  batch = batch._replace(reference_logp=jnp.where(
      jnp.arange(G)[:, None] == 0, batch.rollouts.logp - 2, batch.rollouts.logp))
  method = cfg.Algorithm(advantage=cfg.DrGRPO(), kl=cfg.KLInReward(0.5))
  advantage = train_batch(method, batch, jnp.zeros_like(batch.verdict.reward)).advantage
  # Sample 0 of each group pays 0.5 · 2 nats for each of its tokens, the others nothing.
  paid = np.zeros((N, G))
  paid[:, 0] = -np.asarray(batch.mask.sum(-1))[:, 0]
  valid = np.asarray(batch.verdict.valid)
  want = (paid - (paid * valid).sum(1, keepdims=True) / valid.sum(1, keepdims=True)) * valid
  np.testing.assert_allclose(advantage[..., 0], want, atol=1e-6)


def test_kl_in_the_loss_pulls_towards_the_reference():
  batch = verified(correct=np.zeros((N, G)))  # No reward: KL alone moves the policy.
  batch = batch._replace(reference_logp=batch.rollouts.logp + 0.5)
  method = cfg.Algorithm(kl=cfg.KLInLoss(1.0, 'k2'))
  state, metrics = learn(method, batch, steps=5)
  assert metrics['zero_advantage_groups'] == 1
  found = scores.response_scores(MODEL, state.params, PROMPTS, batch.rollouts.tokens,
                                 cfg.Sampler())
  before, after = (float((jnp.square(batch.reference_logp - logp) * batch.rollouts.sampled).sum())
                   for logp in (batch.rollouts.logp, found.logp))
  assert after < 0.9 * before


def test_entropy_bonus_raises_entropy():
  batch = verified(correct=np.zeros((N, G)))
  found = scores.response_scores(MODEL, PARAMS, PROMPTS, drawn().tokens, cfg.Sampler())
  first = {'entropy': float((found.entropy * batch.mask).sum() / batch.mask.sum())}
  _, later = learn(cfg.Algorithm(entropy_coef=1.0), batch, steps=5)
  assert later['entropy'] > first['entropy'] + 0.01


def gradients(state):
  """The first step's gradient, from its moments: mu = (1 − b1) · gradient."""
  return jax.tree.map(lambda mu: mu / 0.1, state.opt_state[1].mu)


@pytest.mark.parametrize('part, coef', [('k2', 0.3), ('k3', 2.0), ('entropy', 0.3)])
def test_coefficients_by_the_definition_of_their_term(part, coef):
  """Without a reward the gradient is coef · ∇ mean over tokens of KL, or of −entropy."""
  batch = verified(reference_logp=drawn().logp + 0.4, correct=np.zeros((N, G)))
  mask = batch.mask

  def definition(params):
    found = scores.response_scores(MODEL, params, PROMPTS, batch.rollouts.tokens, cfg.Sampler())
    u = jnp.where(mask > 0, batch.reference_logp - found.logp, 0.0)
    term = {'k2': jnp.square(u) / 2, 'k3': jnp.exp(u) - 1 - u, 'entropy': -found.entropy}[part]
    return coef * (term * mask).sum() / mask.sum()

  chosen = ({'entropy_coef': coef} if part == 'entropy' else {'kl': cfg.KLInLoss(coef, part)})
  state, metrics = learn(cfg.Algorithm(aggregation=cfg.TokenMean(), **chosen), batch)
  value, want = jax.jit(jax.value_and_grad(definition))(PARAMS)
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-4, atol=1e-7)
  for a, b in zip(jax.tree.leaves(gradients(state)), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * max(np.abs(b).max(), 1e-4))


def test_the_value_head_teaches_itself_and_not_the_policy():
  method = cfg.Algorithm(advantage=cfg.GAE())
  zeros, mask = jnp.zeros((N, G, S)), drawn().sampled
  batch = TrainBatch(PROMPTS, drawn().tokens, mask, drawn().logp, zeros, zeros, zeros, zeros + 3,
                     mask)
  head = {'weight': jnp.ones(CONFIG.d_model), 'bias': jnp.ones(())}
  loss = update.make_loss(MODEL, cfg.Sampler(), method)
  policy, own = jax.jit(jax.grad(lambda t: loss(t, batch)[0]))((PARAMS, head))
  for gradient in jax.tree.leaves(policy):
    np.testing.assert_array_equal(gradient, 0)
  assert all(np.abs(gradient).max() > 0 for gradient in jax.tree.leaves(own))


@pytest.mark.parametrize('options, accumulation, group_parts', [
    ({}, 1, 1), ({'epochs': 2, 'minibatches': 2}, 1, 2), *(
        pytest.param(*given, marks=pytest.mark.slow) for given in (
            ({}, 2, 1), ({'epochs': 2, 'minibatches': 2}, 1, 1)))], ids=str)
def test_the_trainers_log_probabilities_come_out_by_token(options, accumulation, group_parts):
  """Those of the first update; of a row that it had no part in, none."""
  method = cfg.Algorithm(surrogate=cfg.PPOClip(), **options)
  run = make_run(method, accumulation, group_parts)
  state, optimizer = make_state(run)
  batch = verified()
  _, metrics = jax.jit(update.make_learner(
      MODEL, optimizer, run, run.objective.rollouts, method, by_token=True))(state, *batch)
  by_token = metrics[policy_update.BY_TOKEN]
  found = jax.jit(functools.partial(scores.response_scores, MODEL, sampler=cfg.Sampler()))(
      PARAMS, PROMPTS, batch.rollouts.tokens)
  mask = np.array(batch.mask)
  mask[1::2] *= 'minibatches' not in options  # Documents 0 and 2 come first.
  np.testing.assert_array_equal(by_token.count, mask)
  np.testing.assert_allclose(by_token.sum * mask, found.logp * mask, atol=1e-4)
  power = np.exp(np.abs(by_token.sum - batch.rollouts.logp)) * mask
  np.testing.assert_allclose(metrics['mismatch'].mean(), power.sum() / mask.sum(), rtol=1e-4)


def test_a_cap_of_one_lowers_and_a_stale_sampler_weighs():
  """A sampler that was twice as sure gets half the weight; one half as sure is capped."""
  batch, found = verified(), []
  for factor, want in ((np.log(2), 0.5), (-np.log(2), 1.0)):
    stale = batch._replace(rollouts=dataclasses.replace(
        batch.rollouts, logp=batch.rollouts.logp + factor))
    state, metrics = learn(cfg.Algorithm(correction=cfg.TokenTIS(1.0)), stale,
                           mode=cfg.OneStepOff())
    found.append(gradients(state))
    np.testing.assert_allclose(metrics['correction'], want, rtol=1e-3)
    np.testing.assert_allclose(metrics['staleness'], 2.0, rtol=1e-3)
    assert 'mismatch' not in metrics
  for half, whole in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(2 * half, whole, atol=1e-4 * np.abs(whole).max())
  assert np.abs(found[1]['embed']).max() > 0


# --- Tokens that the policy did not draw --------------------------------------------


def with_forced_tokens(logp: float) -> RolloutBatch:
  """Responses of unequal lengths whose first token was put there, with what stands in the place
  of its logp; that is all that one of each group has."""
  in_response = drawn().in_response * (jnp.arange(S) < jnp.asarray([3, 2, 1, 3])[:, None])
  sampled = in_response.at[..., 0].set(0)
  return dataclasses.replace(drawn(), in_response=in_response, sampled=sampled,
                             logp=(drawn().logp * sampled).at[..., 0].set(logp))


def test_a_forced_token_is_of_the_response_and_not_learned_from():
  """Its length counts; the gradient is that of the tokens after it, by definition."""
  batch = verified()._replace(rollouts=with_forced_tokens(0.0))
  method = cfg.Algorithm(advantage=cfg.OPO(), aggregation=cfg.TokenMean())
  fixed = train_batch(method, batch)
  in_response = batch.rollouts.in_response
  mask = in_response.at[..., 0].set(0) * batch.verdict.valid[..., None]
  np.testing.assert_array_equal(fixed.loss_mask, mask)
  lengths = np.asarray(in_response.sum(-1))
  np.testing.assert_array_equal(batch.rollouts.lengths(), lengths)
  want = advantages.length_weighted(batch.verdict.reward, lengths, batch.verdict.valid)
  np.testing.assert_allclose(fixed.advantage, np.broadcast_to(want[..., None], mask.shape))
  without = advantages.length_weighted(batch.verdict.reward, mask.sum(-1), batch.verdict.valid)
  assert np.abs(want - without).max() > 0.01  # Its length is in OPO's baseline.

  def definition(params):
    found = scores.response_scores(MODEL, params, PROMPTS, drawn().tokens, cfg.Sampler())
    return -(want[..., None] * found.logp * mask).sum() / mask.sum()

  state, metrics = learn(method, batch)
  valid = np.asarray(batch.verdict.valid)
  assert metrics['response_length'] == pytest.approx((lengths * valid).sum() / valid.sum())
  assert_same(gradients(state), jax.jit(jax.grad(definition))(PARAMS))


@pytest.mark.parametrize('method', [
    cfg.Algorithm(surrogate=cfg.PPOClip(), epochs=2),
    cfg.Algorithm(surrogate=cfg.GSPO(), correction=cfg.SequenceTIS(), kl=cfg.KLInLoss(0.1)),
    cfg.Algorithm(advantage=cfg.ReinforcePlusPlus(), kl=cfg.KLInReward(0.1), entropy_coef=0.1)],
                         ids=['old policy', 'correction', 'kl in reward'])
def test_nothing_reads_the_log_probabilities_of_a_forced_token(method):
  """Neither the sampler's nor the reference policy's."""
  found = []
  for logp in (0.0, -50.0):
    reference = (drawn().logp - 0.1).at[..., 0].set(logp / 2)
    batch = verified(reference)._replace(rollouts=with_forced_tokens(logp))
    found.append(learn(method, batch))
  (one, some_metrics), (other, other_metrics) = found
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert some_metrics == other_metrics and some_metrics['mismatch'] < 1.001
  assert (one.params['embed'] != PARAMS['embed']).any()


# --- Slices and several updates -------------------------------------------------


@pytest.mark.parametrize('aggregation, options, slices', [
    pytest.param(cfg.TokenMean(), {}, {'accumulation': 2}, marks=pytest.mark.slow),
    (cfg.SequenceMeanTokenMean(), {}, {'accumulation': 4, 'group_parts': 2}),
    (cfg.TokenMean(), {'minibatches': 2, 'correction': cfg.TokenTIS(2.0)},
     {'accumulation': 4, 'group_parts': 4})], ids=str)
def test_accumulation_is_exact(aggregation, options, slices):
  """Micro-batches, also of groups in parts, change nothing; nor do they in what is read first."""
  method = cfg.Algorithm(advantage=cfg.GAE(), aggregation=aggregation,
                         surrogate=cfg.GSPO(), entropy_coef=0.1, **options)
  whole, metrics = learn(method)
  sliced, sliced_metrics = learn(method, **slices)
  assert_same(sliced.opt_state[1].mu, whole.opt_state[1].mu)
  assert_same(sliced.method.value.opt_state[0].mu, whole.method.value.opt_state[0].mu)
  for name, value in metrics.items():
    np.testing.assert_allclose(sliced_metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('aggregation, want', [
    (cfg.TokenMean(), 1 / 5), (cfg.SequenceMeanTokenSum(), 1 / 2),
    (cfg.SequenceMeanTokenMean(), [[1 / 2 / 2, 1 / 3 / 2], [0, 0]]),
    (cfg.ConstantDivisor(7), 1 / 28)], ids=lambda a: type(a).__name__)
def test_what_a_token_counts(aggregation, want):
  """Two responses of 2 and 3 tokens, and two without any."""
  mask = jnp.asarray([[[1, 1, 0], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]], jnp.float32)
  got = policy_update.token_weights(aggregation, mask)
  np.testing.assert_allclose(got, np.asarray(want)[..., None] * mask
                             if np.ndim(want) else want * mask, rtol=1e-6)


def test_two_minibatches_twice_are_four_updates():
  ppo = functools.partial(cfg.Algorithm, surrogate=cfg.PPOClip(), advantage=cfg.RLOO())
  state, metrics = learn(ppo(minibatches=2, epochs=2))
  assert int(state.step) == 1 and int(state.opt_state[1].count) == 4
  assert 1 <= metrics['mismatch'] < 1.001  # Of the first update.


def test_the_metrics_of_all_updates_are_added_up():
  method = cfg.Algorithm(surrogate=cfg.PPOClip(), minibatches=2, epochs=2)
  (step, state), batch = make_step(method), verified()
  _, metrics = step(state, batch)
  # Every token of a valid response is learned from in both epochs.
  assert metrics['entropy'].count == 2 * batch.mask.sum()


def test_a_correction_of_several_updates_compares_the_policy_before_them():
  method = cfg.Algorithm(surrogate=cfg.PPOClip(), epochs=3, correction=cfg.TokenTIS(2.0))
  _, metrics = learn(method)
  np.testing.assert_allclose(metrics['correction'], 1.0, rtol=1e-4)  # The sampler was right.


# --- State of the method --------------------------------------------------------


def test_the_value_head_learns_the_reward():
  correct = np.ones((N, G))
  method = cfg.Algorithm(advantage=cfg.GAE(value_lr=0.1), aggregation=cfg.TokenMean())
  _, first = learn(method, verified(correct=correct))
  state, last = learn(method, verified(correct=correct), steps=30)
  assert last['value_loss'] < 0.1 * first['value_loss']
  assert set(state.method.value.params) == {'weight', 'bias'}


def test_short_rls_gate_is_state_and_closes_when_accuracy_falls():
  method = cfg.Algorithm(shaping=cfg.ShortRL(slack_tokens=0, slack_accuracy=0.1))
  step, state = make_step(method)
  good, bad = (verified(correct=np.full((N, G), c)) for c in (1.0, 0.0))
  state, metrics = step(state, good)
  assert float(metrics['gate_open'].mean()) == 1 and float(state.method.gate) == 1
  state, metrics = step(state, bad)
  assert float(metrics['gate_open'].mean()) == 0 and float(state.method.gate) == 1


def test_a_step_that_is_not_finite_leaves_gate_and_head_alone():
  method = cfg.Algorithm(advantage=cfg.GAE(), shaping=cfg.ShortRL())
  step, state = make_step(method)
  batch = verified()
  broken = batch._replace(verdict=dataclasses.replace(
      batch.verdict, reward=batch.verdict.reward * jnp.nan))
  after, metrics = step(state, broken)
  assert float(metrics['nonfinite'].mean()) == 1
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_parts_of_the_reward_are_logged_apart():
  _, metrics = learn(cfg.Algorithm())
  assert metrics['reward/a'] == metrics['reward'] == metrics['accuracy']
  assert metrics['verified'] == 15 / 16


def test_slices_keep_the_prompts_of_a_document_together():
  shared = dataclasses.replace(PROMPTS, tokens=PROMPTS.tokens[:2])
  rows = jnp.broadcast_to(jnp.arange(N, dtype=jnp.float32)[:, None, None], (N, G, S))
  batch = TrainBatch(shared, rows.astype(jnp.int32), *[rows] * 7)
  halves = update._split(batch, 2)
  assert halves.loss_mask[:, :, 0, 0].tolist() == [[0, 1], [2, 3]]
  assert halves.prompts.extras['answer_lengths'].tolist() == [[0, 1], [2, 3]]
  np.testing.assert_array_equal(halves.prompts.tokens, shared.tokens[:, None])
  whole = update._split(dataclasses.replace(batch, prompts=PROMPTS), 2)
  assert whole.loss_mask[:, :, 0, 0].tolist() == [[0, 2], [1, 3]]
  assert whole.prompts.extras['answer_lengths'].tolist() == [[0, 2], [1, 3]]
