"""What is drawn from keys and values of few bits is what their definition gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import kv_cache, transformer
from jaxrl_pt.nn import kv_quant
from jaxrl_pt.sampling import groups
from jaxrl_pt.types import Prompts

CONFIG = cfg.Model(num_layers=2, d_model=32, d_ff=64, num_heads=4, num_kv_heads=2, head_dim=16,
                   vocab_size=19, tied_head=False)
MODEL = transformer.build(CONFIG)
PARAMS = P.init(MODEL.specs, jax.random.key(0))
# The queries and keys of random weights tell tokens hardly apart.
PARAMS['layers']['wq'] *= 4
PARAMS['head'] *= 4
PROMPTS = Prompts(jax.random.randint(jax.random.key(1), (2, 9), 0, 19), jnp.array([9, 5]),
                  jnp.array([3, 4]))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def logp_as_stored(row, prompt_len, num_tokens, kv, whole_prompts=False):
  """f32[S]: log-probabilities of a row's response by one pass over a contiguous cache.

  With `whole_prompts` the tokens of the prompt see one another's keys and values unrounded. What
  follows the response in the row is not read.
  """
  tokens = row[None]
  positions = jnp.arange(tokens.shape[1])[None]

  def attend(q, k, v, cache, layer):
    exact, _ = kv_cache.dense(positions)(q, k, v, cache, layer)
    k, v = (kv_quant.as_stored(x, positions, kv) for x in (k, v))
    out, cache = kv_cache.dense(positions)(q, k, v, cache, layer)
    in_prompt = (positions < prompt_len - 1)[..., None, None] & whole_prompts
    return jnp.where(in_prompt, exact, out), cache

  hidden, _ = MODEL.extend(PARAMS, tokens, positions, MODEL.init_cache(1, tokens.shape[1]), attend)
  logp = jax.nn.log_softmax(hidden[0] @ MODEL.head(PARAMS))
  at = prompt_len - 1 + jnp.arange(num_tokens)
  return logp[at, row[at + 1]]


def generate(**options):
  return jax.jit(functools.partial(groups.generate, MODEL, sampler=cfg.Sampler(), **options))(
      PARAMS, PROMPTS, jax.random.key(5))


@pytest.mark.parametrize('kv, drafts, num_slots', [
    ('int8', cfg.NoDrafts(), 0), ('int4', cfg.NoDrafts(), 0), ('int3', cfg.PromptLookup(2), 0),
    ('int4', cfg.NoDrafts(), 3)])
def test_log_probabilities_are_those_of_the_definition(kv, drafts, num_slots):
  """Prompts in whole and shared pages, slots that are refilled, drafts that go in together."""
  drawn = generate(num_samples=3, num_tokens=12, slots=cfg.Slots(
      slots=num_slots, page_size=4, kv=kv, drafts=drafts))
  exact = []
  for n, length in enumerate(PROMPTS.lengths.tolist()):
    for response, logp in zip(drawn.tokens[n], drawn.logp[n], strict=True):
      row = jnp.zeros(9 + 12, jnp.int32).at[:length].set(PROMPTS.tokens[n, :length])
      row = row.at[length:length + 12].set(response)
      expected = logp_as_stored(row, length, 12, kv, not num_slots)
      np.testing.assert_allclose(logp, expected, atol=2e-4)
      exact.append(np.abs(logp - logp_as_stored(row, length, 12, 'model')).max())
  assert max(exact) > 1e-3  # The rounding is there.


@pytest.mark.parametrize('kv', ['int8', 'int4'])
def test_sparse_attention_that_reads_all_blocks_draws_the_same(kv):
  """Descriptors, the reading of blocks and rectification see keys as they are stored."""
  draw = lambda sparse, drafts: generate(
      num_samples=2, num_tokens=14, sparse=sparse,
      slots=cfg.Slots(page_size=4, kv=kv, drafts=drafts))
  dense = draw(cfg.Dense(), cfg.NoDrafts())
  for other in (draw(cfg.ReSA(4, 1.0, refresh=cfg.RefreshEvery(5)),
                     cfg.NoDrafts()),
                draw(cfg.Dense(), cfg.SparseDrafts(3, cfg.ReSA(4, 0.5, min_blocks=2)))):
    np.testing.assert_array_equal(other.tokens, dense.tokens)
    np.testing.assert_allclose(other.logp, dense.logp, atol=2e-4)


def test_descriptors_are_those_of_the_keys_that_are_read():
  """A key that is written is described as it is read, not as it was before it was rounded."""
  from jaxrl_pt.models import paged_cache
  from jaxrl_pt.sampling import resa_attention
  pool = paged_cache.init(CONFIG, 4, 4, jnp.float32, 'int3')
  cache = resa_attention.SparseCache(pool, jnp.array([[2, 3]]),
                                     resa_attention.descriptors(CONFIG, 1, 2, jnp.float32))
  attend = resa_attention.sparse(MODEL.ops, cfg.ReSA(4, 1.0), jnp.array([0]), jnp.array([True]))
  q, k, v = (jax.random.normal(jax.random.key(i), (1, 1, heads, 16))
             for i, heads in enumerate((4, 2, 2)))
  _, cache = attend(q, k, v, cache, jnp.int32(1))
  again = resa_attention.describe_rows(cache, jnp.array([True]), jnp.array([1]))
  np.testing.assert_allclose(again.bounds[1, :, :, 0], cache.bounds[1, :, :, 0], atol=1e-6)
  assert np.abs(cache.bounds[1, 0, :, 0, :16] - k[0, 0]).max() > 1e-4
