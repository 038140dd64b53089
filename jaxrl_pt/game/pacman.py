"""Pac-Man: a maze with pellets of 10 points, and a ghost at random that costs a life.

A frame shows the whole maze of 9 × 9 cells, so that a cell is out of view only while the ghost
stands in it: whether the pellet is there again afterwards is what a memory has to know. The agent
eats whatever lies where it stands, so that its own cell is seen to be empty. Agent and ghost start
in opposite cells, and do so again after a death. The episode is over without lives or pellets.

Walls stand on the rim and on the nine pillars at even coordinates. A share of the pillars has one
more wall, to the right or below. Walls so placed cannot enclose anything: each pillar has one wall
that leads away from it, right or down, so that no ring of walls can close, and all open cells stay
connected.

Source: MaaG (arXiv 2503.21172) names the game; maze, ghost, lives and scores are our choices.
"""

import dataclasses

from flax import struct
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.game import base, display, history, noise, reading

ACTIONS = ('up', 'down', 'left', 'right', 'stay')
STAY = 4
_STEPS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)], np.int32)
_BACK = np.array([1, 0, 3, 2, 4], np.int32)  # the action that undoes each
CONTENTS = ('empty', 'wall', 'pellet')
EMPTY, WALL, PELLET = range(3)
SIDE = 9
AGENT, GHOST = 0, 1  # rows of `Truth.objects`
ATE, DIED = 1, 2
_COUNTERS = (base.Counter('score', 3), base.Counter('lives', 1))
_DELTAS = np.array([[0, 0], [10, 0], [0, -1]], np.int32)
_WORLD = SIDE, SIDE
# What a frame's chance is needed for.
_OF_WALLS, _OF_SIDES, _OF_PELLETS, _OF_START, _OF_SCORE, _OF_GHOST = range(6)

_BLACK, _BLUE, _PINK = (0, 0, 0), (40, 60, 200), (255, 190, 160)
_YELLOW, _RED = (255, 225, 0), (235, 30, 40)


@struct.dataclass
class State:
  """A maze of 9 × 9 cells."""

  key: Array  # u32[2] the key of the world
  frame: Array  # i32[] the number of the frame
  places: Array  # i32[2, 2] where agent and ghost are
  starts: Array  # i32[2, 2] where they began
  content: Array  # i32[9, 9]
  memory: Array  # i32[9, 9] what earlier frames and edits have told of each cell
  sightings: base.Sightings
  counters: Array  # i32[2] score and lives
  event: Array  # i32[] ATE, DIED or none
  moved: Array  # i32[2]
  done: Array  # bool[]


def make(config: cfg.PacMan) -> base.Game:
  """The game with these settings."""
  shape = display.scale(config.frame)
  picture = _Picture(shape)
  return base.Game(
      config=config, actions=ACTIONS, stay=STAY, events=('none', 'ate', 'died'), deltas=_DELTAS,
      counters=_COUNTERS, worth=np.array([1, 0]), contents=CONTENTS,
      frame_shape=shape.frame_shape, world_shape=_WORLD,
      view_shape=_WORLD, grid=picture.grid, tiles=picture.tiles, num_objects=2,
      init=lambda key: _init(config, key),
      step=lambda state, action: _step(config, state, action), truth=_truth,
      scroll=lambda origin, action: origin, draw=picture.draw,
      recognise=picture.recognise, moved=_moved, follow=_history, paint=_paint,
      paintable=_paintable,
      policies={'random': base.random_policy(len(ACTIONS)), 'forage': _forage})


# --- Rules ------------------------------------------------------------------------


