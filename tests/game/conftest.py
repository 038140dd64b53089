"""Episodes of each game, made once: programs without optimisation, which compile in less time.

Of the three games only Traveler is played in ordinary tests, since each takes seconds to compile.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.game import base, games, reading, trajectories

NUM_EPISODES, NUM_FRAMES = 16, 40
CONFIGS = {'traveler': cfg.Traveler(num_cells=24), 'pong': cfg.Pong(opponent_skill=0.3),
           'pacman': cfg.PacMan(lives=2)}

PARAMS = [name if name == 'traveler' else pytest.param(name, marks=pytest.mark.slow)
          for name in CONFIGS]


class Played(NamedTuple):
  """Some episodes of a game, and what is read from their frames."""

  game: base.Game
  batch: trajectories.Trajectory  # [B, T, ...]
  read: Any  # f32[B · T, H, W, 3] → Reading
  readings: base.Reading  # [B, T, ...]


def quick(function: Any) -> Any:
  return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})


def source_of(name: str) -> trajectories.Source:
  return trajectories.Source(
      cfg.Trajectories(CONFIGS[name], num_frames=NUM_FRAMES, size=64, seed=3))


@functools.cache
def _played(name: str) -> Played:
  source = source_of(name)
  game = games.open_game(source.config.game)
  ids = np.arange(NUM_EPISODES, dtype=np.uint32)
  if name == 'traveler':  # The program of the source itself, which the tests of the loader share.
    batch = source.batch(ids)
  else:
    batch = jax.tree.map(np.asarray, quick(functools.partial(trajectories.generate, source))(ids))
  read = quick(jax.vmap(functools.partial(reading.read, game)))
  flat = read(as_floats(batch.frames))
  readings = jax.tree.map(
      lambda x: np.asarray(x).reshape(NUM_EPISODES, NUM_FRAMES, *x.shape[1:]), flat)
  return Played(game, batch, read, readings)


def as_floats(frames: np.ndarray) -> np.ndarray:
  """f32[B · T, H, W, 3]: the frames one after the other."""
  return frames.reshape(-1, *frames.shape[-3:]).astype(np.float32) / 255


@pytest.fixture(params=PARAMS)
def played(request: pytest.FixtureRequest) -> Played:
  return _played(request.param)


@pytest.fixture
def played_by_name() -> Any:
  return _played
