"""Episodes of a game as data: each is a function of (seed, index), so that no file holds them.

The same function makes them on a host for the loader, or inside a program on the device. Validation
episodes have keys of their own, so that no world is in both splits.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
from typing import Any, NamedTuple

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.data import loader
from jaxrl_pt.game import base, edits, noise
from jaxrl_pt.game.games import open_game

# It goes into the digest of a source: a number to raise whenever the same seed gives other frames.
_RULES = 2
OF_WORLD, _OF_POLICY, _OF_TURNS = range(3)


@struct.dataclass
class Trajectory:
  """T frames of an episode, or of B of them with a leading axis; ready for a model to learn."""

  frames: Array  # u8[T, H, W, 3]
  actions: Array  # i32[T] the action that led to each frame; `Game.stay` before the first one
  truth: base.Truth  # of each frame


def episode(game: base.Game, policies: Sequence[str], num_frames: int, key: Array) -> Trajectory:
  """Plays an episode; where there are several policies, the key says which of them plays it.

  Args:
    game: the game.
    policies: names of `game.policies`.
    num_frames: T.
    key: u32[2] the episode's key (`noise`).
  """
  players = [game.policies[name] for name in policies]
  chosen = noise.whole(noise.fold(key, _OF_POLICY), 0, len(players) - 1)
  of_turns = noise.fold(key, _OF_TURNS)

  def choose(state: Any, last: Array, frame: Array) -> Array:
    turn = base.Turn(noise.fold(of_turns, frame), last, frame, num_frames)
    # All are asked: they cost nothing beside a frame, and a batch would ask them all anyway.
    return jnp.stack([player(state, turn) for player in players])[chosen].astype(jnp.int32)

  return _play(game, game.init(noise.fold(key, OF_WORLD)), choose, num_frames)


def replay(game: base.Game, key: Array, actions: Sequence[int] | np.ndarray) -> Trajectory:
  """Plays given actions in the world of `episode` with the same key.

  Args:
    game: the game.
    key: u32[2].
    actions: i32[T − 1], those after the first frame.

  Raises:
    UserError: an action outside the game.
  """
  # Nobody sees what the step after the last frame does.
  taken = jnp.asarray([*edits.check_actions(game, actions).tolist(), game.stay], jnp.int32)
  return _play(game, game.init(noise.fold(key, OF_WORLD)),
               lambda state, last, frame: taken[frame], len(taken))


def _play(game: base.Game, state: Any, choose: Callable[[Any, Array, Array], Array],
          num_frames: int) -> Trajectory:
  def turn(carry: tuple[Any, Array], frame: Array) -> tuple[tuple[Any, Array], Any]:
    state, last = carry
    action = choose(state, last, frame)
    # The step after the last frame is thrown away, which costs less than compiling `truth` twice.
    return (game.step(state, action), action), (last, game.truth(state))

  first = state, jnp.asarray(game.stay, jnp.int32)
  _, (actions, truth) = jax.lax.scan(turn, first, jnp.arange(num_frames))
  return Trajectory(jax.vmap(lambda t: base.render(game, t))(truth), actions, truth)


class Source(NamedTuple):
  """The episodes of some settings, which the loader reads by index like a file of examples."""

  config: cfg.Trajectories
  is_validation: bool = False

  @property
  def num_examples(self) -> int:
    return self.config.size

  @property
  def digest(self) -> str:
    """What decides every frame, as a hash; a run is resumed only with the same."""
    # How many episodes there are is no part of what each of them is.
    said = repr((_RULES, dataclasses.replace(self.config, size=1), self.is_validation))
    return hashlib.sha256(said.encode()).hexdigest()

  def batch(self, ids_B: np.ndarray | Sequence[int]) -> Trajectory:
    """The episodes `ids_B` as numpy arrays [B, T, ...], computed on a CPU of this process.

    Raises:
      IndexError: an id outside of 0 … size − 1.
    """
    ids_B = np.asarray(ids_B, np.int64)
    if ids_B.size and not (0 <= ids_B.min() and ids_B.max() < self.num_examples):
      raise IndexError(f'episode ids {ids_B} outside 0 … {self.num_examples - 1}')
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
      found = _compiled(self)(ids_B.astype(np.uint32))
    trajectories: Trajectory = jax.tree.map(np.asarray, found)
    return trajectories


def key_of(source: Source, index: Array | int) -> Array:
  """u32[2]: the key of an episode."""
  split = noise.fold(noise.key(source.config.seed), int(source.is_validation))
  return noise.fold(split, index)


def world_of(source: Source, index: Array | int) -> Array:
  """u32[2]: the key of the world in which an episode is played, with which its game begins."""
  return noise.fold(key_of(source, index), OF_WORLD)


def generate(source: Source, ids_B: Array) -> Trajectory:
  """The episodes u32[B] `ids_B`, as part of whatever program calls this."""
  config = source.config
  game = open_game(config.game)
  return jax.vmap(lambda index: episode(
      game, config.policies, config.num_frames, key_of(source, index)))(ids_B)


@functools.lru_cache(maxsize=8)
def _compiled(source: Source) -> Callable[[np.ndarray], Trajectory]:
  return jax.jit(functools.partial(generate, source))


def train_iterator(source: Any, *, seed: int, batch_size: int, rows: np.ndarray | None = None
                   ) -> loader.TrainIterator[tuple[np.ndarray, Trajectory]]:
  """Yields this host's rows of the batch of trajectories of each step, with its ids, without end.

  What it yields is (i64[B] the ids of the whole batch, the trajectories of this host's rows).

  Args:
    source: a `Source`, or a `records.Recorded` of the same episodes.
    seed: decides the order, which is a permutation drawn anew each epoch.
    batch_size: B, the rows over all hosts.
    rows: which of the B rows this host reads; None reads all.

  Raises:
    UserError: fewer than B episodes.
  """
  mine = np.arange(batch_size) if rows is None else rows
  def load(ids_B: np.ndarray) -> tuple[np.ndarray, Trajectory]:
    return np.asarray(ids_B), source.batch(np.asarray(ids_B)[mine])

  return loader.shuffled(source, load, seed=seed, batch_size=batch_size)


def world_iterator(source: Source, *, seed: int, batch_size: int
                   ) -> loader.TrainIterator[np.ndarray]:
  """Yields i64[B] the ids of each step's episodes alone, in the order of `train_iterator`.

  Whoever plays in their worlds has the worlds' keys from `world_of`.

  Raises:
    UserError: fewer than B episodes.
  """
  return loader.shuffled(source, np.asarray, seed=seed, batch_size=batch_size)
