"""Where a policy of a game plays: the true game, or a trained model of it."""

from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt.game import acting, base, dream, maps
from jaxrl_pt.jobs import diffusion, episodes, reinforce, trained_worlds, world_models
from jaxrl_pt.run import places
from jaxrl_pt.types import Params


class Place(NamedTuple):
  """Where a policy plays.

  environment: the true game, or a model of it.
  params: the model's parameters; {} of the true game.
  digest: names them; '' of the true game.
  """

  environment: acting.Environment
  params: Params
  digest: str


def opened(run: cfg.Run, place: cfg.TrueGame | cfg.InsideModel, workdir: Path) -> Place:
  """Opens the place where a run's policy plays.

  Args:
    run: the run.
    place: where it plays.
    workdir: the run's work directory, whose newest checkpoint says where a model has moved to.

  Raises:
    UserError: no such model, one of another objective or game, modules that the game cannot have,
      or steps that the model cannot take.
  """
  game = episodes.game_of(run)
  match place:
    case cfg.InsideModel() as inside:
      there = places.policy(inside.model_from, workdir, 'model_from')
      trained = diffusion.load(there, mesh=run.mesh)
      environment = inside_model(game, trained.session.run, inside, there, trained.session.mesh)
      return Place(environment, trained.params, reinforce.digest(trained.params))
    case _:
      return Place(acting.true_game(game), {}, '')


def inside_model(game: base.Game, model_run: cfg.Run, inside: cfg.InsideModel, workdir: Path,
                 mesh: Mesh) -> acting.Environment:
  """The environment of a model of a game.

  Args:
    game: the game.
    model_run: the run of Diffusion that has trained the model.
    inside: how it is played in.
    workdir: that run's work directory, for messages.
    mesh: over which the model is laid out.

  Raises:
    UserError: as in `opened`.
  """
  trained_worlds.check_game(game.config, cfg.game_of(model_run), workdir)
  maps.check(game, inside.modules.map)
  world = world_models.world_model(diffusion.world_of(model_run, mesh),
                                   diffusion.solver_of(model_run, inside.drawing), game.stay)
  return acting.inside(dream.World(game, world, inside.modules.map), inside.modules)
