"""Branch attention in blocks of queries against the whole, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.nn import attention


@pytest.mark.parametrize('num_new', [5, 8, 3, 37])
def test_blocks_equal_the_whole(num_new, monkeypatch):
  monkeypatch.setattr(attention, 'QUERIES_AT_ONCE', 4)
  monkeypatch.setattr(attention, 'MIN_RANGE', 2)
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  docs, branches, heads, groups, width, length = 2, 3, 4, 2, 8, 6
  arrays = (draw(docs, branches, num_new, heads, width), draw(docs, groups, length, width),
            draw(docs, groups, length, width), draw(docs, groups, branches, num_new, width),
            draw(docs, groups, branches, num_new, width))
  lengths = jnp.asarray(rng.integers(1, length + 1, (docs, branches)))
  target = draw(docs, branches, num_new, heads, width)

  def loss(attend, arrays):
    q, k_prefix, v_prefix, k_own, v_own = arrays
    return (attend(q, k_prefix, v_prefix, lengths, k_own, v_own) * target).sum()

  whole = attention.branch_attention
  (got, got_grads), (want, want_grads) = (
      jax.jit(jax.value_and_grad(functools.partial(loss, attend)))(arrays)
      for attend in (attention.blocked_branch_attention, whole))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(got_grads, want_grads, strict=True):
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
