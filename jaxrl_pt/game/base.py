"""What a game is: pure functions of one game's state, and what is true of each frame.

A state is a frozen pytree that the game alone knows. What models, metrics and readers need of it
is its `Truth`: the counters, the event of the step that led to the frame, what each visible cell
shows, what a perfect memory of earlier frames would say of it, and how long it was out of view.
A frame is drawn from counters, cells and objects alone, so that whoever has read those three from
a frame can draw it again and compare.

A cell's content is an index of `Game.contents`, or UNKNOWN. World coordinates are (row, column).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.game import noise

UNKNOWN = -1  # the content of a cell that is hidden, or that has never been seen
NO_EVENT = 0


@struct.dataclass
class Truth:
  """What is true of one frame; M counters, a view of h × w cells, K objects."""

  counters: Array  # i32[M]
  event: Array  # i32[] the event of the step that led to this frame; NO_EVENT in the first one
  moved: Array  # i32[2] by how much the agent's world coordinates changed in that step
  pose: Array  # i32[2] the agent's world coordinates
  origin: Array  # i32[2] world coordinates of the view's first cell, which may lie outside
  cells: Array  # i32[h, w] what the view shows; UNKNOWN where an object hides it
  memory: Array  # i32[h, w] what earlier frames and edits have told of these cells, or UNKNOWN
  away: Array  # i32[h, w] frames that a cell was out of view before it came back; 0 if it was not
  returned: Array  # bool[h, w] it came back in this very frame
  objects: Array  # i32[K, 2] where the view shows agent, opponents and balls: (row, column)
  done: Array  # bool[] the episode is over: no later step changes anything


@struct.dataclass
class Reading:
  """What a frame shows, as `reading.read` has read it."""

  counters: Array  # i32[M]
  cells: Array  # i32[h, w], as in `Truth`
  objects: Array  # i32[K, 2], as in `Truth`
  residual: Array  # f32[] the largest root mean square error of a block, 1 being full contrast
  blend: Array  # f32[] the largest share that a rival of what was read has in any tile, 0 to 0.5
  readable: Array  # bool[] both are small enough


class Parts(NamedTuple):
  """What a game's reader has recognised in a frame."""

  counters: Array  # i32[M]
  cells: Array  # i32[h, w]
  objects: Array  # i32[K, 2]
  blend: Array  # f32[]


class Counter(NamedTuple):
  """A number of the display; it wraps at 10 to the power of num_digits."""

  name: str
  num_digits: int


class Turn(NamedTuple):
  """What a scripted policy knows besides the state."""

  key: Array  # u32[2] the key of this turn's noise
  last: Array  # i32[] the last action
  frame: Array  # i32[] the number of the frame that the policy sees
  num_frames: int  # frames of the episode


Policy = Callable[[Any, Turn], Array]


class Tiles(NamedTuple):
  """What the contents of cells look like; C contents, and 0 for a game without a map.

  pictures: u8[C, h, w, 3] what each content looks like.
  kept: bool[C] the contents that a map keeps: what a cell can go on to hold when out of view.
  vacant: bool[C] those of them on which something may come to stand, such as ground.
  colours: f32[C, 3] the colour from 0 to 1 by which a map tells each content.
  """

  pictures: np.ndarray
  kept: np.ndarray
  vacant: np.ndarray
  colours: np.ndarray

  @property
  def settled(self) -> np.ndarray:
    """bool[C]: the contents that stay, once they are there."""
    return self.kept & ~self.vacant


NO_TILES = Tiles(np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, bool), np.zeros(0, bool),
                 np.zeros((0, 3), np.float32))


