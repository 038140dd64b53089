"""`jaxrl-pt play --workdir W`: opens a model, compiles its frame and serves the page."""

from collections.abc import Callable
from pathlib import Path

import jax

from jaxrl_pt import config as cfg
from jaxrl_pt.game import base, dream, maps, noise, renderers, trajectories
from jaxrl_pt.game.games import open_game
from jaxrl_pt.jobs import trained_worlds
from jaxrl_pt.playing.rooms import Rooms, Stage, facts
from jaxrl_pt.playing.server import Server


def default_modules(game: base.Game) -> cfg.MaaG:
  """The modules that a game is played with unless a gin file says otherwise."""
  if not game.contents:
    return cfg.MaaG(map=cfg.NoMap())
  if game.view_shape == game.world_shape:
    return cfg.MaaG(map=cfg.MapMemory(writes='last', localisation=cfg.DeadReckoning()))
  return cfg.MaaG()


def trained(workdir: Path, step: int | None, modules: cfg.MaaG | None) -> tuple[Stage, str]:
  """The stage of a trained model, and what is said of it.

  Raises:
    UserError: as in `trained_worlds.load`, or modules that the game cannot have.
  """
  found = trained_worlds.load(workdir, step)
  modules = default_modules(found.game) if modules is None else modules
  maps.check(found.game, modules.map)
  world = dream.World(found.game, found.model, modules.map)
  return Stage(world, lambda key: found.params, modules), f'{workdir}, step {found.step}'


def rendered(config: cfg.Game, kind: cfg.Renderer, modules: cfg.MaaG | None
             ) -> tuple[Stage, str]:
  """The stage of a model that has learned nothing, and what is said of it.

  Raises:
    UserError: modules that the game cannot have.
  """
  game = open_game(config)
  modules = default_modules(game) if modules is None else modules
  maps.check(game, modules.map)
  world = dream.World(game, renderers.world_model(game, kind), modules.map)

  @jax.jit
  def params_of(key: jax.Array) -> object:
    return jax.tree.map(lambda x: x[None], game.init(noise.fold(key, trajectories.OF_WORLD)))

  return Stage(world, params_of, modules), f'the renderer {kind!r}, which has learned nothing'


def serve(stage: Stage, about: str, host: str, port: int, say: Callable[[str], None]) -> None:
  """Serves until Ctrl-C.

  Raises:
    UserError: the address cannot be listened at.
  """
  # The address first: whoever has mistyped it need not wait for the compiler.
  rooms = Rooms(stage)
  with Server(host, port, rooms, facts(stage, about)) as server:
    say('Compiling a frame …')
    name, room = rooms.open(0)
    # Where a game's arrays are is settled after a frame, and is part of what a program is made for.
    for _ in range(2):
      room.step(stage.world.game.stay)
    rooms.close(name)
    say(f'Play {type(stage.world.game.config).__name__} at {server.url} (Ctrl-C ends)')
    server.serve_forever(poll_interval=0.2)
