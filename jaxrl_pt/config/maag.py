"""The modules round a model of a game (what counts, remembers, localises) and their evaluation."""

from dataclasses import dataclass, field
from typing import Literal

from jaxrl_pt.config import checks
from jaxrl_pt.config.game import Trajectories
from jaxrl_pt.errors import UserError

MapEntries = Literal['contents', 'colours']
MapWrites = Literal['first', 'last']
# Models that have learned nothing (`game/renderers.py`). 'true' draws what ledger and map say, and
# the truth where they say nothing. 'weak' obeys them too, but by itself it leaves only what the
# last frame showed as it was, draws anew what comes back into view, and miscounts one event in
# eight. 'ignores' draws the truth whatever it is told, 'redraws' all buildings anew in each frame,
# 'wrong_digits' any numbers, and 'shifted' frames that are a pixel to the right.
Renderer = Literal['true', 'weak', 'ignores', 'redraws', 'wrong_digits', 'shifted']
Events = Literal['predicted', 'none', 'every_step', 'true']


@dataclass(frozen=True)
class DeadReckoning:
  """The view is where the actions lead, whatever the frames show."""


@dataclass(frozen=True)
class SlidingWindow:
  """The view is where what the frame shows agrees best with the map, near where the actions lead.

  reach: by how many cells, in each direction, the view may be elsewhere.
  margin: by how much the mean squared difference to the map must be smaller elsewhere than where
    the actions lead, of colours from 0 to 1. With 0 any difference decides, noise among them.
  min_known: how many cells of the view the map must know there.
  """

  reach: int = 1
  margin: float = 0.005
  min_known: int = 2

  def __post_init__(self) -> None:
    checks.integer(self, 'reach', 1, 8)
    checks.number(self, 'margin', 0.0, 1.0)
    checks.integer(self, 'min_known', 1, 64)


@dataclass(frozen=True)
class NoMap:
  """Nothing is remembered outside of the model."""


@dataclass(frozen=True)
class MapMemory:
  """A map of the world, of which the model is shown what lies in view before it draws.

  entries: what a cell of the map holds: the colour that stands for what is recognised there
    ('contents'), or the mean colour of its pixels ('colours').
  writes: whether what was shown first stays ('first', for worlds that do not change) or what was
    shown last counts ('last', for pellets).
  localisation: how the place of the view is found.
  """

  entries: MapEntries = 'contents'
  writes: MapWrites = 'first'
  localisation: DeadReckoning | SlidingWindow = field(default_factory=SlidingWindow)

  def __post_init__(self) -> None:
    checks.choice(self, 'entries', MapEntries)
    checks.choice(self, 'writes', MapWrites)
    checks.instance(self, 'localisation', DeadReckoning, SlidingWindow)


@dataclass(frozen=True)
class MaaG:
  """What stands round a model of a game and tells it numbers and places (MaaG 2503.21172).

  events: who says what happens in a step: LogicNet ('predicted'), nobody ('none'), a first event in
    every step ('every_step'), or the true rules of the game ('true').
  shows_counters: whether the model is told what the display must show.
  map: what remembers places.
  """

  events: Events = 'predicted'
  shows_counters: bool = True
  map: MapMemory | NoMap = field(default_factory=MapMemory)

  def __post_init__(self) -> None:
    checks.choice(self, 'events', Events)
    checks.flag(self, 'shows_counters')
    checks.instance(self, 'map', MapMemory, NoMap)


@dataclass(frozen=True)
class Drawing:
  """How a trained model turns noise into a frame, where that is not as its own run says.

  sampling_steps: steps from noise to a frame; 0 takes Diffusion.sampling_steps of the model's run.
  sampling_shift: of the levels from which a frame is drawn (Flow.sampling_shift); 0 takes that of
    the model's run.
  """

  sampling_steps: int = 0
  sampling_shift: float = 0.0

  def __post_init__(self) -> None:
    checks.integer(self, 'sampling_steps', 0, 8)
    checks.number(self, 'sampling_shift', 0.0, 100.0)


