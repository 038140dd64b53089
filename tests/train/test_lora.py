"""Training with adapters: what has moments, what moves, and what the reference policy is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import adapters, transformer
from jaxrl_pt.parallel import memory
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.train import fused, losses, optim, update
from jaxrl_pt.train import state as states
from jaxrl_pt.train.step import make_train_step
from jaxrl_pt.types import Batch, RolloutBatch, Verdict
from tests.train.test_fused import CONFIG, METHOD, PARAMS, VERIFY, make_prompts, make_run

KL = dataclasses.replace(METHOD, algorithm=cfg.Algorithm(kl=cfg.KLInLoss(0.5)))
QUANT = {'float': cfg.Quant(), 'ternary': cfg.Quant('ternary', 'int8')}
ADAMW = cfg.AdamW(cfg.ConstantRate(0.02))


LORA = cfg.LoRA(2, 4.0)


def build(quant, adapter=LORA):
  return transformer.build(dataclasses.replace(CONFIG, quant=QUANT[quant], adapter=adapter))


@functools.cache
def begun(quant, method=METHOD):
  """(model, run, optimizer, state at step 0)."""
  model = build(quant)
  run = dataclasses.replace(make_run(method, 0.03), model=model.config)
  optimizer = optim.make_optimizer(run.optimizer, run.train.num_steps, model.specs)
  new = lambda params: states.new_method(method.rollouts, method.algorithm, CONFIG.d_model)
  abstract = states.abstract_state(model, optimizer, make_mesh(cfg.Mesh()), new)
  return model, run, optimizer, states.state_of(model, PARAMS, optimizer, abstract, new, seed=4)


def parts(model, state):
  params = state.params
  return P.trained(model.specs, params), P.frozen(model.specs, params)


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('quant', QUANT)
def test_moments_are_kept_for_adapters_alone(quant):
  model, _, optimizer, state = begun(quant)
  moments = state.opt_state[1]
  num = P.count(P.trained(model.specs, model.specs))
  for tree in (moments.mu, moments.nu):
    assert sum(x.size for x in jax.tree.leaves(tree)) == num
    assert jax.tree.structure(tree) == jax.tree.structure(parts(model, state)[0])
  assert num < P.count(build(quant, cfg.NoAdapter()).specs) / 4
  want = adapters.adapt(model.specs, PARAMS, jax.random.key(4))
  assert jax.tree.structure(state.params) == jax.tree.structure(want)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-6), state.params, want)


def test_the_least_memory_of_a_run_counts_the_base_once():
  """Of the adapters it counts the values, both moments and those of the reference policy."""
  run = begun('ternary')[1]
  plain = dataclasses.replace(run, model=dataclasses.replace(
      run.model, adapter=cfg.NoAdapter()))
  sizes = 2 * (2 * 256 + 2 * 128 + 3 * 512)  # of all projections
  num_adapters = P.count(P.trained(begun('ternary')[0].specs, begun('ternary')[0].specs))
  others = 4 * (13 * 16 + 16 + 2 * (16 + 16 + 16 + 32))  # the table of embeddings, gains
  scales = 4 * 2 * 7
  assert memory.least_bytes(run)['Model'] == sizes / 4 + scales + others + 4 * 4 * num_adapters
  assert memory.least_bytes(plain)['Model'] == 4 * (4 * sizes + others)


@pytest.mark.parametrize('quant, accumulation', [
    ('float', 1), ('ternary', 2), pytest.param('float', 2, marks=pytest.mark.slow),
    pytest.param('ternary', 1, marks=pytest.mark.slow)])
def test_a_step_on_text_moves_adapters_alone(quant, accumulation):
  """By the same AdamW as of a tree that holds nothing but the adapters."""
  model = build(quant)
  optimizer = optim.make_optimizer(ADAMW, 9, model.specs)
  state = states.state_of(model, PARAMS, optimizer,
                          states.abstract_state(model, optimizer, make_mesh(cfg.Mesh())))
  tokens = jnp.arange(24).reshape(4, 6) % 13
  ones = jnp.ones_like(tokens)
  batch = Batch(tokens, (tokens * 5 + 1) % 13, jnp.broadcast_to(jnp.arange(6), tokens.shape), ones,
                ones.astype(jnp.float32), jnp.arange(4))
  loss = losses.next_token(model, 0)
  step = jax.jit(make_train_step(model.specs, loss, optimizer, lambda step: 0.02, accumulation))
  before, frozen = parts(model, state)
  new = state
  for _ in range(3):
    new, metrics = step(new, batch)
  after, still = parts(model, new)
  assert_equal(still, frozen)
  assert all((np.asarray(a) != b).any() for a, b in zip(
      jax.tree.leaves(after), jax.tree.leaves(before), strict=True))
  # By hand, with optax alone, on {path: array}.
  plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.02, 0.9, 0.95, 1e-8,
                                                                   weight_decay=0.1))
  flat, treedef = jax.tree.flatten(before)
  opt_state = plain.init(flat)
  gradient = jax.jit(jax.value_and_grad(lambda flat: loss(
      P.joined(state.params, jax.tree.unflatten(treedef, flat)), batch) / 24))
  for _ in range(3):
    value, grads = gradient(flat)
    updates, opt_state = plain.update(grads, opt_state, flat)
    flat = optax.apply_updates(flat, updates)
  np.testing.assert_allclose(metrics['loss'].mean(), value, rtol=1e-4)
  for a, b in zip(jax.tree.leaves(after), flat, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize('quant', [pytest.param('float', marks=pytest.mark.slow), 'ternary'])
def test_the_step_of_one_program_learns_by_its_adapters(quant):
  model, run, optimizer, state = begun(quant)
  step = jax.jit(fused.make_fused_step(model, optimizer, run, METHOD, VERIFY, stop_ids=(0,)))
  reference, frozen = parts(model, state)
  rewards = []
  for _ in range(30):
    state, metrics, *_ = step(state, reference, make_prompts())
    rewards.append(float(metrics['reward'].mean()))
    assert 1 <= float(metrics['mismatch'].mean()) < 1.001
  assert_equal(parts(model, state)[1], frozen)
  assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2


def test_the_reference_policy_is_the_base_without_a_copy_of_it():
  """Its log-probabilities, after updates, are those of a separate copy of the start policy."""
  model, run, optimizer, start = begun('float', KL)
  step = jax.jit(fused.make_fused_step(model, optimizer, run, KL, VERIFY, stop_ids=(0,)))
  reference = parts(model, start)[0]
  state = start
  for _ in range(3):
    state, *_, drawn, _ = step(state, reference, make_prompts())

  def logp(model, params):
    return jax.jit(lambda params: fused.response_logp(
        model, params, make_prompts(), drawn, run, METHOD.rollouts.sampler, KL.algorithm))(params)

  plain = build('float', cfg.NoAdapter())
  got = logp(model, P.joined(state.params, reference))
  mask = drawn.sampled > 0
  np.testing.assert_array_equal(jnp.where(mask, got, 0), jnp.where(mask, logp(plain, PARAMS), 0))
  assert np.abs(jnp.where(mask, got - logp(model, state.params), 0)).max() > 1e-3


@pytest.mark.parametrize('algorithm', [
    cfg.Algorithm(minibatches=2, epochs=2, surrogate=cfg.PPOClip()),
    cfg.Algorithm(advantage=cfg.GAE())],
                         ids=['several updates', 'value head'])
def test_the_learner_of_stages_moves_adapters_alone(algorithm):
  method = dataclasses.replace(METHOD, algorithm=algorithm)
  model, run, optimizer, state = begun('ternary', method)
  r = method.rollouts
  tokens = jax.random.randint(jax.random.key(1), (r.num_prompts, r.group_size, r.response_tokens),
                              1, CONFIG.vocab_size)
  ones = jnp.ones_like(tokens, jnp.float32)
  rollouts = RolloutBatch.of_one_turn(tokens, ones, -np.log(CONFIG.vocab_size) * ones, 0)
  reward = (tokens[..., 0] % 2).astype(jnp.float32)
  verdict = Verdict(reward, jnp.ones_like(reward), reward)
  learn = jax.jit(update.make_learner(model, optimizer, run, method.rollouts, algorithm))
  new, metrics = learn(state, make_prompts(), rollouts, verdict, jnp.zeros_like(rollouts.logp))
  assert float(metrics['nonfinite'].sum) == 0
  before, frozen = parts(model, state)
  after, still = parts(model, new)
  assert_equal(still, frozen)
  # B moves at once, and A with the second update, since its gradient has B as a factor.
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), after, before)['layers']
  assert all(changed[name].b for name in transformer.PROJECTIONS)
  assert all(changed[name].a == (algorithm.updates > 1) for name in transformer.PROJECTIONS)
