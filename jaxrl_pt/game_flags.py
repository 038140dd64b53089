"""The flags of the commands about games. This module imports little, as `flags`."""

import argparse
from collections.abc import Callable

from jaxrl_pt.flag_types import add_gin, add_json, at_least, path, text


def add_page(play: argparse.ArgumentParser) -> None:
  """Adds the flags of `play` that serve a page."""
  page = play.add_argument_group('a game inside a model, in a browser')
  page.add_argument('--workdir', type=path, metavar='DIR', help='a trained model of a game')
  page.add_argument('--step', type=at_least(0), help='which checkpoint (default the newest)')
  page.add_argument('--game', type=text, metavar='NAME', help='instead of a trained model the '
                    "game's renderer, which forgets and miscounts: traveler, pong or pacman")
  page.add_argument('--host', help='where to listen (default 127.0.0.1); any but a '
                    'loopback address needs the token that is printed')
  page.add_argument('--port', type=at_least(0), help='0 takes a free one (default 8000)')


def add_trajectories(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
  """Adds `trajectories`."""
  games = add('trajectories', 'Episodes of a game, made from a seed: reads each frame back, writes '
              'them, shows one.',
              'jaxrl-pt trajectories --game traveler --film traveler.png\n'
              '  jaxrl-pt trajectories --game pong --count 1000 --output data/pong')
  games.add_argument('--game', type=text, metavar='NAME', help='a shipped one, gin/game/NAME.gin: '
                     'traveler, pong or pacman')
  add_gin(games, 'the settings of cfg.Trajectories')
  games.add_argument('--count', type=at_least(1), default=64, metavar='N', help='episodes that are '
                     'read back, and written if --output is given (default %(default)s)')
  games.add_argument('--output', type=path, metavar='DIR', help='write them here, in ArrayRecord')
  games.add_argument('--film', type=path, metavar='FILE', help='an episode as a strip of frames '
                     '(.png) or an animation (.gif)')
  games.add_argument('--episode', type=at_least(0), default=0, metavar='I', help='which one '
                     '(default %(default)s)')
  add_json(games)
