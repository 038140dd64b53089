"""Games that are being played in a model, one for each tab of a browser, beside the true game.

A frame is one program: the true game's step, LogicNet, ledger, retrieval, the model's frame,
linking and writing, and what the page shows of them. All games share the compiled programs.
"""

from base64 import b64encode
from collections import OrderedDict
from collections.abc import Callable
import dataclasses
import secrets
import threading
import time
from typing import Any, NamedTuple

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError, shown
from jaxrl_pt.game import base, dream, edits, history, maps, noise, reading, trajectories

MOST_ROOMS = 32  # The one that has waited for longest gives way.
IDLE_SECONDS = 900.0
_MARGIN = 12  # cells of the map beyond the view that the page shows
_OF_DREAM = 3  # a key beside those of `trajectories`


class Stage(NamedTuple):
  """What is played: a world, its parameters for a game's key u32[2], and the modules round it."""

  world: dream.World
  params_of: Callable[[Array], Any]
  modules: cfg.MaaG


@struct.dataclass
class Held:
  """One game: in the model (B = 1) and in truth."""

  dream: dream.Dream
  true: Any


@struct.dataclass
class Shown:
  """What the page shows after a frame."""

  frame: Array  # u8[H, W, 3] the model's
  true_frame: Array  # u8[H, W, 3]
  values: Array  # i32[M] the ledger
  true_values: Array  # i32[M]
  read: Array  # i32[M] what is read of the model's frame
  readable: Array  # bool[]
  predicted: Array  # i32[] the event that LogicNet expected
  true_event: Array  # i32[]
  origin: Array  # i32[2] where the view begins
  cells: Array  # i32[rows, columns] what the map has round the view, UNKNOWN where nothing
  corner: Array  # i32[2] the world coordinates of the first of these
  done: Array  # bool[] the true game is over


class Programs:
  """The compiled programs of a stage. Final."""

  def __init__(self, stage: Stage) -> None:
    self.stage = stage
    self.begin = jax.jit(self._begin)
    self.step = jax.jit(self._step)
    self.look = jax.jit(self._look)

  def _begin(self, params: Any, key: Array) -> tuple[Held, Shown]:
    game = self.stage.world.game
    true = game.init(noise.fold(key, trajectories.OF_WORLD))
    truth = game.truth(true)
    frame = base.render(game, truth)
    started = dream.start(self.stage.world, params, frame[None],
                          jax.tree.map(lambda x: x[None], truth), noise.fold(key, _OF_DREAM)[None])
    held = Held(started, true)
    fixed: Held = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), held)
    return fixed, self._shown(fixed, frame, truth.event)

  def _step(self, params: Any, held: Held, action: Array, on: dream.Switches) -> tuple[Held, Shown]:
    game = self.stage.world.game
    true = game.step(held.true, action)
    event = game.truth(true).event
    given = dataclasses.replace(dream.given(action[None]), events=event[None])
    after, drawn = dream.step(self.stage.world, params, held.dream, given, on)
    alike = lambda new, old: jax.lax.convert_element_type(new, old.dtype)
    held = jax.tree.map(alike, Held(after, true), held)
    return held, self._shown(held, drawn.frames[0], drawn.predicted[0])

  def _look(self, held: Held, frame: Array) -> Shown:
    return self._shown(held, frame, jnp.asarray(base.NO_EVENT, jnp.int32))

  def _shown(self, held: Held, frame: Array, predicted: Array) -> Shown:
    game = self.stage.world.game
    truth = game.truth(held.true)
    values, origin, remembered = (jax.tree.map(lambda x: x[0], part) for part in (
        held.dream.values, held.dream.origin, held.dream.map))
    read, pixels = reading.read(game, frame), reading.as_float(frame)
    # The whole of a small world, and of a street what is near.
    shape = tuple(min(size, view + 2 * _MARGIN) for size, view in zip(
        game.world_shape, game.view_shape, strict=True))
    corner = jnp.clip(origin - jnp.array([(s - v) // 2 for s, v in zip(
        shape, game.view_shape, strict=True)]), 0, np.array(game.world_shape) - np.array(shape))
    contents = maps.contents_of(game, remembered.colours, remembered.known)
    cells = history.window(contents, corner, (shape[0], shape[1]), base.UNKNOWN)
    return Shown(
        jnp.round(jnp.clip(pixels, 0, 1) * 255).astype(jnp.uint8), base.render(game, truth),
        values, truth.counters, read.counters, read.readable, predicted, truth.event,
        origin, cells, corner, truth.done)


