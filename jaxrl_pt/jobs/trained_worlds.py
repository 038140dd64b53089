"""A trained model of a game, as rollouts ask for it (`dream.WorldModel`)."""

from pathlib import Path
from typing import NamedTuple

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.game import base, dream
from jaxrl_pt.jobs import diffusion, world_models
from jaxrl_pt.types import Params


class Loaded(NamedTuple):
  """A trained model, and the checkpoint's step."""

  model: dream.WorldModel
  params: Params
  step: int
  game: base.Game  # the one that it was trained on


def load(workdir: Path, step: int | None, game: base.Game | None = None,
         drawing: cfg.Drawing = cfg.Drawing()) -> Loaded:
  """Restores a model of a game from a work directory.

  Args:
    workdir: a work directory written by `train`.
    step: the checkpoint's step; None takes the newest good one.
    game: the game that is to be played in it, which may be easier or harder than that of the
      training; None takes that one.
    drawing: how it draws.

  Raises:
    UserError: no such directory, no checkpoint, a run of another objective, or of another game, or
      one that cannot draw so.
  """
  trained = diffusion.load(workdir, step)
  if game is not None:
    check_game(game.config, trained.game.config, workdir)
  model = world_models.world_model(
      trained.world, diffusion.solver_of(trained.session.run, drawing), trained.game.stay)
  return Loaded(model, trained.params, trained.step, trained.game)


def check_game(asked: cfg.Game, drawn: cfg.Game, workdir: Path) -> None:
  """Refuses a model of another game, or of frames of another size.

  Raises:
    UserError: the games differ in more than their difficulty.
  """
  if (type(asked), asked.frame) != (type(drawn), drawn.frame):
    raise UserError(
        f'The model in {workdir} draws {type(drawn).__name__} in frames of {drawn.frame}, and '
        f'{type(asked).__name__} in frames of {asked.frame} is asked for: give the work directory '
        'of a model of that game.')