def _init(config: cfg.PacMan, key: Array) -> State:
  first = noise.fold(key, 0)
  walls = _maze(config, first)
  odd = 1 + 2 * noise.whole(noise.fold(first, _OF_START), 0, SIDE // 2 - 1, (2,))
  starts = jnp.stack([odd, SIDE - 1 - odd])
  pellets = noise.uniform(noise.fold(first, _OF_PELLETS), _WORLD) < config.pellet_share
  content = jnp.where(walls, WALL, jnp.where(pellets, PELLET, EMPTY))
  content = jnp.where(base.is_at(_WORLD, odd), EMPTY, content)
  score = noise.whole(noise.fold(first, _OF_SCORE), config.start_low, config.start_high)
  state = State(
      key, jnp.asarray(0), starts, starts, content, jnp.full(_WORLD, base.UNKNOWN),
      base.Sightings.none(_WORLD), jnp.stack([score, jnp.full_like(score, config.lives)]),
      jnp.asarray(base.NO_EVENT), jnp.zeros(2, jnp.int32), ~(content == PELLET).any())
  return _see(state)


def _maze(config: cfg.PacMan, key: Array) -> Array:
  """bool[9, 9]: the walls."""
  line = np.arange(SIDE)
  is_rim = (line == 0) | (line == SIDE - 1)
  is_even = line % 2 == 0
  is_pillar = (is_even & ~is_rim)[:, None] & (is_even & ~is_rim)[None]
  has_wall = is_pillar & (noise.uniform(noise.fold(key, _OF_WALLS), _WORLD) < config.wall_share)
  is_below = noise.whole(noise.fold(key, _OF_SIDES), 0, 1, _WORLD) == 1
  walls = is_rim[:, None] | is_rim[None] | is_pillar
  return (walls | jnp.roll(has_wall & is_below, 1, 0) | jnp.roll(has_wall & ~is_below, 1, 1))


def _step(config: cfg.PacMan, state: State, action: Array) -> State:
  frame = state.frame + 1
  seen = _shown(state)
  memory = jnp.where(seen == base.UNKNOWN, state.memory, seen)
  agent = _walk(state.content, state.places[AGENT], action)
  ghost = _haunt(config, state, noise.fold(state.key, frame))
  places = jnp.stack([agent, ghost])
  crossed = (agent == state.places[GHOST]).all() & (ghost == state.places[AGENT]).all()
  is_caught = (agent == ghost).all() | crossed
  eaten = base.is_at(_WORLD, agent) & (state.content == PELLET) & ~is_caught
  ate = eaten.any()
  event = jnp.where(is_caught, DIED, jnp.where(ate, ATE, base.NO_EVENT))
  places = jnp.where(is_caught, state.starts, places)
  content = jnp.where(eaten, EMPTY, state.content)
  counters = base.ledger(_COUNTERS, _DELTAS, state.counters, event)
  after = dataclasses.replace(
      state, frame=frame, places=places, content=content, memory=memory, counters=counters,
      event=event,
      moved=places[AGENT] - state.places[AGENT],
      done=(counters[1] == 0) | ~(content == PELLET).any())
  return _see(base.unless(state.done, after, dataclasses.replace(
      state, frame=frame, memory=memory, event=jnp.zeros_like(event),
      moved=jnp.zeros_like(state.moved))))


def _walk(content: Array, place: Array, action: Array) -> Array:
  """i32[2]: where an action leads; walls stop it."""
  target = place + jnp.asarray(_STEPS)[action]
  is_wall = (base.is_at(_WORLD, target) & (content == WALL)).any()
  return jnp.where(is_wall, place, target)


def _haunt(config: cfg.PacMan, state: State, key: Array) -> Array:
  """i32[2]: the ghost's next cell, one of the open neighbours or the one it is in."""
  targets = state.places[GHOST] + _STEPS[:4]
  is_open = _around(state.content, state.places[GHOST])[:4] != WALL
  chosen = jnp.where(is_open, noise.uniform(noise.fold(key, _OF_GHOST), (4,)), -1.0).argmax()
  moves = (noise.uniform(key) < config.ghost_rate) & is_open.any()
  return jnp.where(moves, targets[chosen], state.places[GHOST])


def _around(content: Array, place: Array) -> Array:
  """i32[5]: what the cells hold to which each action leads, walls or not."""
  here = base.is_at(_WORLD, place)
  return jnp.stack([(jnp.roll(here, (row, column), (0, 1)) * content).sum()
                    for row, column in _STEPS.tolist()])


def _shown(state: State) -> Array:
  """i32[9, 9]: what the frame shows of each cell; the ghost hides its own."""
  return jnp.where(base.is_at(_WORLD, state.places[GHOST]), base.UNKNOWN, state.content)


def _see(state: State) -> State:
  """Notes which cells the frame shows."""
  is_visible = _shown(state) != base.UNKNOWN
  return dataclasses.replace(state, sightings=state.sightings.see(is_visible, state.frame))


def _truth(state: State) -> base.Truth:
  shown = _shown(state)
  is_visible = shown != base.UNKNOWN
  return base.Truth(
      counters=state.counters, event=state.event, moved=state.moved, pose=state.places[AGENT],
      origin=jnp.zeros(2, jnp.int32), cells=shown, memory=state.memory,
      away=jnp.where(is_visible, state.sightings.away, 0),
      returned=is_visible & state.sightings.returned(state.frame), objects=state.places,
      done=state.done)


def _history(past: history.History, action: Array, shown: base.Reading) -> history.History:
  """The agent eats where the frame shows it; it has died where it and the ghost start anew.

  In an unreadable frame the agent is taken to be where the action leads, and the ghost to wait.
  """
  frame, (agent, ghost) = past.frame + 1, past.objects
  target = _walk(past.world, agent, action)
  objects = jnp.where(shown.readable, shown.objects, jnp.stack([target, ghost]))
  is_apart = ((objects[AGENT] != target).any()
              | (jnp.abs(objects[GHOST] - ghost).sum() > 1))
  died = (objects == past.starts).all() & is_apart & shown.readable
  eaten = base.is_at(_WORLD, objects[AGENT]) & (past.world == PELLET) & ~died
  event = jnp.where(died, DIED, jnp.where(eaten.any(), ATE, base.NO_EVENT))
  counters = base.ledger(_COUNTERS, _DELTAS, past.claims.counters, event)
  world = jnp.where(eaten, EMPTY, past.world)
  is_visible = ~(base.is_at(_WORLD, objects[AGENT]) | base.is_at(_WORLD, objects[GHOST]))
  sightings = past.sightings.see(is_visible, frame)
  is_due = is_visible & (past.since >= 0) & (past.since < frame) & (world != WALL)
  claims = history.claim(
      dataclasses.replace(past, world=world), sightings, past.origin, is_due=is_due,
      is_bare=jnp.zeros_like(is_due), event=event, counters=counters, moved=target - agent,
      is_move=~died)
  is_named = is_visible & shown.readable & (world == base.UNKNOWN)
  world = jnp.where(is_named, shown.cells, world)
  is_over = (counters[1] == 0) | ~((world == PELLET) | (world == base.UNKNOWN)).any()
  after = dataclasses.replace(
      past, claims=claims, pose=objects[AGENT], objects=objects, world=world,
      since=jnp.where(is_named, frame, past.since), sightings=sightings,
      done=past.done | is_over)
  return history.freeze(past, after)


def _moved(before: base.Reading, after: base.Reading) -> tuple[Array, Array]:
  return after.objects[AGENT] - before.objects[AGENT], jnp.asarray(True)


def _paint(state: State, row: Array, column: Array, content: Array) -> State:
  here = base.is_at(_WORLD, jnp.stack([row, column]))
  painted = jnp.where(here, content, state.content)
  return dataclasses.replace(
      state, content=painted, memory=jnp.where(here, content, state.memory),
      done=(state.counters[1] == 0) | ~(painted == PELLET).any())


def _paintable(state: State, content: Array) -> Array:
  """The inside of the maze; cells where somebody stands or starts can only be emptied."""
  line = np.arange(SIDE)
  is_inside = (line > 0) & (line < SIDE - 1)
  is_taken = jnp.stack([base.is_at(_WORLD, place)
                        for place in (*state.places, *state.starts)]).any(0)
  return jnp.asarray(is_inside[:, None] & is_inside[None]) & (~is_taken | (content == EMPTY))


# --- Policies ---------------------------------------------------------------------


def _forage(state: State, turn: base.Turn) -> Array:
  """Goes where a pellet is and the ghost is not, else straight on, and turns back last."""
  targets = state.places[AGENT] + _STEPS
  content = _around(state.content, state.places[AGENT])
  far = jnp.abs(targets - state.places[GHOST]).sum(-1)
  action = np.arange(len(ACTIONS))
  worth = (3.0 * (content == PELLET) - 6.0 * (far <= 1) - 20.0 * (content == WALL)
           + 1.0 * (action == turn.last) - 1.0 * (action == jnp.asarray(_BACK)[turn.last])
           - 2.0 * (action == STAY))
  return (worth + 2 * noise.uniform(turn.key, (len(ACTIONS),))).argmax()


# --- Frames -----------------------------------------------------------------------


class _Picture:
  """How a frame is drawn and recognised: score, lives, and the maze with whoever is in it."""

  def __init__(self, shape: display.Scale) -> None:
    unit = shape.unit
    self._background = display.background(shape, (display.NUM_ROWS - 1, _BLACK))
    self._score = display.Digits(3, _COUNTERS[0].num_digits, unit)
    self._lives = display.Digits(26, _COUNTERS[1].num_digits, unit)
    cell = {1: (2, 3), 2: (5, 6), 4: (10, 12)}[unit]
    height, width = shape.frame_shape
    self._top, self._left = height - SIDE * cell[0], (width - SIDE * cell[1]) // 2
    self._tiles = _tiles(*cell)
    self.grid = self._top, self._left, *cell

  @property
  def tiles(self) -> base.Tiles:
    colours = np.array((_BLACK, _BLUE, _PINK), np.float32) / 255
    everything = np.ones(len(CONTENTS), bool)
    return base.Tiles(self._tiles[:len(CONTENTS)], everything, ~everything, colours)

  def draw(self, counters: Array, cells: Array, objects: Array) -> Array:
    canvas = self._score.draw(jnp.asarray(self._background), counters[0])
    canvas = self._lives.draw(canvas, counters[1])
    for index in (GHOST, AGENT):
      cells = jnp.where(base.is_at(_WORLD, objects[index]), len(CONTENTS) + index, cells)
    return display.paste_grid(canvas, jnp.asarray(self._tiles)[cells], self._top, self._left)

  def recognise(self, frame: Array) -> base.Parts:
    score, in_score = reading.classify(self._score.cut(frame), self._score.templates / 255)
    lives, in_lives = reading.classify(self._lives.cut(frame), self._lives.templates / 255)
    tiles = display.cut_grid(frame, self._top, self._left, _WORLD, self._tiles.shape[1:3])
    found, in_tiles = reading.classify(tiles.reshape(SIDE * SIDE, *tiles.shape[2:]),
                                       self._tiles / 255)
    # A frame that shows somebody twice or not at all is drawn differently, and unreadable.
    where = [(found == len(CONTENTS) + index).argmax() for index in (AGENT, GHOST)]
    objects = jnp.stack([jnp.stack([at // SIDE, at % SIDE]) for at in where])
    cells = jnp.where(found == len(CONTENTS) + AGENT, EMPTY,
                      jnp.where(found == len(CONTENTS) + GHOST, base.UNKNOWN, found))
    counters = jnp.stack([self._score.join(score), self._lives.join(lives)])
    blend = jnp.concatenate([in_score, in_lives, in_tiles]).max()
    return base.Parts(counters, cells.reshape(_WORLD), objects, blend)


def _tiles(height: int, width: int) -> np.ndarray:
  """u8[5, height, width, 3]: empty, wall, pellet, agent and ghost, in pixels."""
  tiles = np.full((5, height, width, 3), _BLACK, np.uint8)
  tiles[WALL] = _BLUE
  tiles[PELLET, height // 2, (width - 1) // 2:width // 2 + 1] = _PINK
  tiles[len(CONTENTS) + AGENT] = _YELLOW
  tiles[len(CONTENTS) + GHOST] = _RED
  if height > 2:
    for index in (AGENT, GHOST):  # Round shoulders.
      tiles[len(CONTENTS) + index][[0, 0], [0, -1]] = _BLACK
    tiles[len(CONTENTS) + AGENT, height // 2, width // 2:] = _BLACK  # a mouth
    tiles[len(CONTENTS) + GHOST, 1, [1, -2]] = _PINK  # two eyes
  return tiles