@dataclass(frozen=True)
class NoEdit:
  """Nobody interferes."""


@dataclass(frozen=True)
class AddToLedger:
  """Somebody adds to the first number of the display.

  frame: the last frame before the change can show.
  amount: what is added.
  """

  frame: int = 24
  amount: int = 37

  def __post_init__(self) -> None:
    checks.integer(self, 'frame', 1)
    checks.integer(self, 'amount', 1, 999)


@dataclass(frozen=True)
class PaintCells:
  """Somebody paints one cell in view of each game, with something else than it shows.

  frame: the last frame before the change can show.
  """

  frame: int = 24

  def __post_init__(self) -> None:
    checks.integer(self, 'frame', 1)


@dataclass(frozen=True)
class GameEvaluation:
  """What is measured of a model of a game: whether its numbers and places stay true.

  trajectories: the game, and whose actions are executed; held-out episodes give first frames and
    actions, and everything after the first frame is the model's.
  modules: what stands round the model.
  model: the model of the work directory, or one that has learned nothing (see `Renderer`).
  drawing: how the model of the work directory draws.
  episodes: how many games.
  batch_size: how many at once.
  at_frame: the late frame whose score is measured alone.
  shuffled_map: whether each game is shown its neighbour's map, as a control.
  nudge_rate: how often the view is taken to be a cell off, as a planted error.
  pixel_noise: standard deviation of noise in the frames of a model that has learned nothing.
  edit: what somebody changes in the middle.
  checkpoint_every: after how many frames the rollouts are saved, to go on after an interruption; 0
    for never.
  """

  trajectories: Trajectories
  modules: MaaG = field(default_factory=MaaG)
  model: Literal['trained'] | Renderer = 'trained'
  drawing: Drawing = field(default_factory=Drawing)
  episodes: int = 64
  batch_size: int = 64
  at_frame: int = 48
  shuffled_map: bool = False
  nudge_rate: float = 0.0
  pixel_noise: float = 0.0
  edit: NoEdit | AddToLedger | PaintCells = field(default_factory=NoEdit)
  checkpoint_every: int = 0

  def __post_init__(self) -> None:
    checks.instance(self, 'trajectories', Trajectories)
    checks.instance(self, 'modules', MaaG)
    checks.choice(self, 'model', Literal['trained', Renderer])
    checks.instance(self, 'drawing', Drawing)
    checks.size(self, 'episodes', 1, 2**16, 2**16, 'the episodes')
    checks.size(self, 'batch_size', 1, 2**12, 2**16, 'the games of a batch')
    checks.integer(self, 'at_frame', 1)
    checks.flag(self, 'shuffled_map')
    checks.number(self, 'nudge_rate', 0.0, 1.0)
    checks.number(self, 'pixel_noise', 0.0, 1.0)
    checks.instance(self, 'edit', NoEdit, AddToLedger, PaintCells)
    checks.integer(self, 'checkpoint_every', 0)
    last = self.trajectories.num_frames - 1
    if self.at_frame > last:
      raise UserError(f'GameEvaluation.at_frame = {self.at_frame} comes after the last frame, '
                      f'{last}: lower it, or raise Trajectories.num_frames.')
    if not isinstance(self.edit, NoEdit) and self.edit.frame >= last:
      raise UserError(f'{type(self.edit).__name__}.frame = {self.edit.frame} leaves no frame in '
                      f'which the change could show: set it below {last}, or raise '
                      'Trajectories.num_frames.')
    if self.episodes > self.trajectories.size:
      raise UserError(f'GameEvaluation.episodes = {self.episodes} is more than the '
                      f'{self.trajectories.size} of Trajectories.size: lower it.')
    if self.shuffled_map and min(self.episodes, self.batch_size) < 2:
      raise UserError('GameEvaluation.shuffled_map = True needs a neighbour: set episodes and '
                      'batch_size to 2 at least.')
    if self.pixel_noise and self.model == 'trained':
      raise UserError("GameEvaluation.pixel_noise is for models that have learned nothing, and "
                      "GameEvaluation.model = 'trained': leave it at 0.")
