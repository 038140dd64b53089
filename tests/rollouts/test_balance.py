"""Groups are laid over shards by their expected length, and what is known survives a checkpoint."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.rollouts import balance
from jaxrl_pt.types import RolloutBatch


def rollouts(lengths):
  """One response of each length."""
  longest = max(lengths)
  there = (jnp.arange(longest) < jnp.asarray(lengths)[:, None]).astype(jnp.float32)[:, None]
  return RolloutBatch.of_one_turn(jnp.zeros(there.shape, jnp.int32), there, jnp.zeros(there.shape),
                                  0)


@pytest.mark.parametrize('num_shards', [1, 2, 4, 8])
def test_stretches_take_about_equally_long(num_shards):
  rng = np.random.default_rng(0)
  work = rng.lognormal(4, 1, 32)
  order = balance.balanced(work, num_shards)
  assert sorted(order.tolist()) == list(range(32))
  shards = work[order].reshape(num_shards, -1)
  assert (np.diff(shards) <= 0).all()  # Each begins with its longest groups.
  in_order = work.reshape(num_shards, -1).sum(1)
  # No order gets below the longest group alone.
  least = max(work.max(), work.sum() / num_shards)
  assert shards.sum(1).max() <= min(1.2 * least, in_order.max() + 1e-9)


def test_the_newest_length_counts_half_and_the_unknown_are_usual():
  known = balance.Balance(2, 4)
  ids = np.array([7, 8, 9, -3])
  np.testing.assert_array_equal(known.order(ids), [0, 1, 2, 3])
  known.note(ids[:3], rollouts([8, 2, 5]))
  known.note(ids[:1], rollouts([4]))
  assert dict(known.saved()) == {7: 6.0, 8: 2.0, 9: 5.0}
  # Longest first: 7 (6) | 9 (5) and the unknown (13 / 3), then 8 (2) where there is room.
  assert known.order(ids).tolist() == [0, 1, 2, 3]
  assert known.order(np.array([8, 7, -3, 9])).tolist() == [1, 0, 3, 2]


def test_a_checkpoint_knows_as_much():
  one, other = (balance.Balance(2, 4) for _ in range(2))
  ids = np.array([1, 2, 3, 4])
  one.note(ids, rollouts([9, 1, 4, 4]))
  other.resume(json.loads(json.dumps(one.saved())))
  assert other.saved() == [tuple(x) for x in one.saved()]
  np.testing.assert_array_equal(other.order(ids), one.order(ids))


def test_the_oldest_are_forgotten(monkeypatch):
  monkeypatch.setattr(balance, 'MAX_PROMPTS', 2)
  known = balance.Balance(2, 2)
  for ids in ([1, 2], [1, 3]):
    known.note(np.array(ids), rollouts([4, 4]))
  assert [i for i, _ in known.saved()] == [1, 3]


def test_the_imbalance_is_that_of_the_shards():
  known = balance.Balance(2, 4)
  drawn = rollouts([8, 8, 2, 2])
  for order, want in (([0, 1, 2, 3], 16 / 10), ([0, 2, 1, 3], 1.0)):
    assert float(known.imbalance(np.array(order), drawn).mean()) == pytest.approx(want)
