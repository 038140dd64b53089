"""The filters keep exactly the tokens that their definitions name."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.config import Sampler
from jaxrl_pt.models.logprobs import score
from jaxrl_pt.sampling import policies

LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.05, 0.2], np.float32)) + 3.0


def probabilities(sampler, logits=LOGITS):
  return np.asarray(jax.nn.softmax(policies.filtered_logits(jnp.asarray(logits), sampler)))


def slow(logits, sampler):
  """The definition, token by token."""
  if sampler.temperature == 0:
    p = np.zeros(len(logits))
    p[int(np.argmax(logits))] = 1.0
    return p
  z = np.asarray(logits, np.float64) / sampler.temperature
  p = np.exp(z - z.max())
  kept = sorted(range(len(z)), key=lambda i: -z[i])
  if sampler.top_k:
    kept = kept[:sampler.top_k]
  total, mass, nucleus = sum(p[i] for i in kept), 0.0, []
  for i in kept:
    if mass / total >= sampler.top_p:
      break
    nucleus.append(i)
    mass += p[i]
  out = np.zeros(len(z))
  out[nucleus] = p[nucleus]
  return out / out.sum()


@pytest.mark.parametrize('sampler, expected', [
    (Sampler(), [0.4, 0.05, 0.3, 0.05, 0.2]),
    (Sampler(temperature=0.0), [1, 0, 0, 0, 0]),
    (Sampler(top_k=2), [4 / 7, 0, 3 / 7, 0, 0]),
    (Sampler(top_p=0.65), [4 / 7, 0, 3 / 7, 0, 0]),
    (Sampler(top_p=0.75), [4 / 9, 0, 3 / 9, 0, 2 / 9]),
    (Sampler(top_p=0.01), [1, 0, 0, 0, 0]),
    (Sampler(top_k=3, top_p=0.5), [4 / 7, 0, 3 / 7, 0, 0]),
    (Sampler(top_k=4), [0.4, 0.05, 0.3, 0.05, 0.2]),  # the fourth and fifth tie
    (Sampler(top_k=99), [0.4, 0.05, 0.3, 0.05, 0.2]),
    (Sampler(temperature=0.5), np.square([0.4, 0.05, 0.3, 0.05, 0.2]) / 0.295),
])
def test_hand_computed_distributions(sampler, expected):
  np.testing.assert_allclose(probabilities(sampler), expected, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-400, 400), min_size=8, max_size=8, unique=True),
       st.floats(0.3, 2.0), st.integers(0, 8), st.sampled_from([0.2, 0.5, 0.77, 0.93, 1.0]))
def test_equals_the_slow_definition(values, temperature, top_k, top_p):
  sampler = Sampler(temperature, top_k, top_p)
  logits = np.array(values, np.float32) / 100
  expected = slow(logits, sampler)
  got = probabilities(sampler, logits)
  # A nucleus whose mass meets top_p up to round-off may hold one token more or less.
  if ((expected > 0) == (got > 0)).all():
    np.testing.assert_allclose(got, expected, atol=1e-5)
  else:
    assert abs(min(expected[expected > 0].sum(), 1) - 1) < 1e-5
    scaled = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    assert np.abs(np.cumsum(np.sort(scaled)[::-1]) - top_p).min() < 1e-5


def test_batched_rows_are_independent():
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), jnp.float32)
  sampler = Sampler(0.8, 5, 0.9)
  together = policies.filtered_logits(rows, sampler)
  for row, got in zip(rows, together):
    np.testing.assert_array_equal(policies.filtered_logits(row, sampler), got)


@pytest.mark.parametrize('sampler', [
    Sampler(), Sampler(0.7), Sampler(0.9, 3), Sampler(1.0, 0, 0.6)])
def test_learner_equals_sampler_on_drawn_tokens(sampler):
  logits = jnp.asarray(LOGITS)
  for token in np.flatnonzero(probabilities(sampler) > 0):
    learner = policies.learner_logits(logits, jnp.asarray(token), sampler)
    np.testing.assert_array_equal(learner, policies.filtered_logits(logits, sampler))


def test_learner_keeps_a_token_that_round_off_moved_out():
  learner = policies.learner_logits(jnp.asarray(LOGITS), jnp.asarray(4), Sampler(top_k=2))
  np.testing.assert_allclose(jax.nn.softmax(learner), [4 / 9, 0, 3 / 9, 0, 2 / 9], atol=1e-6)


@pytest.mark.parametrize('sampler', [Sampler(0.0), Sampler(0.7, 2), Sampler(1.0, 0, 0.6)])
def test_scores_and_gradients_of_filtered_logits_are_finite(sampler):
  def total(logits):
    scores = score(policies.learner_logits(logits, jnp.asarray(0), sampler), jnp.asarray(0))
    return scores.logp + scores.entropy

  value, gradient = jax.value_and_grad(total)(jnp.asarray(LOGITS))
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()


# --- Extremes -----------------------------------------------------------------------------

EXTREMES = [
    Sampler(top_p=1e-300), Sampler(top_p=1e-38), Sampler(top_p=5e-324), Sampler(top_p=1e-7),
    Sampler(top_p=1 - 1e-12), Sampler(top_p=1 - 1e-7), Sampler(0.7, top_p=1e-300),
    Sampler(min_p=1e-300), Sampler(min_p=5e-324), Sampler(min_p=1.0), Sampler(min_p=1 - 1e-12),
    Sampler(top_k=1), Sampler(top_k=2**31 - 1),
    Sampler(1e-6), Sampler(1e-6, banned=(0,)), Sampler(1e6), Sampler(1e6, banned=(0, 2)),
    Sampler(3.0, banned=(0,)), Sampler(1e-6, top_p=1e-300),
    Sampler(banned=tuple(range(5))), Sampler(0.0, banned=tuple(range(5))),
    Sampler(50.0, banned=tuple(range(9))), Sampler(top_p=0.5, banned=tuple(range(5))),
    Sampler(top_k=4, banned=(0, 2, 4)), Sampler(min_p=0.9, banned=(0, 2)),
    Sampler(1e-6, 1, 1e-300, 1.0, tuple(range(5))),
    Sampler(banned=(1, 1, 3, 7, 2**31 - 1)),
]
ROWS = np.stack([LOGITS, LOGITS - 20, np.zeros(5, np.float32), LOGITS * 1e4, -LOGITS,
                 np.array([0, -1e4, 3e4, 3e4, -3e4], np.float32)])


@pytest.mark.parametrize('sampler', EXTREMES, ids=str)
def test_at_every_extreme_a_token_is_left_and_all_filters_are_one(sampler):
  """The sampler's filter, the row-wise one of the engine and the learner's, bit for bit."""
  got = jax.jit(lambda x: policies.filtered_logits(x, sampler))(ROWS)
  left = got > policies.MASKED / 2
  assert left.any(-1).all() and np.isfinite(jax.nn.softmax(got, -1)).all()
  rows = policies.RowSamplers.of([sampler] * len(ROWS), 5, 16)
  np.testing.assert_array_equal(got, jax.jit(policies.filtered_rows)(
      ROWS, rows, jnp.ones(5, bool)))
  if len(set(sampler.banned) & set(range(5))) < 5:
    assert not left[:, [token for token in sampler.banned if token < 5]].any()
  else:
    assert (left.sum(-1) == 1).all()
  drawn = policies.draw(keys(len(ROWS)), got)
  assert left[np.arange(len(ROWS)), drawn.token].all()
  seen = score(policies.learner_logits(ROWS, drawn.token, sampler), drawn.token)
  # The learner takes a logit and log Z apart: each is rounded where the logits lie.
  np.testing.assert_allclose(seen.logp, drawn.logp, atol=2e-6 + 2e-7 * np.abs(got[left]).max())


def test_extremes_mean_what_their_limits_mean():
  np.testing.assert_allclose(probabilities(Sampler(top_p=1e-300)), [1, 0, 0, 0, 0])
  np.testing.assert_allclose(probabilities(Sampler(1e-6)), [1, 0, 0, 0, 0])
  np.testing.assert_allclose(probabilities(Sampler(1e6)), [0.2] * 5, atol=1e-5)
  np.testing.assert_allclose(probabilities(Sampler(1e6, banned=(0,))), [0, *[0.25] * 4],
                             atol=1e-5)
  np.testing.assert_allclose(probabilities(Sampler(min_p=1.0)), [1, 0, 0, 0, 0])
  np.testing.assert_allclose(probabilities(Sampler(banned=tuple(range(5)))), [1, 0, 0, 0, 0])


# --- Drawing ------------------------------------------------------------------------------


def keys(num):
  return jax.random.split(jax.random.key(3), num)


@pytest.mark.parametrize('vocab_size', [1, 5, 64, 65, 200])
def test_draws_equal_their_definition(vocab_size):
  """Block by block, in NumPy, from the same noise."""
  width = policies.BLOCK
  z = np.random.default_rng(vocab_size).normal(0, 3, (40, vocab_size)).astype(np.float32)
  num_blocks = -(-vocab_size // width)
  drawn = jax.jit(policies.draw)(keys(40), z)
  for key, row, token, logp in zip(keys(40), z, *drawn, strict=True):
    noise = np.asarray(jax.random.gumbel(key, (width + num_blocks,)), np.float64)
    blocks = [row[i:i + width].astype(np.float64) for i in range(0, vocab_size, width)]
    block = np.argmax([np.log(np.exp(b).sum()) + g
                       for b, g in zip(blocks, noise[width:], strict=True)])
    inside = np.argmax(blocks[block] + noise[:len(blocks[block])])
    assert token == block * width + inside
    np.testing.assert_allclose(logp, row[token] - np.log(np.exp(row.astype(np.float64)).sum()),
                               atol=2e-6)


def test_draws_have_the_softmax_as_their_distribution():
  """Pearson's statistic of 60,000 draws from 150 tokens: its p-value is uniform, and this
  seed's is fixed."""
  z = jnp.asarray(np.random.default_rng(0).normal(0, 1.5, 150), jnp.float32)
  num = 60_000
  tokens = jax.jit(jax.vmap(lambda key: policies.draw(key, z).token))(keys(num))
  expected = np.asarray(jax.nn.softmax(z), np.float64) * num
  common = expected >= 5
  seen = np.bincount(tokens, minlength=150)
  statistic = ((seen - expected)[common] ** 2 / expected[common]).sum()
  freedom = common.sum() - 1
  assert abs(statistic - freedom) < 3.3 * np.sqrt(2 * freedom)
  # The other way round, 1.1 times the temperature is told apart.
  other = np.asarray(jax.nn.softmax(z / 1.1), np.float64) * num
  assert ((seen - other)[common] ** 2 / other[common]).sum() > freedom + 8 * np.sqrt(2 * freedom)


def test_masked_tokens_are_never_drawn_and_padding_changes_no_draw():
  z = np.full((500, 130), policies.MASKED, np.float32)
  z[:, [3, 70, 129]] = [-400.0, -401.0, -399.0]
  drawn = policies.draw(keys(500), z)
  assert set(np.asarray(drawn.token).tolist()) == {3, 70, 129}
  padded = policies.draw(keys(500), np.pad(z, [(0, 0), (0, 500)], constant_values=policies.MASKED))
  np.testing.assert_array_equal(drawn.token, padded.token)
  np.testing.assert_allclose(drawn.logp, padded.logp, atol=1e-6)


def test_draws_keep_leading_shapes():
  z = np.random.default_rng(1).normal(size=(2, 3, 70)).astype(np.float32)
  drawn = policies.draw(keys(6).reshape(2, 3), z)
  flat = policies.draw(keys(6), z.reshape(6, 70))
  np.testing.assert_array_equal(drawn.token, flat.token.reshape(2, 3))
  one = policies.draw(keys(6)[4], z[1, 1])
  assert one.token.shape == () and one.token == flat.token[4]
