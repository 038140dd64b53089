"""Traveler: a street of cells; entering a cell for the first time builds on it and scores 1.

The agent stands in the fourth of the eight cells that a frame shows, and the street scrolls by one
cell with each step. What colour a new building gets follows from the key of the world and from
nothing that a frame shows, so that a building that comes back into view can be drawn only from
memory. The street ends in walls.

Source: MaaG (arXiv 2503.21172) names the game, its agent, its buildings and its score. The camera,
the palette, the sizes and the ends of the street are our choices.
"""

import dataclasses

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.game import base, display, history, noise, reading

ACTIONS = ('left', 'stay', 'right')
STAY = 1
CONTENTS = ('ground', 'red', 'green', 'blue', 'yellow', 'magenta', 'teal', 'edge')
GROUND, EDGE = 0, 7
VIEW = 8  # cells of a frame
AGENT = 3  # the cell of the view in which the agent stands
_COUNTERS = (base.Counter('score', 3),)
_DELTAS = np.array([[0], [1]], np.int32)

_SKY, _GRASS, _WINDOW = (205, 225, 240), (90, 150, 80), (250, 245, 210)
_WALK, _STREET, _BLACK = (225, 215, 195), (120, 120, 125), (10, 10, 10)
_BUILDINGS = ((205, 50, 50), (60, 150, 60), (50, 80, 210), (240, 200, 50), (190, 70, 190),
              (30, 170, 170), (90, 60, 40))
_CELL = 4  # units
_AGENT_SHAPE = 3, 2  # units


@struct.dataclass
class State:
  """A street of L cells."""

  key: Array  # u32[2] the key of the world, which no step reads
  frame: Array  # i32[] the number of the frame
  position: Array  # i32[] the agent's cell
  colours: Array  # i32[1, L] what is on each cell, or would be built there
  built: Array  # i32[1, L] the frame from which on there is a building, −1 for none
  known: Array  # bool[1, L] an earlier frame has shown the cell, or somebody has painted it
  sightings: base.Sightings
  counters: Array  # i32[1]
  event: Array  # i32[]
  moved: Array  # i32[2]


def make(config: cfg.Traveler) -> base.Game:
  """The game with these settings."""
  shape = display.scale(config.frame)
  picture = _Picture(shape)
  return base.Game(
      config=config, actions=ACTIONS, stay=STAY, events=('none', 'built'), deltas=_DELTAS,
      counters=_COUNTERS, worth=np.array([1]), contents=CONTENTS, frame_shape=shape.frame_shape,
      world_shape=(1, config.num_cells), view_shape=(1, VIEW), grid=picture.grid,
      tiles=picture.tiles, num_objects=1, init=lambda key: _init(config, key),
      step=_step, truth=_truth, scroll=lambda origin, action: _scroll(config, origin, action),
      draw=picture.draw, recognise=picture.recognise, moved=_moved, follow=_history,
      paint=_paint, paintable=_paintable,
      policies={'random': base.random_policy(len(ACTIONS)), 'wander': _wander,
                'out_and_back': _out_and_back})


# --- Rules ------------------------------------------------------------------------


