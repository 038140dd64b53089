"""Sparse attention and drafts in the engine, beside everything else that a request may ask for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.config import Sampler
from jaxrl_pt.errors import UserError
from jaxrl_pt.sampling import groups
from jaxrl_pt.sampling.engine import Request
from jaxrl_pt.types import Prompts
from tests.sampling.test_engine import MODEL, PARAMS, PROMPTS, SEED, STOP, THINK_END, make
from tests.sampling.test_engine_extras import Alternating

SPARSE = cfg.ReSA(4, 0.1, min_blocks=1, refresh=cfg.RefreshEvery(4))


def asked():
  """Requests that are unlike in everything."""
  return [
      Request(PROMPTS[0], 0, 20, 2, Sampler(), (STOP,), top_logprobs=2),
      Request(PROMPTS[1], 1, 18, 2, Sampler(0.0), (STOP,), stop_strings=('CD', 'A')),
      Request(PROMPTS[2], 2, 17, 1, Sampler(0.7, top_k=5), (), forced=(3, 1, 4, 1)),
      Request(PROMPTS[3], 3, 20, 2, Sampler(0.9, top_p=0.9), (STOP,), max_thought=5, max_answer=6),
      Request(PROMPTS[4], 4, 7, 1, Sampler(), (STOP,), constraint=Alternating()),
      Request((1, 2, 3, 1, 2, 3, 1), 5, 24, 1, Sampler(0.0), ())]


@pytest.mark.parametrize('drafts', [
    cfg.PromptLookup(3, ngram=1),
    pytest.param(cfg.SparseDrafts(2, cfg.ReSA(4, 0.1, min_blocks=1)), marks=pytest.mark.slow)],
    ids=lambda drafts: type(drafts).__name__)
def test_drafts_change_nothing(drafts):
  plain, drafting = make(THINK_END), make(THINK_END, drafts=drafts)
  for expected, found in zip(plain.run(asked()), drafting.run(asked()), strict=True):
    for one, other in zip(expected, found, strict=True):
      np.testing.assert_array_equal(other.tokens, one.tokens)
      np.testing.assert_allclose(other.logp, one.logp, atol=1e-5)
      np.testing.assert_array_equal(other.sampled, one.sampled)
      assert other.finish == one.finish
      if one.top_tokens is not None:
        np.testing.assert_array_equal(other.top_tokens, one.top_tokens)
  counters = drafting.counters()
  assert 0 < counters['agreed'] < counters['drafted']
  assert plain.counters()['drafted'] == 0


def test_a_sparse_engine_draws_what_sparse_rollouts_draw():
  engine = make(sparse=SPARSE)
  requests = [Request(prompt, i, 20, 1, Sampler(), (STOP,)) for i, prompt in enumerate(PROMPTS)]
  again = [Request(prompt, i, 20, 1, Sampler(), (STOP,)) for i, prompt in enumerate(PROMPTS)]
  tokens = np.zeros((len(PROMPTS), 8), np.int32)
  for row, prompt in zip(tokens, PROMPTS):
    row[:len(prompt)] = prompt
  rollout = jax.jit(functools.partial(
      groups.generate, MODEL, sampler=Sampler(), num_samples=1, num_tokens=20, stop_ids=(STOP,),
      sparse=SPARSE))(
          PARAMS, Prompts(jnp.asarray(tokens), jnp.array([len(p) for p in PROMPTS]),
                          jnp.arange(len(PROMPTS))), jax.random.key(SEED))
  # The second time prompts are found in what is kept; responses to them are not kept.
  for responses in (engine.run(requests), engine.run(again)):
    for i, (response,) in enumerate(responses):
      length = int(rollout.lengths()[i, 0])
      np.testing.assert_array_equal(response.tokens, rollout.tokens[i, 0, :length])
      np.testing.assert_allclose(response.logp, rollout.logp[i, 0, :length], atol=1e-5)
  whole = (*PROMPTS[0], *responses[0][0].tokens.tolist())[:8]
  hits = engine.counters()['prefix_hit_tokens']
  engine.run([Request(whole, 9, 4, 1)])
  assert engine.counters()['prefix_hit_tokens'] - hits <= len(PROMPTS[0])


@pytest.mark.parametrize('settings, message', [
    ({'sparse': SPARSE, 'drafts': cfg.PromptLookup()}, '@cfg.NoDrafts'),
    ({'sparse': SPARSE, 'page_size': 16}, 'a block is a page'),
    ({'drafts': cfg.SparseDrafts()}, 'a block is a page')])
def test_what_does_not_go_together_is_refused(settings, message):
  with pytest.raises(UserError, match=message):
    cfg.Engine(**{'page_size': 4, **settings})
