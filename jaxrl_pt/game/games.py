"""Which game settings mean; asked here and nowhere else."""

import functools

from jaxrl_pt import config as cfg
from jaxrl_pt.game import pacman, pong, traveler
from jaxrl_pt.game.base import Game


@functools.cache
def open_game(config: cfg.Game) -> Game:
  """The game with these settings, the same object for equal settings."""
  match config:
    case cfg.Traveler():
      return traveler.make(config)
    case cfg.Pong():
      return pong.make(config)
    case cfg.PacMan():
      return pacman.make(config)