def _init(config: cfg.Traveler, key: Array) -> State:
  length = config.num_cells
  drawn = noise.whole(noise.fold(key, 0), 1, config.num_colours, (length,))
  if config.period:
    drawn = drawn[np.arange(length) % config.period]
  score = noise.whole(noise.fold(key, 1), config.start_low, config.start_high, (1,))
  built = jnp.where(np.arange(length) == length // 2, 0, -1)[None]
  state = State(key, jnp.asarray(0), jnp.asarray(length // 2), drawn[None], built,
                jnp.zeros((1, length), bool), base.Sightings.none((1, length)), score,
                jnp.asarray(base.NO_EVENT), jnp.zeros(2, jnp.int32))
  return _see(state)


def _step(state: State, action: Array) -> State:
  last = state.built.shape[1] - 1
  position = jnp.clip(state.position + action - STAY, 0, last)
  frame = state.frame + 1
  is_new = (np.arange(last + 1) == position) & (state.built < 0)
  event = is_new.any().astype(jnp.int32)
  moved = jnp.stack([jnp.zeros_like(position), position - state.position])
  return _see(dataclasses.replace(
      state, frame=frame, position=position, built=jnp.where(is_new, frame, state.built),
      known=state.known | _in_view(state.position, last + 1), event=event, moved=moved,
      counters=base.ledger(_COUNTERS, _DELTAS, state.counters, event)))


def _scroll(config: cfg.Traveler, origin: Array, action: Array) -> Array:
  column = jnp.clip(origin[1] + action - STAY, -AGENT, config.num_cells - 1 - AGENT)
  return jnp.stack([origin[0], column])


def _in_view(position: Array, length: int) -> Array:
  """bool[1, L]: the cells that a frame shows of an agent at a position."""
  offset = jnp.arange(length) - (position - AGENT)
  return ((offset >= 0) & (offset < VIEW))[None]


def _see(state: State) -> State:
  """Notes which cells the frame shows."""
  is_visible = _in_view(state.position, state.built.shape[1])
  return dataclasses.replace(state, sightings=state.sightings.see(is_visible, state.frame))


def _truth(state: State) -> base.Truth:
  origin = state.position - AGENT
  at = origin + np.arange(VIEW)
  inside = (at >= 0) & (at < state.built.shape[1])
  returned = state.sightings.returned(state.frame)
  world = jnp.concatenate([state.built, state.colours, state.known, state.sightings.away,
                           returned])
  # Cells outside the street are copies of others here, which `inside` tells.
  padded = jnp.pad(world, ((0, 0), (VIEW, VIEW)))
  view = jax.lax.dynamic_slice_in_dim(padded, origin + VIEW, VIEW, axis=1)[:, None]
  built, colours, known, away, returned = jnp.where(inside, view, 0)
  zero = jnp.zeros_like(origin)
  built, colours = jnp.where(inside, built, -1), jnp.where(inside, colours, EDGE)
  return base.Truth(
      counters=state.counters, event=state.event, moved=state.moved,
      pose=jnp.stack([zero, state.position]), origin=jnp.stack([zero, origin]),
      cells=jnp.where((built >= 0) | ~inside, colours, GROUND),
      memory=jnp.where((built >= 0) & (built < state.frame), colours,
                       jnp.where(known, GROUND, base.UNKNOWN)),
      away=away, returned=returned.astype(bool),
      objects=jnp.stack([zero, zero + AGENT])[None], done=jnp.asarray(False))


def _history(past: history.History, action: Array, shown: base.Reading) -> history.History:
  """Entering a cell for the first time builds on it; the frame that shows the building names it."""
  frame, last = past.frame + 1, past.since.shape[1] - 1
  position = jnp.clip(past.pose[1] + action - STAY, 0, last)
  is_new = (np.arange(last + 1) == position) & (past.since < 0)
  event, since = is_new.any().astype(jnp.int32), jnp.where(is_new, frame, past.since)
  origin = jnp.stack([past.origin[0], position - AGENT])
  is_visible = _in_view(position, last + 1)
  sightings = past.sightings.see(is_visible, frame)
  moved = jnp.stack([jnp.zeros_like(position), position - past.pose[1]])
  claims = history.claim(
      past, sightings, origin, is_due=(since >= 0) & (since < frame), is_bare=since < 0,
      event=event, counters=base.ledger(_COUNTERS, _DELTAS, past.claims.counters, event),
      moved=moved)
  seen = history.window(shown.cells, -origin, (1, last + 1), base.UNKNOWN)
  is_named = ((since >= 0) & shown.readable & (past.world == base.UNKNOWN)
              & (seen > GROUND) & (seen < EDGE))
  return dataclasses.replace(
      past, claims=claims, frame=frame, pose=past.pose + moved, origin=origin, since=since,
      world=jnp.where(is_named, seen, past.world), sightings=sightings)


def _moved(before: base.Reading, after: base.Reading) -> tuple[Array, Array]:
  """The scroll under which most cells agree; doubtful where two scrolls agree equally well.

  The agent's own cell is left out, since it may have been built on between the two frames.
  """
  wrong = []
  for scroll in (-1, 0, 1):
    new = np.array([j for j in range(VIEW) if 0 <= j + scroll < VIEW and j != AGENT])
    wrong.append((before.cells[0, new + scroll] != after.cells[0, new]).mean())
  share = jnp.stack(wrong)
  best = share.argmin()
  return jnp.stack([jnp.zeros_like(best), best - 1]), (share == share[best]).sum() == 1


def _paint(state: State, row: Array, column: Array, content: Array) -> State:
  """A building of a colour, or ground, that is known from the next frame on."""
  here = base.is_at(state.built.shape, jnp.stack([row, column]))
  emptied, coloured = here & (content == GROUND), here & (content != GROUND)
  built = jnp.where(coloured & (state.built < 0), state.frame, state.built)
  return _see(dataclasses.replace(
      state, built=jnp.where(emptied, -1, built),
      colours=jnp.where(coloured, content, state.colours), known=state.known | emptied))


def _paintable(state: State, content: Array) -> Array:
  return jnp.broadcast_to(content != EDGE, state.built.shape)


# --- Policies ---------------------------------------------------------------------


def _wander(state: State, turn: base.Turn) -> Array:
  """Goes on as before for eight steps on average."""
  del state
  return base.keep_or_draw(turn, len(ACTIONS), 1 / 8)


def _out_and_back(state: State, turn: base.Turn) -> Array:
  """Goes one way for half of the episode and comes back; the world's key says which way first."""
  first = 2 * noise.whole(noise.fold(state.key, 2), 0, 1) - 1
  is_out = turn.frame < turn.num_frames // 2
  return STAY + jnp.where(is_out, first, -first)


# --- Frames -----------------------------------------------------------------------


class _Picture:
  """How a frame is drawn and recognised: display, cells, and the pavement with the agent."""

  def __init__(self, shape: display.Scale) -> None:
    unit = shape.unit
    walk_row = shape.rows - 6
    self._background = display.background(
        shape, (display.NUM_ROWS, _SKY), (walk_row, _WALK), (walk_row + 3, _STREET))
    self._digits = display.Digits(1, _COUNTERS[0].num_digits, unit)
    self._cells_top, self._walk_top = display.NUM_ROWS * unit, walk_row * unit
    self._cells = display.enlarged(_cell_tiles(walk_row - display.NUM_ROWS), unit)
    self._walks = display.enlarged(_walk_tiles(), unit)
    self.grid = self._cells_top, 0, *self._cells.shape[1:3]

  @property
  def tiles(self) -> base.Tiles:
    """Buildings stay, and ground may be built on."""
    contents = np.arange(len(CONTENTS))
    colours = self._cells.astype(np.float32).mean((1, 2)) / 255
    return base.Tiles(self._cells, contents != EDGE, contents == GROUND, colours)

  def draw(self, counters: Array, cells: Array, objects: Array) -> Array:
    canvas = self._digits.draw(jnp.asarray(self._background), counters[0])
    canvas = display.paste_grid(canvas, jnp.asarray(self._cells)[cells], self._cells_top, 0)
    walk = jnp.asarray(self._walks)[objects[:1, 1]]
    return display.paste_grid(canvas, walk[None], self._walk_top, 0)

  def recognise(self, frame: Array) -> base.Parts:
    digits, in_digits = reading.classify(self._digits.cut(frame), self._digits.templates / 255)
    tiles = display.cut_grid(frame, self._cells_top, 0, (1, VIEW), self._cells.shape[1:3])
    cells, in_cells = reading.classify(tiles[0], self._cells / 255)
    walk = display.cut_grid(frame, self._walk_top, 0, (1, 1), self._walks.shape[1:3])
    agent, in_walk = reading.classify(walk[0], self._walks / 255)
    blend = jnp.concatenate([in_digits, in_cells, in_walk]).max()
    objects = jnp.stack([jnp.zeros_like(agent), agent], -1)
    return base.Parts(self._digits.join(digits)[None], cells[None], objects, blend)


def _cell_tiles(height: int) -> np.ndarray:
  """u8[8, height, 4, 3]: what each content looks like, in units."""
  tiles = np.full((len(CONTENTS), height, _CELL, 3), _SKY, np.uint8)
  tiles[GROUND, -1] = _GRASS
  for tile, colour in zip(tiles[1:], _BUILDINGS, strict=True):
    tile[2:] = colour
    tile[2:, 0] = np.array(colour) * 7 // 10  # The shaded side tells neighbours of a colour apart.
  tiles[1:EDGE, 4:-2:3, 2] = _WINDOW
  tiles[EDGE, :2] = _BUILDINGS[-1]
  return tiles


def _walk_tiles() -> np.ndarray:
  """u8[8, 3, 32, 3]: the pavement with the agent in each cell of the view, in units."""
  height, width = _AGENT_SHAPE
  tiles = np.full((VIEW, height, VIEW * _CELL, 3), _WALK, np.uint8)
  for cell, tile in enumerate(tiles):
    tile[:, cell * _CELL + 1:cell * _CELL + 1 + width] = _BLACK
  return tiles
