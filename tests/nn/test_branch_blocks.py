"""Branch attention in blocks of queries against the whole, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.nn import attention
from jaxrl_pt.tpu import roofline


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


def test_no_mask_of_the_scores_is_kept_for_the_backward_pass():
  docs, branches, new, heads, groups, width, length = 1, 3, 512, 4, 2, 8, 16
  shapes = ((docs, branches, new, heads, width), *[(docs, groups, length, width)] * 2,
            *[(docs, groups, branches, new, width)] * 2)
  lengths = jnp.full((docs, branches), length)

  def loss(q, k, v, *own):
    return attention.blocked_branch_attention(q, k, v, lengths, *own).sum()

  traced = jax.make_jaxpr(jax.grad(loss, argnums=range(5)))(*map(jnp.zeros, shapes))
  loops = [v.aval for eqn in equations(traced.jaxpr) if eqn.primitive.name == 'scan'
           for v in eqn.outvars]
  assert max(x.size for x in loops) == branches * new * heads * width
  assert not [x for x in loops if x.dtype == bool]


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in roofline.inner(eqn):
      yield from equations(inner)