class Game(NamedTuple):
  """A game's tables and its functions, each of one state; shapes are those of `Truth`.

  config: its settings.
  actions: the names of the actions; an action is an index of them.
  stay: the action that does nothing, which also stands before the first frame.
  events: the names of the events, of which the first is that there is none.
  deltas: i32[E + 1, M] what each event adds to each counter.
  counters: the numbers of the display.
  worth: i32[M] what one more of each counter is worth to the player.
  contents: the names of what a cell may hold.
  frame_shape: height and width of a frame in pixels.
  world_shape: rows and columns of the map; (0, 0) for a game without one.
  view_shape: rows and columns of the part of it that a frame shows.
  grid: where a frame shows them: top and left of the first cell, height and width of a cell, in
    pixels; zeros for a game without a map.
  tiles: what they look like.
  num_objects: K.
  init: key → state, the first frame's.
  step: state, action → state. An action outside `actions` is the caller's mistake
    (`edits.check_actions`).
  truth: state → Truth.
  scroll: origin, action → where the view begins after the action, by dead reckoning alone.
  draw: counters, cells, objects → u8[H, W, 3].
  recognise: f32[H, W, 3] from 0 to 1 → Parts.
  moved: the readings of two frames that follow each other → i32[2] by how much the agent moved
    between them, and whether the two say so without doubt.
  follow: the model's own history, an action, what the next frame shows → that history with it
    (`history.History`).
  paint: state, row, column, content → state.
  paintable: state, content → bool[rows, columns] where that content may be painted.
  policies: scripted players by name.
  """

  config: cfg.Game
  actions: tuple[str, ...]
  stay: int
  events: tuple[str, ...]
  deltas: np.ndarray
  counters: tuple[Counter, ...]
  worth: np.ndarray
  contents: tuple[str, ...]
  frame_shape: tuple[int, int]
  world_shape: tuple[int, int]
  view_shape: tuple[int, int]
  grid: tuple[int, int, int, int]
  tiles: Tiles
  num_objects: int
  init: Callable[[Array], Any]
  step: Callable[[Any, Array], Any]
  truth: Callable[[Any], Truth]
  scroll: Callable[[Array, Array], Array]
  draw: Callable[[Array, Array, Array], Array]
  recognise: Callable[[Array], Parts]
  moved: Callable[[Reading, Reading], tuple[Array, Array]]
  follow: Callable[[Any, Array, Reading], Any]
  paint: Callable[[Any, Array, Array, Array], Any]
  paintable: Callable[[Any, Array], Array]
  policies: Mapping[str, Policy]


def render(game: Game, truth: Truth) -> Array:
  """The frame of which this is true, u8[H, W, 3]."""
  return game.draw(truth.counters, truth.cells, truth.objects)


def moduli(counters: tuple[Counter, ...]) -> np.ndarray:
  """i32[M]: the number of values that each counter can show."""
  return np.array([10**c.num_digits for c in counters], np.int32)


def ledger(counters: tuple[Counter, ...], deltas: np.ndarray, values: Array, event: Array) -> Array:
  """The counters after an event, by arithmetic alone: N ← (N + deltas[event]) mod 10^digits.

  Args:
    counters: M counters.
    deltas: i32[E + 1, M].
    values: i32[..., M].
    event: i32[...].

  Returns:
    i32[..., M].
  """
  return (values + jnp.asarray(deltas)[event]) % moduli(counters)


@struct.dataclass
class Sightings:
  """When each cell of a map was in view; frames are numbered from 0."""

  last: Array  # i32[rows, columns] the last frame that showed it, −1 for none
  since: Array  # i32[rows, columns] the frame from which on it has been in view without a break
  away: Array  # i32[rows, columns] frames that it was out of view before `since`, or 0

  @classmethod
  def none(cls, shape: tuple[int, int]) -> 'Sightings':
    """A map of which nothing has been seen yet."""
    return cls(jnp.full(shape, -1), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32))

  def see(self, is_visible: Array, frame: Array) -> 'Sightings':
    """Notes which cells a frame shows.

    Args:
      is_visible: bool[rows, columns].
      frame: i32[] its number, that of the frame noted last or one above it.
    """
    comes = is_visible & (self.last < frame - 1)
    away = jnp.where(self.last < 0, 0, frame - 1 - self.last)
    return Sightings(jnp.where(is_visible, frame, self.last),
                     jnp.where(comes, frame, self.since), jnp.where(comes, away, self.away))

  def returned(self, frame: Array) -> Array:
    """bool[rows, columns]: the cells that came back into view in this frame."""
    return (self.away > 0) & (self.since == frame)


def is_at(shape: tuple[int, ...], place: Array) -> Array:
  """bool[rows, columns]: True in the one cell i32[2], nowhere if that lies outside.

  Compared with an index this is cheap in a batch, to run and to compile.
  """
  return ((np.arange(shape[0]) == place[0])[:, None]
          & (np.arange(shape[1]) == place[1])[None])


def unless(is_over: Array, after: Any, before: Any) -> Any:
  """The state after a step, or the one before it where the episode is over."""
  def choose(new: Array, old: Array) -> Array:
    return jnp.where(is_over, old, new)
  return jax.tree.map(choose, after, before)


def keep_or_draw(turn: Turn, num_actions: int, change: float) -> Array:
  """The last action, or with probability `change` one that is drawn at random."""
  drawn = noise.whole(noise.fold(turn.key, 1), 0, num_actions - 1)
  return jnp.where(noise.uniform(turn.key) < change, drawn, turn.last)


def random_policy(num_actions: int) -> Policy:
  """Each action with the same probability in each turn."""
  return lambda state, turn: noise.whole(turn.key, 0, num_actions - 1)
