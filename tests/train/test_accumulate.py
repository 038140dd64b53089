"""A gradient in slices of the rows is that of all rows at once, whatever must stay together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.train import accumulate

ROWS, GROUPS, WIDTH = 12, 6, 5
PARAMS = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)), jnp.float32)}


def make_batch():
  """Two rows of a group share what the group has; rows weigh differently."""
  rng = np.random.default_rng(1)
  real = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {'x': real(ROWS, WIDTH), 'weight': real(ROWS), 'shared': real(GROUPS, WIDTH)}


def by_row(params, batch):
  """A sum over rows, with what is measured beside it."""
  y = jnp.tanh(batch['x'] @ params['w']).sum(-1)
  return (batch['weight'] * y).sum(), {'count': jnp.asarray(batch['x'].shape[0]), 'y': y.sum()}


def by_group(params, batch):
  """A sum over rows, each of which reads the row of its group."""
  per_group = batch['x'].shape[0] // batch['shared'].shape[0]
  shared = jnp.repeat(batch['shared'], per_group, 0)
  y = jnp.tanh((batch['x'] * shared) @ params['w']).sum(-1)
  return (batch['weight'] * y).sum(), {'count': jnp.asarray(batch['x'].shape[0]), 'y': y.sum()}


def assert_equal_in_slices(loss, batch, num_micro, split):
  value_and_grad = jax.value_and_grad(loss, has_aux=True)
  got = jax.jit(lambda params, batch: accumulate.gradient(
      value_and_grad, params, batch, num_micro, split))(PARAMS, batch)
  want = value_and_grad(PARAMS, batch)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
  assert got[0][1]['count'] == ROWS and np.abs(want[1]['w']).max() > 0.1


@pytest.mark.parametrize('num_micro', [1, 2, 3, 12])
def test_rows_apart(num_micro):
  batch = make_batch()
  del batch['shared']
  assert_equal_in_slices(by_row, batch, num_micro, accumulate.split)


@pytest.mark.parametrize('num_micro', [1, 2, 3, 6])
def test_rows_that_share_an_array_together(num_micro):
  assert_equal_in_slices(by_group, make_batch(), num_micro,
                         functools.partial(accumulate.split, groups=GROUPS))


def test_which_rows_a_part_has():
  """Every device keeps its own rows: a part takes one of each stretch, not a stretch."""
  rows = {'row': jnp.arange(ROWS), 'group': jnp.arange(GROUPS)}
  apart = accumulate.split(rows['row'], 3)
  assert apart.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
  together = accumulate.split(rows, 3, groups=GROUPS)
  assert together['group'].tolist() == [[0, 3], [1, 4], [2, 5]]
  assert together['row'].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_results_of_slices_stand_in_the_order_of_their_rows():
  batch = make_batch()
  of_rows = lambda b: b['x'] * jnp.repeat(b['shared'], b['x'].shape[0] // b['shared'].shape[0], 0)
  for num_micro in (1, 2, 3, 6):
    got = accumulate.mapped(of_rows, batch, num_micro, GROUPS)
    np.testing.assert_array_equal(got, of_rows(batch))
