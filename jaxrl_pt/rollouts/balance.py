"""Groups balanced over the data shards by how long their responses are expected to be.

A shard that has drawn all of its responses waits for the slowest one. A prompt's responses are
expected to be as long as they were on the average of the times before, the newest counting half;
a prompt that was never drawn counts as the mean of the others. Each shard gets as many groups as
any other, so that what varies is their length alone.

The order changes which shard draws a group and not what is drawn, since noise is addressed by the
prompt. What is expected is in the checkpoint: a resumed run draws in the same order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.types import Array, RolloutBatch, Weighted

MAX_PROMPTS = 2**16  # prompts whose lengths are remembered; the oldest are forgotten


def is_balanced(method: cfg.Reinforced, mesh: Mesh) -> bool:
  """Whether a run lays its groups over the data shards by their length.

  Prompts that share a document stay together, and responses under way stay where they are. Episodes
  of several turns are laid out by `multi_turn.Player`.
  """
  several_turns = isinstance(method, cfg.RL) and isinstance(method.verifier, cfg.Interactive)
  return (rules.num_shards(mesh) > 1 and method.positions_per_document == 1 and not several_turns
          and not isinstance(method.rollouts.mode, cfg.InFlight))


def balanced(expected_N: np.ndarray, num_shards: int) -> np.ndarray:
  """i32[N]: the groups in an order in which equal stretches of it take about equally long.

  The longest group that is left goes to the shard with the least work that still has room, and so
  each shard begins with its longest groups.

  Args:
    expected_N: f[N] the work of each group.
    num_shards: the number of stretches, which divides N.
  """
  room = len(expected_N) // num_shards
  shards: list[list[int]] = [[] for _ in range(num_shards)]
  work = np.zeros(num_shards)
  for group in np.argsort(-expected_N, kind='stable').tolist():
    shard = int(np.argmin(np.where([len(s) < room for s in shards], work, np.inf)))
    shards[shard].append(group)
    work[shard] += expected_N[group]
  return np.asarray(sum(shards, []), np.int32)


@jax.jit
def _lengths(rollouts: RolloutBatch) -> Array:
  return rollouts.lengths().mean(-1)


class Balance:
  """What a run knows of its prompts' lengths. Final."""

  def __init__(self, num_shards: int, num_prompts: int) -> None:
    """Knows nothing yet.

    Args:
      num_shards: the number of data shards, each of which draws an equal part of a batch.
      num_prompts: N, the prompts of a batch.
    """
    self._num_shards, self._unknown = num_shards, np.arange(num_prompts, dtype=np.int32)
    self._lengths: dict[int, float] = {}
    # Batches that have been drawn and not been looked at yet, which would wait for the sampler.
    self._drawn: list[tuple[np.ndarray, Array]] = []

  def order(self, ids_N: np.ndarray) -> np.ndarray:
    """i32[N]: the order in which the sampler lays a batch's groups over the shards."""
    self._look()
    known = [self._lengths[i] for i in ids_N.tolist() if i in self._lengths]
    if not known:
      return self._unknown
    usual = float(np.mean(known))
    return balanced(np.asarray([self._lengths.get(i, usual) for i in ids_N.tolist()]),
                    self._num_shards)

  def note(self, ids_N: np.ndarray, rollouts: RolloutBatch) -> None:
    """Remembers how long the responses of a batch are."""
    self._drawn.append((ids_N, _lengths(rollouts)))

  def imbalance(self, order_N: np.ndarray, rollouts: RolloutBatch) -> Weighted:
    """The response tokens of the shard that has the most, over those of the mean shard."""
    return Weighted.single(_imbalance(jnp.asarray(order_N), rollouts, self._num_shards))

  def saved(self) -> list[tuple[int, float]]:
    """(prompt id, expected length) of every prompt, for a checkpoint."""
    self._look()
    return list(self._lengths.items())

  def resume(self, saved: Any) -> None:
    """Goes on from what `saved` gave."""
    self._drawn, self._lengths = [], {int(i): float(length) for i, length in saved}

  def _look(self) -> None:
    for ids, lengths in self._drawn:
      for i, length in zip(ids.tolist(), on_host(lengths).tolist(), strict=True):
        old = self._lengths.pop(i, length)  # What is newest stands at the end.
        self._lengths[i] = (old + length) / 2
    self._drawn = []
    for i in list(self._lengths)[:max(0, len(self._lengths) - MAX_PROMPTS)]:
      del self._lengths[i]


@functools.partial(jax.jit, static_argnums=2)
def _imbalance(order_N: Array, rollouts: RolloutBatch, num_shards: int) -> Array:
  of_shards = rollouts.lengths().sum(-1)[order_N].reshape(num_shards, -1).sum(-1)
  return of_shards.max() / jnp.maximum(of_shards.mean(), 1.0)
