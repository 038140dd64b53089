"""Film strips of one walk to the right: the true game, a model with ledger and map, a model alone.

    python experiments/maag_rl/film.py --both runs/maag/both-0 --none runs/maag/none-0 \
        --output experiments/maag_rl/results/film.png

Every row is the same world with the same actions. A frame that cannot be read has a red edge.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxrl_pt import config as cfg
from jaxrl_pt.game import acting, games, trajectories
from jaxrl_pt.jobs import diffusion, game_places

RIGHT = 2
ALONE = cfg.MaaG('none', False, cfg.NoMap())
UNREADABLE = np.array([0.85, 0.1, 0.1])
ZOOM = 3


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--both', type=Path, required=True)
  parser.add_argument('--none', type=Path, required=True)
  parser.add_argument('--output', type=Path, required=True)
  parser.add_argument('--world', type=int, default=1, help='of the held-out ones')
  parser.add_argument('--actions', type=int, default=12)
  args = parser.parse_args()
  game = games.open_game(cfg.Traveler())
  source = trajectories.Source(cfg.Trajectories(game.config), is_validation=True)
  rows = [strip(acting.true_game(game), {}, source, args)]
  for workdir, modules in ((args.both, cfg.MaaG()), (args.none, ALONE)):
    trained = diffusion.load(workdir)
    inside = cfg.InsideModel(str(workdir), modules)
    environment = game_places.inside_model(game, trained.session.run, inside, workdir,
                                           trained.session.mesh)
    rows.append(strip(environment, trained.params, source, args))
  picture = np.round(255 * np.concatenate(rows)).astype(np.uint8)
  args.output.parent.mkdir(parents=True, exist_ok=True)
  size = picture.shape[1] * ZOOM, picture.shape[0] * ZOOM
  Image.fromarray(picture).resize(size, Image.Resampling.NEAREST).save(args.output)


def strip(environment: acting.Environment, params: object, source: trajectories.Source,
          args: argparse.Namespace) -> np.ndarray:
  """f32[H + 2, (W + 2) · T, 3]: the frames of a walk side by side, each in a frame of a pixel."""
  game = games.open_game(source.config.game)
  walk = lambda seen, keys_B: (jnp.full(len(seen), RIGHT), jnp.zeros(len(seen)))
  worlds = trajectories.world_of(source, args.world)[None]
  setting = acting.Setting(game, environment, 'changes', 1)
  played = jax.jit(functools.partial(acting.play, setting, act=walk, num_actions=args.actions))(
      params, worlds_B=worlds, keys_B=jax.random.split(jax.random.key(args.world), 1))
  readable = [1, *np.asarray(played.readable[0])]
  framed = []
  for frame, is_readable in zip(np.asarray(played.frames[0]), readable, strict=True):
    edged = np.ones((frame.shape[0] + 2, frame.shape[1] + 2, 3))
    edged[:] = 1.0 if is_readable else UNREADABLE
    edged[1:-1, 1:-1] = frame
    framed.append(edged)
  return np.concatenate(framed, 1)


if __name__ == '__main__':
  main()