class Room:
  """A game of one tab; its methods are called by one thread at a time (`lock`). Final."""

  def __init__(self, programs: Programs, seed: int) -> None:
    self.lock = threading.Lock()
    self.used = time.monotonic()
    self._programs = programs
    self._game = programs.stage.world.game
    self.restart(seed)

  def restart(self, seed: int) -> None:
    """Begins a world anew, with all modules as the settings have them.

    Raises:
      UserError: no seed of 32 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
      raise UserError(f'A seed is a whole number from 0 to {2**32 - 1}, not {shown(seed)}.')
    key = noise.key(seed)
    self._params = self._programs.stage.params_of(key)
    self._held, self._shown = self._programs.begin(self._params, key)
    self._on = dream.switches(self._programs.stage.modules)
    self._number, self._seconds = 0, 0.0

  def step(self, action: Any) -> None:
    """Draws the next frame.

    Raises:
      UserError: an action outside the game.
    """
    if isinstance(action, bool) or not isinstance(action, int):
      raise UserError(f'An action is a whole number, not {shown(action)}: give 0 to '
                      f'{len(self._game.actions) - 1} for {", ".join(self._game.actions)}.')
    checked = edits.check_actions(self._game, [action])[0]
    start = time.perf_counter()
    self._held, self._shown = jax.block_until_ready(self._programs.step(
        self._params, self._held, jnp.asarray(checked), self._on))
    self._number, self._seconds = self._number + 1, time.perf_counter() - start

  def paint(self, cell: Any, content: Any) -> None:
    """Paints a cell of the map, and of the true game.

    Raises:
      UserError: a cell outside the world, or one that cannot become that.
    """
    if not (isinstance(cell, list) and len(cell) == 2
            and all(isinstance(x, int) and not isinstance(x, bool) for x in cell)):
      raise UserError(f'A cell is its row and its column, such as [0, 500], not {shown(cell)}.')
    if isinstance(self._programs.stage.world.memory, cfg.NoMap):
      raise UserError('This model is played without a map: there is nothing to paint.')
    place = cell[0], cell[1]
    true = edits.paint(self._game, self._held.true, place, content)
    index = edits.check_cell(self._game, place, content)
    dreamed = dream.paint(self._game, self._held.dream, jnp.asarray([place], jnp.int32),
                          jnp.asarray([index], jnp.int32))
    self._edited(dreamed, true)

  def set_counters(self, values: Any) -> None:
    """Sets the numbers of ledger and true game; the model shows them from the next frame on.

    Raises:
      UserError: numbers that the display cannot show.
    """
    if not (isinstance(values, list)
            and all(isinstance(x, int) and not isinstance(x, bool) for x in values)):
      raise UserError(f'Numbers are a list of whole ones, not {shown(values)}.')
    true = edits.set_counters(self._game, self._held.true, values)
    self._edited(dream.set_values(self._held.dream, jnp.asarray([values], jnp.int32)), true)

  def _edited(self, dreamed: dream.Dream, true: Any) -> None:
    # The types stay those that the programs were compiled for.
    alike = lambda new, old: jnp.asarray(new).astype(old.dtype)
    self._held = jax.tree.map(alike, Held(dreamed, true), self._held)
    self._shown = dataclasses.replace(
        self._programs.look(self._held, self._shown.frame), predicted=self._shown.predicted)

  def switch(self, values: dict[str, Any]) -> None:
    """Turns modules on and off: `events` as `cfg.Events`, `counters` and `map` true or false.

    Raises:
      UserError: no such switch or position.
    """
    on = self._on
    for name, value in values.items():
      if name == 'events':
        if value not in dream.EVENTS:
          raise UserError(f'events = {shown(value)}: choose one of {", ".join(dream.EVENTS)}.')
        on = dataclasses.replace(on, events=jnp.asarray(dream.EVENTS.index(value)))
      elif name in ('counters', 'map') and isinstance(value, bool):
        on = dataclasses.replace(on, **{name: jnp.asarray(value)})
      else:
        raise UserError(f'There is no switch {shown(name)} = {shown(value)}: set events, or '
                        'counters and map to true or false.')
    self._on = on

  def state(self) -> dict[str, Any]:
    """What the page shows, for JSON; frames as rows of bytes in base 64."""
    view = jax.tree.map(np.asarray, self._shown)
    events = self._game.events
    return {
        'frame': _base64(view.frame), 'true_frame': _base64(view.true_frame),
        'values': view.values.tolist(), 'true_values': view.true_values.tolist(),
        'read': view.read.tolist() if view.readable else None,
        'predicted': events[int(view.predicted)], 'true_event': events[int(view.true_event)],
        'origin': view.origin.tolist(), 'corner': view.corner.tolist(),
        'cells': view.cells.tolist(), 'done': bool(view.done), 'number': self._number,
        'ms': round(1000 * self._seconds, 2),
        'switches': {'events': dream.EVENTS[int(self._on.events)],
                     'counters': bool(self._on.counters), 'map': bool(self._on.map)}}


def _base64(frame: np.ndarray) -> str:
  return b64encode(np.ascontiguousarray(frame).tobytes()).decode()


class Rooms:
  """All games that are being played, by an id that nobody can guess. Final."""

  def __init__(self, stage: Stage) -> None:
    self.programs = Programs(stage)
    self._rooms: OrderedDict[str, Room] = OrderedDict()
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._rooms)

  def open(self, seed: int) -> tuple[str, Room]:
    """Starts a game; ones that nobody has played for long are closed."""
    room, name = Room(self.programs, seed), secrets.token_urlsafe(12)
    with self._lock:
      late = time.monotonic() - IDLE_SECONDS
      for other in [n for n, r in self._rooms.items() if r.used < late]:
        del self._rooms[other]
      while len(self._rooms) >= MOST_ROOMS:
        self._rooms.popitem(last=False)
      self._rooms[name] = room
    return name, room

  def find(self, name: str) -> Room | None:
    """The game of that id, if it is still being played."""
    with self._lock:
      room = self._rooms.get(name)
      if room is not None:
        room.used = time.monotonic()
        self._rooms.move_to_end(name)
      return room

  def close(self, name: str) -> None:
    """Ends a game."""
    with self._lock:
      self._rooms.pop(name, None)


def facts(stage: Stage, about: str) -> dict[str, Any]:
  """What the page must know of the game, for JSON."""
  game = stage.world.game
  has_map = bool(game.contents) and not isinstance(stage.world.memory, cfg.NoMap)
  return {
      'game': type(game.config).__name__, 'about': about, 'actions': game.actions,
      'stay': game.stay, 'frame_shape': game.frame_shape,
      'counters': [{'name': c.name, 'most': 10**c.num_digits - 1} for c in game.counters],
      'has_map': has_map, 'view_shape': game.view_shape, 'world_shape': game.world_shape,
      'contents': [{'name': name, 'colour': (255 * game.tiles.colours[index]).astype(int).tolist(),
                    'settled': bool(game.tiles.settled[index])}
                   for index, name in enumerate(game.contents)],
      'events': dream.EVENTS}
