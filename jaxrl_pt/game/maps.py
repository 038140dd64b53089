"""The spatial module's map: what is remembered of each cell, and told to the model in view of it.

A map has a colour for each cell of the world and says whether it knows it. Before a frame is drawn,
`retrieve` finds the cells that will be in view, and `contents_of` says what a model is told of
them. Afterwards `write` keeps what the frame shows of cells of which the map does not know
something that stays (or of all of them, where the last one counts): that ground is bare is
remembered too, and gives way to what is built on it. All functions take one game.

Source: MaaG (arXiv 2503.21172) keeps an external map of explored areas, retrieves its local content
and links new observations to it. Colours as entries and the rules of writing are our choices.
"""

import dataclasses

from flax import struct
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.game import base, display, history, reading


@struct.dataclass
class Map:
  """What is remembered of a world."""

  colours: Array  # f32[rows, columns, 3] from 0 to 1; 0 where nothing is known
  known: Array  # bool[rows, columns]
  settled: Array  # bool[rows, columns] known to hold what stays; on other cells something may come

  @classmethod
  def empty(cls, shape: tuple[int, int]) -> 'Map':
    """A map that knows nothing."""
    nowhere = jnp.zeros(shape, bool)
    return cls(jnp.zeros((*shape, 3)), nowhere, nowhere)


@struct.dataclass
class View:
  """What a frame shows of the cells of the view, as a map keeps it."""

  colours: Array  # f32[h, w, 3]
  shown: Array  # bool[h, w] whether the cell can be seen
  kept: Array  # bool[h, w] whether it shows what a map keeps
  settled: Array  # bool[h, w] whether that stays


def check(game: base.Game, memory: cfg.MapMemory | cfg.NoMap) -> None:
  """Refuses what a game's map cannot do.

  Raises:
    UserError: the game has no map, or it cannot keep pixels, or its view does not move.
  """
  if isinstance(memory, cfg.NoMap):
    return
  name = type(game.config).__name__
  if not game.contents:
    raise UserError(f'{name} has no map: choose MaaG.map = @cfg.NoMap().')
  if game.view_shape != game.world_shape:
    return
  # Agent and ghost stand on the cells, so that their pixels would be remembered.
  if memory.entries == 'colours':
    raise UserError(f"MapMemory.entries = 'colours' would remember who stands on the cells of "
                    f"{name}: choose 'contents'.")
  if isinstance(memory.localisation, cfg.SlidingWindow):
    raise UserError(f'{name} always shows its whole world, where nothing has to be found: choose '
                    'MapMemory.localisation = @cfg.DeadReckoning().')


def buildable(game: base.Game) -> np.ndarray:
  """i32[N]: the contents that chance, or a person, may put into a cell: no walls and no edges."""
  return np.array([index for index, name in enumerate(game.contents)
                   if game.tiles.settled[index] and name != 'wall'], np.int32)


def colours_of(game: base.Game, contents: Array) -> Array:
  """f32[..., 3]: the colours that stand for contents i32[...]; 0 where UNKNOWN."""
  if not game.contents:
    return jnp.zeros((*contents.shape, 3))
  known = contents != base.UNKNOWN
  return jnp.where(known[..., None], jnp.asarray(game.tiles.colours)[contents], 0.0)


def contents_of(game: base.Game, colours: Array, known: Array) -> Array:
  """i32[...]: the contents whose colours are nearest to f32[..., 3], or UNKNOWN; what models read.

  Args:
    game: the game.
    colours: f32[..., 3].
    known: bool[...].
  """
  if not game.contents:
    return jnp.full(known.shape, base.UNKNOWN)
  nearest, _ = reading.classify(colours.reshape(-1, 3), game.tiles.colours)
  return jnp.where(known, nearest.reshape(known.shape), base.UNKNOWN)


def retrieve(remembered: Map, origin: Array, shape: tuple[int, int]) -> tuple[Array, Array]:
  """Colours f32[h, w, 3] of the view that begins at i32[2] `origin`, and bool[h, w] if known."""
  return (history.window(remembered.colours, origin, shape, 0),
          history.window(remembered.known, origin, shape, False))


def see(game: base.Game, frame: Array, entries: cfg.MapEntries) -> View:
  """What a frame f32[H, W, 3] shows of the cells of the view."""
  if not game.contents:
    none = jnp.zeros(game.view_shape, bool)
    return View(jnp.zeros((*game.view_shape, 3)), none, none, none)
  frame = reading.as_float(frame)
  contents = game.recognise(frame).cells
  colours, shown = colours_of(game, contents), contents != base.UNKNOWN
  if entries == 'colours':
    top, left, *cell = game.grid
    colours = display.cut_grid(frame, top, left, game.view_shape, (cell[0], cell[1])).mean((2, 3))
  is_one_of = lambda table: shown & jnp.asarray(table)[contents]
  return View(colours, shown, is_one_of(game.tiles.kept), is_one_of(game.tiles.settled))


def write(remembered: Map, view: View, origin: Array, writes: cfg.MapWrites) -> Map:
  """The map with what a frame shows.

  Args:
    remembered: the map.
    view: from `see`.
    origin: i32[2] where the view begins.
    writes: 'first' leaves what is settled as it is; over ground it writes what is built there.
  """
  shape = remembered.known.shape
  assert len(shape) == 2
  back = lambda array, outside: history.window(array, -origin, shape, outside)
  is_new = back(view.kept, False)
  if writes == 'first':
    is_new &= ~remembered.settled
  return Map(jnp.where(is_new[..., None], back(view.colours, 0), remembered.colours),
             remembered.known | is_new,
             jnp.where(is_new, back(view.settled, False), remembered.settled))


def paint(game: base.Game, remembered: Map, cell: Array, content: Array) -> Map:
  """The map after somebody has painted a content, i32[], into a cell, i32[2].

  A content that maps do not keep makes the map forget the cell. What comes from outside is checked
  by `edits.check_cell`.
  """
  here = base.is_at(remembered.known.shape, cell)
  is_kept = jnp.asarray(game.tiles.kept)[content]
  colour = jnp.where(is_kept, jnp.asarray(game.tiles.colours)[content], 0.0)
  return dataclasses.replace(
      remembered, colours=jnp.where(here[..., None], colour, remembered.colours),
      known=jnp.where(here, is_kept, remembered.known),
      settled=jnp.where(here, jnp.asarray(game.tiles.settled)[content], remembered.settled))
