"""Games that are worlds to learn, how difficult they are, and trajectories of them."""

from dataclasses import dataclass
from typing import Literal, get_args

from jaxrl_pt.config import checks
from jaxrl_pt.errors import UserError

# Height and width of a frame in pixels. Larger ones have the same rules, drawn with pixels of two
# and four times the size and more room above the ground.
FrameSize = Literal['24x32', '64x64', '128x128']


def _check_scores(owner: 'Traveler | PacMan') -> None:
  checks.integer(owner, 'start_low', 0, 999)
  checks.integer(owner, 'start_high', owner.start_low, 999)


@dataclass(frozen=True)
class Traveler:
  """A street on which every cell that is entered for the first time gets a building and scores 1.

  frame: height and width of a frame in pixels.
  num_colours: how many colours buildings may have; with 1 no place can be told from another.
  period: after how many cells the colours repeat; 0 for never.
  num_cells: the length of the street, on whose middle cell an episode begins.
  start_low, start_high: the range of the score at the beginning, which is drawn for each episode.
    A model sees every digit in every place only if the range is the whole one.
  """

  frame: FrameSize = '24x32'
  num_colours: int = 6
  period: int = 0
  num_cells: int = 1024
  start_low: int = 0
  start_high: int = 999

  def __post_init__(self) -> None:
    checks.choice(self, 'frame', FrameSize)
    checks.integer(self, 'num_colours', 1, 6)
    checks.integer(self, 'period', 0, 1024)
    checks.size(self, 'num_cells', 8, 2**16, 16, 'the street of each game')
    _check_scores(self)


@dataclass(frozen=True)
class Pong:
  """Two paddles and a ball; who misses it gives the other side a point.

  frame: height and width of a frame in pixels.
  paddle_speed: units that a paddle moves in a step; a unit is a pixel of the smaller frame.
  ball_speed: units that the ball moves sideways in a step.
  opponent_skill: the probability that the opponent follows the ball in a step.
  winning_score: the score that ends an episode.
  start_high: the highest score of either side at the beginning, which is drawn for each episode.
  """

  frame: FrameSize = '24x32'
  paddle_speed: int = 2
  ball_speed: int = 2
  opponent_skill: float = 0.7
  winning_score: int = 21
  start_high: int = 20

  def __post_init__(self) -> None:
    checks.choice(self, 'frame', FrameSize)
    checks.integer(self, 'paddle_speed', 1, 4)
    checks.integer(self, 'ball_speed', 1, 4)
    checks.number(self, 'opponent_skill', 0.0, 1.0)
    checks.integer(self, 'winning_score', 1, 99)
    checks.integer(self, 'start_high', 0, self.winning_score - 1)


@dataclass(frozen=True)
class PacMan:
  """A maze of 9 × 9 cells with pellets of 10 points each, and a ghost that costs a life.

  frame: height and width of a frame in pixels.
  wall_share: the share of the inner pillars that have a wall beside them.
  pellet_share: the probability that an open cell has a pellet at the beginning.
  ghost_rate: the probability that the ghost moves in a step.
  lives: the lives at the beginning.
  start_low, start_high: the range of the score at the beginning, as in `Traveler`.
  """

  frame: FrameSize = '24x32'
  wall_share: float = 0.7
  pellet_share: float = 0.9
  ghost_rate: float = 0.75
  lives: int = 3
  start_low: int = 0
  start_high: int = 999

  def __post_init__(self) -> None:
    checks.choice(self, 'frame', FrameSize)
    checks.number(self, 'wall_share', 0.0, 1.0)
    checks.number(self, 'pellet_share', 0.1, 1.0)
    checks.number(self, 'ghost_rate', 0.0, 1.0)
    checks.integer(self, 'lives', 1, 9)
    _check_scores(self)


Game = Traveler | Pong | PacMan
Policy = Literal['mixed', 'random', 'wander', 'out_and_back', 'follow', 'forage']
# The scripted policies of each game; 'mixed' draws one of them for each episode.
_POLICIES: dict[type, tuple[str, ...]] = {
    Traveler: ('random', 'wander', 'out_and_back'),
    Pong: ('random', 'follow'),
    PacMan: ('random', 'forage'),
}


@dataclass(frozen=True)
class Trajectories:
  """Episodes of a game, each of them a function of (seed, index) alone, so that none is stored.

  game: the game and its difficulty.
  policy: who plays.
  num_frames: frames of an episode, the first one included.
  size: the number of episodes.
  """

  game: Game
  policy: Policy = 'mixed'
  num_frames: int = 48
  size: int = 1_000_000
  seed: int = 0

  def __post_init__(self) -> None:
    checks.instance(self, 'game', *get_args(Game))
    checks.choice(self, 'policy', Policy)
    checks.size(self, 'num_frames', 2, 2**14, 24 * 32 * 3, 'the frames of an episode')
    checks.integer(self, 'size', 1)
    checks.integer(self, 'seed', 0, 2**32 - 1)
    if self.policy != 'mixed' and self.policy not in _POLICIES[type(self.game)]:
      raise UserError(f'Trajectories.policy = {self.policy!r} does not know how to play '
                      f'{type(self.game).__name__}: choose '
                      f'{", ".join(map(repr, ("mixed", *_POLICIES[type(self.game)])))}.')

  @property
  def policies(self) -> tuple[str, ...]:
    """The names of those who play."""
    return _POLICIES[type(self.game)] if self.policy == 'mixed' else (self.policy,)
