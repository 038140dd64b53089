"""What some episodes hold, and whether every frame of them can be read back."""

import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.game import reading
from jaxrl_pt.game.base import UNKNOWN, Game
from jaxrl_pt.game.games import open_game
from jaxrl_pt.game.trajectories import Source, Trajectory

_BATCH = 64


def check_asked(source: Source, count: int, index: int) -> None:
  """Refuses more episodes than there are.

  Raises:
    UserError: `count` or `index` is beyond Trajectories.size.
  """
  size = source.config.size
  if max(count, index + 1) > size:
    raise UserError(f'There are {size} episodes (Trajectories.size): ask for fewer than '
                    f'{max(count, index + 1)}, or raise it.')


def inspect(source: Source, count: int) -> dict[str, Any]:
  """Counts of the first `count` episodes.

  Returns:
    For JSON: frames; `events` by name; remembered cells (of which an earlier frame tells), and
    those that came back into view; unreadable frames and frames that were misread although they
    are readable; steps whose movement two frames leave in doubt, and those that were misread.
  """
  game = open_game(source.config.game)
  totals: dict[str, Any] = {}
  for low in range(0, count, _BATCH):
    batch = source.batch(range(low, min(low + _BATCH, count)))
    for name, value in _counts(source.config.game)(batch).items():
      totals[name] = totals.get(name, 0) + np.asarray(value, np.int64)
  events = totals.pop('events')
  return {'game': type(game.config).__name__, 'episodes': count,
          'events': dict(zip(game.events[1:], events[1:].tolist(), strict=True)),
          **{name: int(value) for name, value in totals.items()}}


@functools.lru_cache(maxsize=8)
def _counts(config: cfg.Game) -> Any:
  return jax.jit(functools.partial(counts, open_game(config)))


def counts(game: Game, batch: Trajectory) -> dict[str, Array]:
  """The numbers of `inspect` for trajectories [B, T, ...]; events by index."""
  truth = batch.truth
  readings = jax.vmap(jax.vmap(lambda frame: reading.read(game, frame)))(batch.frames)
  exact = jax.vmap(jax.vmap(reading.is_exact))(readings, truth)
  before, after = (jax.tree.map(lambda x, span=span: x[:, span], readings)
                   for span in (slice(-1), slice(1, None)))
  moved, decided = jax.vmap(jax.vmap(game.moved))(before, after)
  wrong = (moved != truth.moved[:, 1:]).any(-1)
  return {
      'frames': jnp.asarray(exact.size),
      'events': (truth.event[..., None] == np.arange(len(game.events))).sum((0, 1)),
      'remembered_cells': (truth.memory != UNKNOWN).sum(),
      'returned_cells': truth.returned.sum(),
      'unreadable': (~readings.readable).sum(),
      'misread': (readings.readable & ~exact).sum(),
      'doubtful_moves': (~decided).sum(),
      'misread_moves': (decided & wrong).sum(),
  }


def text(found: dict[str, Any]) -> str:
  """The counts for a person."""
  events = ', '.join(f'{name} {number}' for name, number in found['events'].items())
  frames = found['frames']
  return (f'{found["game"]}: {found["episodes"]} episodes, {frames} frames; {events}\n'
          f'cells that earlier frames tell of: {found["remembered_cells"]}, of which '
          f'{found["returned_cells"]} came back into view\n'
          f'read back: {frames - found["unreadable"] - found["misread"]} of {frames} frames, '
          f'{found["unreadable"]} unreadable, {found["misread"]} misread\n'
          f'movements: {found["misread_moves"]} misread, {found["doubtful_moves"]} in doubt')
