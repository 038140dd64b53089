"""bfloat16 against float32: every gradient, and what must stay float32 on the way.

Two kinds of bound. Where an op is given the same bfloat16 inputs as a float64 sum, what it may
lose is float32's rounding of the sum (N terms in any order: √N · 2⁻²⁴ of Σ|terms| with a wide
margin) and, where the result is bfloat16, one rounding of 2⁻⁸. A sum in bfloat16 of N terms of
one sign stops growing at 2⁸ terms, and one of random signs is off by about √N · 2⁻⁹.

Where a whole model in bfloat16 meets one in float32, each of about 14 roundings a layer and
direction moves a value by 2⁻⁸ / √3 at most in the root of the mean square. They are
independent, so over L layers a gradient moves by √(28 L) · 2⁻⁸ / √3: 1.7 % at two layers. The
softmax's gradient is a difference of numbers about twice its size, hence twice that.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import next_token
from jaxrl_pt.models import transformer
from jaxrl_pt.models.logprobs import token_logprobs
from jaxrl_pt.nn import attention, embed
from jaxrl_pt.nn import quant as quantisers
from jaxrl_pt.nn.linear import linear, matmul
from jaxrl_pt.nn.norm import rms_norm
from jaxrl_pt.nn.ops import Ops
from jaxrl_pt.sampling import branch, engine, groups
from jaxrl_pt.sampling.prefill import prefill
from jaxrl_pt.train import losses, policy_update, scores, step, update
from jaxrl_pt.types import Batch, Prompts, TrainBatch, TrainState

LOW = jnp.bfloat16
ROUNDED = 2.0**-8
VOCAB = 32


def draw(*shape, seed=0, dtype=LOW):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def zipf(rows, length, vocab=VOCAB, seed=0):
  """Tokens as text has them: the commonest is a quarter of all."""
  share = 1 / np.arange(1, vocab + 1)
  return jnp.asarray(np.random.default_rng(seed).choice(vocab, (rows, length),
                                                        p=share / share.sum()), jnp.int32)


def exact(x):
  return np.asarray(x.astype(jnp.float32), np.float64)


def assert_summed_in_float32(found, terms, expected, rounded=0.0):
  """|found − expected| within the float32 rounding of a sum of `terms` = Σ|terms|, and, with
  `rounded`, within that share of the result."""
  error = np.abs(exact(found) - expected)
  assert (error <= 2.0**-20 * terms + rounded * np.abs(expected)).all(), (
      error / np.maximum(np.abs(expected), 1e-9)).max()


# --- Ops, from the same bfloat16 inputs ------------------------------------------------


def test_a_common_tokens_embedding_gets_its_whole_gradient():
  tokens, dx = zipf(8, 256), draw(8, 256, 4) + 1
  table = draw(VOCAB, 4, seed=1, dtype=jnp.float32)
  x, pull_back = jax.vjp(lambda table: embed.lookup(table, tokens, LOW), table)
  assert x.dtype == LOW
  np.testing.assert_array_equal(x, table.astype(LOW)[tokens])
  found, = pull_back(dx)
  assert found.dtype == jnp.float32
  expected, terms = np.zeros((2, VOCAB, 4))
  np.add.at(expected, np.asarray(tokens), exact(dx))
  np.add.at(terms, np.asarray(tokens), np.abs(exact(dx)))
  assert_summed_in_float32(found, terms, expected)


@pytest.mark.parametrize('chunk', [0, 1, 16])
@pytest.mark.parametrize('head_type', [LOW, jnp.float32])
def test_the_heads_gradient_is_summed_in_float32_over_all_pieces(chunk, head_type):
  hidden, targets = draw(1, 1024, 8) + 1, zipf(1, 1024)
  head = draw(8, VOCAB, seed=1).astype(head_type)
  found = jax.jit(jax.grad(
      lambda head: token_logprobs(hidden, head, targets, chunk).logp.sum()))(head)
  assert found.dtype == head_type
  logits = exact(hidden[0]) @ exact(head)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  d_logits = np.eye(VOCAB)[np.asarray(targets[0])] - p
  terms = np.abs(exact(hidden[0])).T @ np.abs(d_logits)
  # The logits themselves are float32: 2⁻²⁴ of up to 40, in the exponent.
  assert_summed_in_float32(found, 16 * terms, exact(hidden[0]).T @ d_logits,
                           ROUNDED if head_type == LOW else 0.0)


def test_the_gradient_of_a_weight_is_handed_on_in_float32():
  # What chips, micro-batches and pieces of a loss add up is this.
  x, dy, w = draw(4, 128, 16) + 1, draw(4, 128, 8, seed=1) + 1, draw(16, 8, dtype=jnp.float32)
  for product in (matmul,
                  lambda x, w: linear(x, w, cfg.Quant(), Ops(), ('embed', 'ff'))):
    y, pull_back = jax.vjp(product, x, w)
    dx, dw = pull_back(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (LOW, LOW, jnp.float32)
    rows, d_rows = exact(x).reshape(-1, 16), exact(dy).reshape(-1, 8)
    assert_summed_in_float32(dw, np.abs(rows).T @ np.abs(d_rows), rows.T @ d_rows)


@pytest.mark.parametrize('hadamard', [False, True])
def test_the_gradient_of_a_ternary_weight_is_handed_on_in_float32(hadamard):
  quant = cfg.Quant('ternary', 'int8', hadamard=hadamard)
  x, dy, w = draw(512, 16) + 1, draw(512, 8, seed=1) + 1, draw(16, 8, dtype=jnp.float32)
  _, pull_back = jax.vjp(lambda w: linear(x, w, quant, Ops(), ('embed', 'ff')), w)
  found, = pull_back(dy)
  codes, scale = quantisers.activations(x, 'int8')
  d_rows = exact((dy.astype(jnp.float32) * scale).astype(LOW))
  assert found.dtype == jnp.float32
  assert_summed_in_float32(found, np.abs(exact(codes)).T @ np.abs(d_rows),
                           exact(codes).T @ d_rows)


def test_a_norm_is_rounded_once_and_its_gains_gradient_never():
  x, gain, dy = draw(4096, 16), draw(16, seed=1, dtype=jnp.float32), draw(4096, 16, seed=2) + 1
  y, pull_back = jax.vjp(lambda gain: rms_norm(x, gain, 1e-5), gain)
  normed = exact(x) / np.sqrt((exact(x)**2).mean(-1, keepdims=True) + 1e-5)
  expected = normed * exact(gain)
  assert (np.abs(exact(y) - expected) <= (ROUNDED + 2.0**-16) * np.abs(expected)).all()
  found, = pull_back(dy)
  terms = normed * exact(dy)
  assert_summed_in_float32(found, np.abs(terms).sum(0), terms.sum(0))


def test_blocks_of_queries_add_up_the_gradients_of_shared_keys_in_float32(monkeypatch):
  """256 blocks of one query each, all with gradients of one sign, over the same keys."""
  monkeypatch.setattr(attention, 'QUERIES_AT_ONCE', 1)
  docs, branches, new, heads, groups, width, length = 1, 1, 256, 2, 1, 4, 2
  q, k, v = (draw(docs, branches, new, heads, width), draw(docs, groups, length, width, seed=1),
             draw(docs, groups, length, width, seed=2))
  own = tuple(draw(docs, groups, branches, new, width, seed=s) for s in (3, 4))
  lengths = jnp.full((docs, branches), length)

  def gradients(attend, dtype):
    arrays = [x.astype(dtype) for x in (q, k, v, *own)]
    loss = lambda arrays: attend(*arrays[:3], lengths, *arrays[3:]).astype(jnp.float32).sum()
    return [exact(g) for g in jax.jit(jax.grad(loss))(arrays)]

  whole = attention.branch_attention
  for blocked, once, right in zip(gradients(attention.blocked_branch_attention, LOW),
                                  gradients(whole, LOW), gradients(whole, jnp.float32),
                                  strict=True):
    # One product over all queries rounds its result once; blocks do so too, after their sum.
    assert np.linalg.norm(blocked - right) <= 1.5 * np.linalg.norm(once - right) + (
        ROUNDED * np.linalg.norm(right))


def test_branches_add_up_the_gradient_of_the_token_that_they_start_from():
  hidden, num_branches = draw(1, 3, 4), 1024
  lengths, dy = jnp.full((1, num_branches), 2), draw(1, num_branches, 1, 4, seed=1) + 1
  fed = jnp.zeros((1, 0, 4), LOW)
  _, pull_back = jax.vjp(lambda hidden: branch._before_each(hidden, fed, lengths), hidden)
  found, = pull_back(dy)
  assert found.dtype == LOW
  np.testing.assert_allclose(exact(found)[0, 1], exact(dy).sum((0, 1, 2)), rtol=ROUNDED)


# --- Whole models -----------------------------------------------------------------------


CONFIG = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8,
                   vocab_size=VOCAB, tied_head=False)
ROWS, LENGTH = 16, 128
MOVED = 2 * math.sqrt(28 * CONFIG.num_layers) * ROUNDED / math.sqrt(3)


@functools.cache
def parameters(config):
  specs = transformer.build(config).specs
  return jax.jit(lambda key: P.init(specs, key))(jax.random.key(0))


def assert_near(found, expected, moved=MOVED):
  for (path, low), high in zip(jax.tree_util.tree_leaves_with_path(found),
                               jax.tree.leaves(expected), strict=True):
    name = jax.tree_util.keystr(path)
    assert low.dtype == jnp.float32, name
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    assert np.linalg.norm(low - high) <= moved * np.linalg.norm(high), name


@functools.cache
def pretraining_gradient(config, compute, accumulation):
  """Of the mean loss, from the step itself: plain descent at rate 1 moves by it."""
  model = transformer.build(config, compute)
  optimizer = optax.sgd(1.0)
  train = jax.jit(step.make_train_step(
      model.specs, losses.next_token(model, compute.loss_chunk), optimizer, lambda step: 1.0,
      accumulation))
  tokens = zipf(ROWS, LENGTH)
  rows = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
  batch = Batch(tokens, jnp.roll(tokens, -1, 1), rows, jnp.ones_like(tokens),
                jnp.ones(tokens.shape), jnp.arange(ROWS))
  params = parameters(config)
  state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ())
  new, _ = train(state, batch)
  return jax.tree.map(jnp.subtract, params, new.params)


@pytest.mark.parametrize('tied, chunk, accumulation, remat', [
    (True, 0, 1, 'none'), (False, 8, 4, 'block')])
def test_pretraining(tied, chunk, accumulation, remat):
  config = dataclasses.replace(CONFIG, tied_head=tied)
  low = cfg.Compute('bfloat16', remat, loss_chunk=chunk)
  assert_near(pretraining_gradient(config, low, accumulation),
              pretraining_gradient(config, cfg.Compute(), 1))


# --- Reinforcement learning ---------------------------------------------------------------


DOCS, GROUP, RESPONSE = 2, 16, 24


def learner_gradient(compute, is_shared):
  """Of the policy gradient over GROUP responses to each document, advantages of one sign."""
  model, params = transformer.build(CONFIG, compute), parameters(CONFIG)
  tokens = zipf(DOCS, 16)
  prompts = branch.documents(tokens, jnp.full((DOCS, 1), 16), jnp.arange(DOCS)[:, None])
  shape = (DOCS, GROUP, RESPONSE)
  batch = TrainBatch(
      prompts, zipf(DOCS * GROUP, RESPONSE, seed=1).reshape(shape), jnp.ones(shape),
      *[jnp.full(shape, -3.0)] * 3, jnp.ones(shape), jnp.zeros(shape),
      jnp.full(shape, 1 / (DOCS * GROUP * RESPONSE)))
  loss = update.make_loss(model, cfg.Sampler(), cfg.Algorithm(), compute.loss_chunk)

  @jax.jit
  def gradient(params):
    if not is_shared:
      return jax.grad(loss, has_aux=True)((params, {}), batch)[0][0]
    shared = update.Shared(*jax.vjp(lambda p: prefill(model, p, tokens), params))
    return policy_update.through(loss, (params, {}), batch, shared)[1][0]

  return gradient(params)


@pytest.mark.parametrize('is_shared', [False, True])
def test_the_learner(is_shared, monkeypatch):
  """Branches in many blocks, a head in many pieces, documents computed with them or before."""
  expected = learner_gradient(cfg.Compute(), is_shared)
  monkeypatch.setattr(attention, 'QUERIES_AT_ONCE', 2)
  assert_near(learner_gradient(cfg.Compute('bfloat16', loss_chunk=4), is_shared), expected)


# --- Logits -------------------------------------------------------------------------------

# Logits of up to 12, which in bfloat16 stand 1/16 apart. Without any weights in its layers a
# model's hidden states are its embeddings' norms, whatever cache they went through.
SILENT = {**parameters(CONFIG), 'head': 4 * parameters(CONFIG)['head'],
          'layers': jax.tree.map(jnp.zeros_like, parameters(CONFIG)['layers'])}
MODEL = transformer.build(CONFIG, cfg.Compute('bfloat16'))
PROMPTS = Prompts(zipf(2, 4), jnp.full(2, 4), jnp.arange(2))
DRAWN = dict(num_samples=3, num_tokens=6)


def log_probabilities(tokens):
  """f64[…, V] after each token, from bfloat16 hidden states and head."""
  normed = exact(rms_norm(SILENT['embed'].astype(LOW)[tokens], SILENT['final_norm'], 1e-5))
  logits = normed @ exact(SILENT['head'].astype(LOW))
  assert np.abs(logits).max() > 10
  logits -= logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def of_tokens(tokens_NGS):
  before = jnp.concatenate([jnp.broadcast_to(PROMPTS.tokens[:, None, -1:], (2, 3, 1)),
                            tokens_NGS[..., :-1]], -1)
  after = np.take_along_axis(log_probabilities(before), np.asarray(tokens_NGS)[..., None], -1)
  return after[..., 0]


def dense(params, key):
  return groups.generate(MODEL, params, PROMPTS, key, sampler=cfg.Sampler(), **DRAWN)


def sparse(params, key):
  return groups.generate(MODEL, params, PROMPTS, key, sampler=cfg.Sampler(),
                         sparse=cfg.ReSA(4, 1.0), **DRAWN)


def drafted(params, key):
  slots = cfg.Slots(drafts=cfg.SparseDrafts(2, cfg.ReSA(4, 1.0)))
  return groups.generate(MODEL, params, PROMPTS, key, sampler=cfg.Sampler(), slots=slots, **DRAWN)


@pytest.mark.parametrize('draws', [dense, sparse, drafted])
def test_samplers_and_learner_take_float32_logits(draws):
  rollout = jax.jit(draws)(SILENT, jax.random.key(0))
  expected = of_tokens(rollout.tokens)
  np.testing.assert_allclose(rollout.logp, expected, atol=1e-4)
  found = jax.jit(lambda tokens: scores.response_scores(
      MODEL, SILENT, PROMPTS, tokens, cfg.Sampler(), 4))(rollout.tokens)
  np.testing.assert_allclose(found.logp, expected, atol=1e-4)


def test_the_engine_takes_float32_logits():
  sizes = cfg.Engine(slots=2, queue=4, prompt_len=4, response_len=8, page_size=4,
                     prefill_chunk=4, steps_per_call=6)
  one = engine.Engine(MODEL, SILENT, sizes, seed=0, token_bytes=[b'x'] * VOCAB)
  asked = [engine.Request(tuple(map(int, row)), i, 6, 3, cfg.Sampler(), ())
           for i, row in enumerate(PROMPTS.tokens)]
  done = one.run(asked)
  tokens, logp = (np.array([[getattr(r, name) for r in group] for group in done])
                  for name in ('tokens', 'logp'))
  np.testing.assert_allclose(logp, of_tokens(jnp.asarray(tokens)), atol=1e-4)


def test_the_entropy_of_positions_comes_from_float32_logits():
  tokens = zipf(2, 16)
  rows = jnp.broadcast_to(jnp.arange(16), tokens.shape)
  batch = Batch(tokens, tokens, rows, jnp.ones_like(tokens), jnp.ones(tokens.shape), jnp.arange(2))
  found = jax.jit(functools.partial(next_token.position_entropy, MODEL))(SILENT, batch)
  top = np.sort(log_probabilities(tokens))[..., -16:]
  q = np.exp(top) / np.exp(top).sum(-1, keepdims=True)
  np.testing.assert_allclose(found, -(q * np.log(q)).sum(-1), atol=1e-4)
