"""Losses over pairs by hand in numpy; packing and micro-batches change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import conversations, pack
from jaxrl_pt.models import transformer
from jaxrl_pt.train import optim, preferences
from jaxrl_pt.train import step as steps
from jaxrl_pt.train.state import ValueHead
from jaxrl_pt.types import TrainState

CONFIG = cfg.Model(num_layers=1, d_model=16, d_ff=24, num_heads=2, num_kv_heads=1, head_dim=8,
                   vocab_size=30)
MODEL = transformer.build(CONFIG)
SEQ_LEN, ROWS = 48, 4


@functools.cache
def params_of(seed: int):
  drawn = P.init(MODEL.specs, jax.random.key(seed))
  return {**drawn, 'embed': drawn['embed'] * 20}


@functools.cache
def drawn():
  """Pairs of (prompt, chosen, rejected) ids, and their rows; the last row has one pair fewer."""
  random = np.random.default_rng(0)
  ids = lambda low, high: random.integers(0, 30, random.integers(low, high)).tolist()
  pairs = [(ids(1, 4), ids(1, 6), ids(1, 6)) for _ in range(3 * ROWS - 1)]
  rows = np.zeros((ROWS, 4, SEQ_LEN), np.int32)
  for row in range(ROWS):
    packer = pack.Packer(SEQ_LEN)
    for prompt, chosen, rejected in pairs[3 * row:3 * row + 3]:
      parts = []
      for completion in (chosen, rejected):
        line = np.asarray([*prompt, *completion, 0])
        learned = (np.arange(len(line)) >= len(prompt)) & (np.arange(len(line)) < len(line) - 1)
        parts.append(conversations.pairs(line, learned))
      assert not list(packer.add(*parts))
    [rows[row]] = packer.flush()
  return pairs, jax.tree.map(jnp.asarray, pack.to_batch(rows, np.arange(ROWS)))


@jax.jit
def _hidden_and_logits(params, tokens):
  """Of a sequence by itself: a causal model does not see the padding after its end."""
  hidden = MODEL.apply(params, tokens, jnp.arange(SEQ_LEN)[None], jnp.ones_like(tokens))
  return hidden[0], (hidden @ MODEL.head(params))[0]


@functools.cache
def alone(seed: int, ids: tuple[int, ...]):
  """(log-probabilities of ids[1:], hidden state of the last), of one sequence by itself."""
  tokens = np.zeros((1, SEQ_LEN), np.int32)  # One length for all, to be compiled once.
  tokens[0, :len(ids)] = ids
  hidden, logits = _hidden_and_logits(params_of(seed), tokens)
  hidden, logits = (np.asarray(x, np.float64)[:len(ids)] for x in (hidden, logits))
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return logp[np.arange(len(ids) - 1), ids[1:]], hidden[-1]


def by_hand(method: cfg.DPO) -> tuple[float, float]:
  """(mean loss, accuracy) of the pairs, each sequence by itself."""
  total, right = [], []
  sigma = lambda x: 1 / (1 + np.exp(-x))
  for prompt, *completions in drawn()[0]:
    ratios = []
    for completion in completions:
      logp, reference = (alone(seed, (*prompt, *completion))[0][-len(completion):].sum()
                         for seed in (0, 1))
      by = len(completion) if method.loss in ('ipo', 'length_normalised') else 1
      ratios.append((logp - reference) / by)
      right.append(logp - reference)
    delta = ratios[0] - ratios[1]
    total.append({
        'sigmoid': lambda d: -np.log(sigma(method.beta * d)),
        'length_normalised': lambda d: -np.log(sigma(method.beta * d)),
        'ipo': lambda d: (d - 0.5 / method.beta)**2,
        'robust': lambda d: (-0.8 * np.log(sigma(method.beta * d))
                             + 0.2 * np.log(sigma(-method.beta * d))) / 0.6,
    }[method.loss](delta))
  return float(np.mean(total)), float(np.mean(np.greater(right[::2], right[1::2])))


def reference_of(batch, segments):
  return preferences.completions(MODEL, 0, segments)(params_of(1), batch)[0]


def step_of(loss, segments: int, accumulation: int, head: bool = False):
  schedule = optim.learning_rate(cfg.ConstantRate(1e-2), 9)
  settings = cfg.AdamW(cfg.ConstantRate(1e-2))
  optimizer = optim.make_optimizer(settings, 9, MODEL.specs)
  specs = {'weight': P.ParamSpec((16,), jnp.float32, ('embed',), P.zeros, 'head'),
           'bias': P.ParamSpec((), jnp.float32, (), P.zeros, 'bias')}
  both = steps.Optimizers(
      optimizer, optim.make_optimizer(settings, 9, specs) if head else None)
  values = {'weight': jnp.linspace(-1.0, 1.0, 16), 'bias': jnp.zeros(())}
  method = ValueHead(values, both.head.init(values)) if both.head else {}
  state = TrainState(jnp.zeros((), jnp.int32), params_of(0), optimizer.init(params_of(0)), method)
  return state, jax.jit(steps.make_measured_step(
      MODEL.specs, loss, lambda pairs: preferences.num_pairs(pairs, segments), both, schedule,
      accumulation))


@pytest.mark.parametrize('method', [
    cfg.DPO('a', beta=0.5), cfg.DPO('a', 'ipo', beta=0.5),
    # TRL computes these two as well (tests/parity/test_trl_supervised.py).
    *(pytest.param(method, marks=pytest.mark.slow) for method in (
        cfg.DPO('a', 'length_normalised', beta=0.5), cfg.DPO('a', 'robust', 0.5, 0.2)))],
    ids=lambda m: m.loss)
def test_dpo_by_hand_and_in_micro_batches(method: cfg.DPO):
  pairs, batch = drawn()
  segments = 8  # More than any row has.
  loss = preferences.dpo(method, MODEL, 7, segments)
  found = []
  for accumulation in (1, 2):
    state, step = step_of(loss, segments, accumulation)
    after, metrics = step(state, preferences.Pairs(batch, reference_of(batch, segments)))
    found.append((after, metrics))
    expected, accuracy = by_hand(method)
    assert float(metrics['loss'].mean()) == pytest.approx(expected, rel=2e-5)
    assert float(metrics['loss'].count) == len(pairs) == 11
    assert float(metrics['accuracy'].mean()) == pytest.approx(accuracy)
    assert float(metrics['margin'].mean()) == pytest.approx(
        float(metrics['chosen_reward'].mean() - metrics['rejected_reward'].mean()), rel=1e-4)
  (first, one), (second, two) = found
  assert float(one['grad_norm'].mean()) == pytest.approx(float(two['grad_norm'].mean()), rel=1e-5)
  for a, b in zip(jax.tree.leaves(first.opt_state), jax.tree.leaves(second.opt_state), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)


def test_the_gradient_is_that_of_the_mean_over_pairs():
  _, batch = drawn()
  method, segments = cfg.DPO('a', beta=0.5), 6
  reference = reference_of(batch, segments)
  loss = preferences.dpo(method, MODEL, 0, segments)
  state, step = step_of(loss, segments, 1)
  _, metrics = step(state, preferences.Pairs(batch, reference))
  mean = lambda params: loss(params, preferences.Pairs(batch, reference))[0] / 11
  gradient = jax.grad(mean)(state.params)
  assert float(metrics['grad_norm'].mean()) == pytest.approx(
      float(optim.global_norm(gradient)), rel=1e-5)


@pytest.mark.parametrize('center', [0.0, 0.1])
def test_reward_model_by_hand_and_in_micro_batches(center: float):
  """The reward is w · h of the last token, here the completion's own, of each sequence alone."""
  pairs, batch = drawn()
  loss = preferences.bradley_terry(cfg.RewardModel('a', center), MODEL, 8)
  state, step = step_of(loss, 8, 1, head=True)
  weight = np.asarray(state.method.params['weight'], np.float64)
  rewards = np.asarray([[alone(0, (*prompt, *completion))[1] @ weight
                         for completion in completions] for prompt, *completions in pairs])
  delta = rewards[:, 0] - rewards[:, 1]
  expected = np.mean(np.log1p(np.exp(-delta)) + center * rewards.sum(1)**2)
  given = preferences.Pairs(batch, jnp.zeros((ROWS, 8)))
  after, metrics = step(state, given)
  assert float(metrics['loss'].mean()) == pytest.approx(expected, rel=2e-5)
  assert float(metrics['accuracy'].mean()) == pytest.approx(np.mean(delta > 0))
  assert float(metrics['margin'].mean()) == pytest.approx(delta.mean(), rel=1e-4)
  assert not np.allclose(after.method.params['weight'], state.method.params['weight'])
  state, parts = step_of(loss, 8, 2, head=True)
  again, others = parts(state, given)
  for name in ('loss', 'grad_norm', 'margin'):
    assert float(others[name].mean()) == pytest.approx(float(metrics[name].mean()), rel=1e-5)
  np.testing.assert_allclose(again.method.opt_state[1].mu['weight'],
                             after.method.opt_state[1].mu['weight'], rtol=1e-4, atol=1e-8)


def test_a_row_of_padding_adds_nothing():
  _, batch = drawn()
  empty = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:1])]), batch)
  empty = dataclasses.replace(empty, ids=jnp.arange(ROWS + 1))
  loss = preferences.dpo(cfg.DPO('a'), MODEL, 0, 6)
  reference = reference_of(batch, 6)
  garbage = jnp.concatenate([reference, jnp.full((1, 6), 1e6)])
  one, two = (loss(params_of(0), preferences.Pairs(*pair))
              for pair in ((batch, reference), (empty, garbage)))
  assert float(one[0]) == pytest.approx(float(two[0]), rel=1e-6)
  for name, value in one[1].items():
    assert float(value.count) == float(two[1][name].count) == 11
    assert float(value.sum) == pytest.approx(float(two[1][name].sum), rel=1e-5, abs=1e-5)
