"""Rollouts of an evaluation inside a model of a game: their inputs, their edits, and going on.

A rollout is played in segments. Somebody may change a ledger or paint a cell between two of them,
and after each of them the games and all that was read of them can be saved, so that an evaluation
of long rollouts that is interrupted goes on and ends with the same numbers, bit for bit.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import checkpoint
from jaxrl_pt import config as cfg
from jaxrl_pt.game import base, dream, history, maps, measures, trajectories

KEPT = 4  # games of a batch whose frames are kept for pictures
_OF_DREAM = 3  # A game's key in the dream; 0 to 2 are those of the simulator (`trajectories`).


class Rollouts(NamedTuple):
  """What is played, by which model.

  world: the game, its model and its map.
  params_of: keys u32[B, 2] of the simulator's games → the model's parameters.
  source: the episodes that give first frames and actions.
  settings: the evaluation.
  """

  world: dream.World
  params_of: Callable[[Array], Any]
  source: trajectories.Source
  settings: cfg.GameEvaluation


@struct.dataclass
class Progress:
  """B games up to some frame; all that is saved."""

  carry: measures.Carry
  played: measures.Played  # of the frames up to now
  frames: Array  # u8[K, t, H, W, 3] of some games, without the first frame


class Painted(NamedTuple):
  """What somebody has painted: a cell i32[B, 2] of each game, and with what, i32[B]."""

  cells: np.ndarray
  contents: np.ndarray


class Batch(NamedTuple):
  """B games that have been played to their ends."""

  progress: Progress
  episodes: trajectories.Trajectory  # the simulator's games with the same actions
  painted: Painted | None


def ends(settings: cfg.GameEvaluation) -> list[int]:
  """The frames after which a segment ends: at edits, where rollouts are saved, and the last one."""
  last = settings.trajectories.num_frames - 1
  every = settings.checkpoint_every or last
  found = {*range(every, last, every), last}
  if not isinstance(settings.edit, cfg.NoEdit):
    found.add(settings.edit.frame)
  return sorted(found)


class Player:
  """Plays batches of rollouts by programs that are compiled once. Final."""

  def __init__(self, rollouts: Rollouts) -> None:
    self._rollouts = rollouts
    self._begin = jax.jit(functools.partial(measures.begin, rollouts.world))
    self._record = jax.jit(functools.partial(measures.record, rollouts.world),
                           static_argnames='num_kept')
    self._on = dream.switches(rollouts.settings.modules, rollouts.settings.shuffled_map)

  def play(self, ids: Sequence[int], saved: Path | None) -> Batch:
    """Plays the episodes `ids`.

    Args:
      ids: of the source; B of them.
      saved: where the rollouts are saved and from where they go on; None saves nothing.
    """
    rollouts, settings = self._rollouts, self._rollouts.settings
    episodes = rollouts.source.batch(ids)
    keys = jax.vmap(functools.partial(trajectories.key_of, rollouts.source))(
        jnp.asarray(ids, jnp.uint32))
    params = rollouts.params_of(keys)
    progress = self._start(params, episodes, keys)
    if saved is not None:
      progress = restored(saved, progress)
    game, kept, given = rollouts.world.game, min(KEPT, len(ids)), self._given(episodes, ids)
    painted, done = None, progress.frames.shape[1]
    for end in ends(settings):
      if end > done:
        segment = jax.tree.map(lambda x, low=done, high=end: x[low:high], given)
        carry, played, frames = self._record(params, progress.carry, segment, self._on,
                                             num_kept=kept)
        progress = Progress(carry, measures.joined(progress.played, played),
                            jnp.concatenate([progress.frames, frames], 1))
      if isinstance(settings.edit, cfg.PaintCells) and end == settings.edit.frame:
        # A rollout that goes on after the edit chooses what it had chosen, by what it has read.
        painted = choose(game, progress.played, end, settings, ids)
      if end > done:
        progress, done = edited(game, settings.edit, progress, end, painted), end
        if saved is not None:
          save(saved, progress)
    return Batch(progress, episodes, painted)

  def _start(self, params: Any, episodes: trajectories.Trajectory, keys: Array) -> Progress:
    truth = jax.tree.map(lambda x: x[:, 0], episodes.truth)
    carry, played = self._begin(params, episodes.frames[:, 0], truth,
                                dream.fold(keys, _OF_DREAM))
    kept = min(KEPT, len(keys))
    return Progress(carry, played, jnp.asarray(episodes.frames[:kept, :0]))

  def _given(self, episodes: trajectories.Trajectory, ids: Sequence[int]) -> dream.Given:
    """The inputs of all steps, with a leading axis of time."""
    world_shape, settings = self._rollouts.world.game.world_shape, self._rollouts.settings
    actions = episodes.actions[:, 1:]
    nudges = np.zeros((*actions.shape, 2), np.int32)
    if settings.nudge_rate and min(world_shape) > 0:
      axis = int(np.argmax(world_shape))
      for row, number in enumerate(ids):
        rng = np.random.default_rng((settings.trajectories.seed, number))
        sign = rng.choice((-1, 1), actions.shape[1])
        nudges[row, :, axis] = sign * (rng.random(actions.shape[1]) < settings.nudge_rate)
    by_time = (jnp.moveaxis(jnp.asarray(x), 1, 0)
               for x in (actions, episodes.truth.event[:, 1:], nudges))
    return dream.Given(*by_time)


# --- Edits ------------------------------------------------------------------------


def edited(game: base.Game, edit: cfg.NoEdit | cfg.AddToLedger | cfg.PaintCells,
           progress: Progress, frame: int, painted: Painted | None) -> Progress:
  """The games after what somebody does between `frame` and the next one, in dream and truth."""
  carry = progress.carry
  if isinstance(edit, cfg.NoEdit) or edit.frame != frame:
    return progress
  match edit:
    case cfg.AddToLedger():
      limits = base.moduli(game.counters)
      counters = carry.past.claims.counters.at[:, 0].add(edit.amount) % limits
      carry = measures.Carry(dream.add(game, carry.dream, edit.amount),
                             jax.vmap(history.set_counters)(carry.past, counters))
    case cfg.PaintCells():
      assert painted is not None
      cells, contents = jnp.asarray(painted.cells), jnp.asarray(painted.contents)
      carry = measures.Carry(dream.paint(game, carry.dream, cells, contents),
                             jax.vmap(history.paint)(carry.past, cells, contents))
  return dataclasses.replace(progress, carry=carry)


def choose(game: base.Game, played: measures.Played, frame: int, settings: cfg.GameEvaluation,
           ids: Sequence[int]) -> Painted:
  """A cell in view of each game, and something else to paint there than it shows.

  Walls and edges stay, and nobody is painted over who stands in a cell.
  """
  shown = jax.tree.map(lambda x: np.asarray(x[:, frame]), played.readings)
  origin = np.asarray(played.claims.origin[:, frame])
  choices, fixed = maps.buildable(game), [i for i, name in enumerate(game.contents)
                                          if name in ('wall', 'edge')]
  cells, contents = [], []
  for row, number in enumerate(ids):
    rng = np.random.default_rng((settings.trajectories.seed, number, frame))
    is_free = ~np.isin(shown.cells[row], [base.UNKNOWN, *fixed])
    for place in shown.objects[row]:
      is_free[tuple(place)] = False
    # A frame that shows no free cell cannot be told from one that shows nothing.
    places = np.argwhere(is_free) if is_free.any() else np.zeros((1, 2), int)
    place = places[rng.integers(len(places))]
    others = choices[choices != shown.cells[row][tuple(place)]]
    cells.append(origin[row] + place)
    contents.append(others[rng.integers(len(others))])
  return Painted(np.array(cells, np.int32), np.array(contents, np.int32))


# --- Saving -----------------------------------------------------------------------


def save(directory: Path, progress: Progress) -> None:
  """Saves rollouts, of which only the last state is kept."""
  with checkpoint.Checkpointer(directory, cfg.Checkpoint(keep=1)) as saver:
    saver.save(progress.frames.shape[1], _numbered(progress), {})


def restored(directory: Path, start: Progress) -> Progress:
  """The rollouts that were saved in a directory, or `start`, their beginning, if none were.

  Raises:
    UserError: what was saved cannot be read.
  """
  steps = checkpoint.steps(directory)
  if not steps:
    return start
  same = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  grown = lambda x: jax.ShapeDtypeStruct((x.shape[0], x.shape[1] + steps[-1], *x.shape[2:]),
                                         x.dtype, sharding=x.sharding)
  abstract = jax.tree.map(same, start)
  abstract = dataclasses.replace(abstract, played=jax.tree.map(grown, start.played),
                                 frames=jax.tree.map(grown, start.frames))
  found = checkpoint.restore(directory, _numbered(abstract), steps[-1]).state
  leaves, shape = jax.tree.flatten(abstract)
  progress: Progress = jax.tree.unflatten(shape, [
      found[str(number)] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)
      for number, leaf in enumerate(leaves)])
  return progress


def _numbered(tree: Any) -> dict[str, Any]:
  """The leaves by number; a checkpoint has none that are empty, as the map of Pong is."""
  return {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(tree)) if leaf.size}
