"""Branch rollouts and the tree forward against independent prompts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.config import Sampler
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling import branch, groups
from jaxrl_pt.sampling.prefill import prefill
from jaxrl_pt.types import Prompts

VOCAB, STOP, T = 19, 12, 10
KEY = jax.random.key(7)
LENGTHS = np.array([[1, 4, 9], [10, 2, 7]], np.int32)
IDS = np.array([[5, 6, 7], [20, 21, -3]], np.int32)


@functools.lru_cache
def make(weights='none', activations='none'):
  config = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=8,
                     vocab_size=VOCAB, activation='relu2', sub_norm=True,
                     quant=cfg.Quant(weights, activations))
  model = transformer.build(config)
  params = P.init(model.specs, jax.random.key(0))
  return model, {**params, 'embed': params['embed'] * 25}


DOCUMENTS = np.asarray(jax.random.randint(jax.random.key(3), (2, T), 0, VOCAB))


def branches(suffix):
  return branch.documents(jnp.asarray(DOCUMENTS), jnp.asarray(LENGTHS), jnp.asarray(IDS),
                          jnp.array([suffix] * 2, jnp.int32))


def independent(suffix):
  """The same as one right-padded prompt per position."""
  width = T + len(suffix)
  tokens, lengths = np.zeros((6, width), np.int32), LENGTHS.ravel() + len(suffix)
  for row, (n, length) in zip(tokens, [(d, t) for d in range(2) for t in LENGTHS[d]]):
    row[:length] = DOCUMENTS[n, :length]
    row[length:length + len(suffix)] = suffix
  return Prompts(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(IDS.ravel()))


FAST = ('plain', 0), ('plain', 3), ('filtered', 3)  # Greedy draws are a case of the filtered.


@pytest.mark.parametrize('suffix, sampler', [
    pytest.param(suffix, sampler, id=f'{name}-{len(suffix)}',
                 marks=() if (name, len(suffix)) in FAST else pytest.mark.slow)
    for suffix in ((), (4,), (8, 1, 2))
    for name, sampler in (('plain', Sampler()), ('greedy', Sampler(0.0)),
                          ('filtered', Sampler(0.8, top_p=0.9)))])
def test_equals_independent_prompts(suffix, sampler):
  model, params = make()
  asked = dict(sampler=sampler, num_samples=3, num_tokens=7, stop_ids=(STOP,))
  run = jax.jit(functools.partial(groups.generate, model, **asked))
  together = run(params, branches(suffix), KEY)
  apart = jax.jit(functools.partial(groups.generate, model, **asked))(
      params, independent(suffix), KEY)
  np.testing.assert_array_equal(together.tokens, apart.tokens)
  np.testing.assert_array_equal(together.in_response, apart.in_response)
  np.testing.assert_array_equal(together.sampled, together.in_response)
  np.testing.assert_allclose(together.logp, apart.logp, atol=2e-5)


def packed(model, params, own):
  hidden = branch.tree_hidden(model, params, jnp.asarray(DOCUMENTS), jnp.asarray(LENGTHS), own)
  return jax.nn.log_softmax(hidden @ model.head(params))


def in_two(model, params, own):
  """The documents first, as a sampler prefills them; the branches go on from there."""
  prefilled = prefill(model, params, jnp.asarray(DOCUMENTS))
  hidden = branch.own_hidden(model, params, prefilled, jnp.asarray(LENGTHS), own)
  return jax.nn.log_softmax(hidden @ model.head(params))


def one_by_one(model, params, own):
  """Each branch's whole sequence in a row of its own, which causality keeps from the padding."""
  num_own = own.shape[-1]
  rows = jnp.zeros((2, 3, T + num_own - 1), jnp.int32)
  for (n, r), length in np.ndenumerate(LENGTHS):
    rows = rows.at[n, r, :length].set(DOCUMENTS[n, :length])
    rows = rows.at[n, r, length:length + num_own - 1].set(own[n, r, :-1])
  rows = rows.reshape(6, -1)
  positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
  hidden = model.apply(params, rows, positions, jnp.ones_like(rows))
  at = LENGTHS.reshape(6, 1, 1) - 1 + np.arange(num_own)[:, None]
  hidden = jnp.take_along_axis(hidden, at, 1)
  return jax.nn.log_softmax(hidden @ model.head(params)).reshape(2, 3, num_own, VOCAB)


@pytest.mark.parametrize('num_own, scored', [
    (1, packed), (4, in_two), pytest.param(1, in_two, marks=pytest.mark.slow),
    pytest.param(4, packed, marks=pytest.mark.slow)])
def test_branches_equal_whole_sequences_in_value_and_gradient(num_own, scored):
  model, params = make()
  own = jax.random.randint(jax.random.key(1), (2, 3, num_own), 0, VOCAB)
  weights = jax.random.normal(jax.random.key(2), (2, 3, num_own, VOCAB))
  results = []
  for scores in (scored, one_by_one):
    loss = lambda p, scores=scores: (scores(model, p, own) * weights).sum()
    results.append(jax.jit(jax.value_and_grad(loss))(params))
  (value, grads), (expected, expected_grads) = results
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads)):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-7)


@pytest.mark.parametrize('activations', ['int8', 'int4'])
def test_the_sampler_agrees_with_the_tree_forward(activations):
  """Teacher-forced: the learner's log-probabilities of what the sampler drew."""
  model, params = make('ternary', activations)
  rollout = jax.jit(functools.partial(
      groups.generate, model, sampler=Sampler(), num_samples=2, num_tokens=6))(
          params, branches((4, 9)), KEY)
  hidden = jax.jit(functools.partial(branch.response_hidden, model))(
      params, branches((4, 9)), rollout.tokens)
  logp = jnp.take_along_axis(jax.nn.log_softmax(hidden @ model.head(params)),
                             rollout.tokens[..., None], -1)[..., 0]
  mismatch = jnp.exp(jnp.abs(logp - rollout.logp)).mean()
  assert float(mismatch) <= 1.01


def test_a_document_is_prefilled_once():
  """FLOPs of the compiled prefill: 16 positions of 64 tokens against 16 prompts."""
  model, params = make()
  document = jnp.zeros((1, 64), jnp.int32)
  lengths = jnp.arange(49, 65)[None]
  asked = dict(sampler=Sampler(), num_samples=1, num_tokens=1)
  flops = lambda f, *args: jax.jit(f).lower(params, *args, KEY).compile().cost_analysis()['flops']
  shared = flops(functools.partial(groups.generate, model, **asked), branch.documents(
      document, lengths, lengths))
  prompts = Prompts(jnp.zeros((16, 64), jnp.int32), lengths[0], lengths[0])
  apart = flops(functools.partial(groups.generate, model, **asked), prompts)
  assert apart > 10 * shared
