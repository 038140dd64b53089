"""Reinforcement learning of a game: a small policy that sees frames, and where it plays.

docs/methods/maag_rl.md has the equations. Beside its settings `GameRL` has the attributes of every
objective (`config.objectives`).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from jaxrl_pt.config import checks
from jaxrl_pt.config.algorithm import Algorithm, NoCorrection, NoKL, NoShaping
from jaxrl_pt.config.hybrid import DecoupledModes, ModeAdvantage
from jaxrl_pt.config.maag import Drawing, MaaG
from jaxrl_pt.config.worlds import Autoencoding, Diffusion
from jaxrl_pt.errors import UserError


@dataclass(frozen=True)
class GamePolicy:
  """A network that chooses an action from the last frames alone.

  num_frames: how many frames it sees; before the first one of an episode stands that frame itself.
  channels: of its 3 × 3 convolutions, each of which halves the side of the frame.
  hidden: the width of the layer that the actions' logits, and a value head, are linear in.
  """

  num_frames: int = 2
  channels: tuple[int, ...] = (16, 32)
  hidden: int = 64

  def __post_init__(self) -> None:
    checks.integer(self, 'num_frames', 1, 64)
    checks.counts(self, 'channels', 5)
    checks.integer(self, 'hidden', 1, 2**16)


@dataclass(frozen=True)
class TrueGame:
  """The policy plays the game itself."""


@dataclass(frozen=True)
class InsideModel:
  """The policy plays inside a trained model of the game, and every frame that it sees is drawn.

  model_from: the work directory of a run of Diffusion on the same game.
  modules: what stands round the model and tells it numbers and places.
  drawing: how it draws.
  """

  model_from: str
  modules: MaaG = field(default_factory=MaaG)
  drawing: Drawing = field(default_factory=Drawing)

  def __post_init__(self) -> None:
    checks.text(self, 'model_from')
    checks.instance(self, 'modules', MaaG)
    checks.instance(self, 'drawing', Drawing)
    if self.modules.events == 'true':
      raise UserError("MaaG.events = 'true' asks the true game what happens, and a policy that "
                      "learns inside a model has no true game beside it: choose 'predicted'.")


Place = TrueGame | InsideModel
Paid = Literal['events', 'changes']


@dataclass(frozen=True)
class GameRL:
  """Reinforcement learning of a policy by what can be read in the frames of its games.

  A step plays Trajectories.num_frames frames of `group_size` games in each of Train.batch_size
  worlds. The reward of an action is by how much the display's numbers then say more than in the
  last frame that could be read, as far as the player wants them (the opponent's points count
  against it). A frame that cannot be read earns nothing.

  place: the game itself, or a model of it.
  group_size: games in the same world, which grouped advantages compare.
  pays: 'events' pays only what events of the game can have added, one a step, and nothing for any
    other change of the display; 'changes' pays whatever the display says.
  eval_games: games in held-out worlds of an evaluation.
  """

  place: Place = field(default_factory=TrueGame)
  group_size: int = 8
  pays: Paid = 'events'
  algorithm: Algorithm = field(default_factory=Algorithm)
  eval_games: int = 64
  rollouts: ClassVar[None] = None
  positions_per_document: ClassVar[int] = 1
  policy_fields: ClassVar[tuple[str, ...]] = ()
  examples: ClassVar[None] = None

  def __post_init__(self) -> None:
    checks.instance(self, 'place', *get_args(Place))
    checks.size(self, 'group_size', 1, 2**16, 4 * 24 * 32 * 3, 'a frame of each game of a world')
    checks.choice(self, 'pays', Paid)
    checks.instance(self, 'algorithm', Algorithm)
    checks.size(self, 'eval_games', 1, 2**16, 4 * 24 * 32 * 3, 'a frame of each game')
    _check_actions(self.algorithm)
    if self.algorithm.advantage.grouped and self.group_size < 2:
      raise UserError(f'Algorithm.advantage = @cfg.{type(self.algorithm.advantage).__name__}() '
                      'compares games in the same world: set GameRL.group_size to 2 at least.')


OfGames = Diffusion | Autoencoding | GameRL


def _check_actions(algorithm: Algorithm) -> None:
  """Refuses the parts of an algorithm that mean nothing for actions."""
  if isinstance(algorithm.advantage, ModeAdvantage):
    raise UserError(f'Algorithm.advantage = @cfg.{type(algorithm.advantage).__name__}() compares '
                    'modes of responses, and actions of a game have none: choose another, such as '
                    '@cfg.GRPO().')
  if isinstance(algorithm.aggregation, DecoupledModes):
    raise UserError('Algorithm.aggregation = @cfg.DecoupledModes() weighs the token of a mode, and '
                    'actions of a game have none: choose another, such as @cfg.TokenMean().')
  for name, value, only, reason in (
      ('correction', algorithm.correction, NoCorrection,
       'the policy that learns has drawn every action itself'),
      ('kl', algorithm.kl, NoKL,
       'a policy of a game starts from random parameters, so that there is no reference policy'),
      ('shaping', algorithm.shaping, NoShaping, 'episodes of a game are of one length')):
    if not isinstance(value, only):
      raise UserError(f'Algorithm.{name} = @cfg.{type(value).__name__}() is not for GameRL: '
                      f'{reason}; leave it at @cfg.{only.__name__}().')


def place_of(objective: object) -> tuple[InsideModel, ...]:
  """The model in which an objective's policy plays, if it plays in one."""
  if isinstance(objective, GameRL) and isinstance(objective.place, InsideModel):
    return (objective.place,)
  return ()
